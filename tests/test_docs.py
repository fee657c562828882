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


def test_table_is_of_the_newest_result():
    from benchmarks import readme

    kept = {path: json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").rglob("*.json")}
    of_cpus = [path for path, report in kept.items() if "outcomes" not in report]  # a GPU's has its own table
    newest = max(of_cpus, key=lambda path: kept[path]["date"])
    text = readme.README.read_text()
    assert readme.render(text, newest) == text, f"run: python -m benchmarks.readme {newest.relative_to(ROOT)}"
