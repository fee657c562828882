"""Every Python block of the README and the docs runs; the README's table is the one of the newest kept result."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [p for p in PAGES if python_blocks(p)], ids=lambda p: p.name)
def test_examples_run(page, tmp_path):
    """The blocks of one page run as one program, in order, in an empty folder."""
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(python_blocks(page))], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_map_of_the_house_is_of_this_house():
    """Every path in the first column of the tables of architecture.md exists, for some op where it names <op>."""
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    paths = [path for row in rows for path in re.findall(r"`([^`]+)`", row)]
    assert len(paths) > 20
    for path in paths:
        assert list(ROOT.glob(path.replace("<op>", "*"))), path


def test_tables_are_of_the_newest_results():
    from benchmarks import readme

    text = readme.README.read_text()
    assert readme.render(text) == text, "run: python -m benchmarks.readme"
    assert text.count("<details open>") == 1


def test_the_newest_result_of_every_cpu_is_told_by_its_date(tmp_path):
    from benchmarks import readme

    for name, report in {
        "a/2.json": {"date": "2026-01-01"},
        "a/1.json": {"date": "2026-01-03"},
        "b/1.json": {"date": "2026-01-04"},
        "gpu/1.json": {"date": "2026-01-05", "outcomes": []},
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(report))
    assert [path.relative_to(tmp_path).as_posix() for path, _ in readme.newest(tmp_path)] == ["b/1.json", "a/1.json"]
