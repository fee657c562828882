"""python -m benchmarks.readme: puts the tables of the kept results into README.md, the newest of every CPU."""

import json
from pathlib import Path

from benchmarks import report

ROOT = Path(__file__).parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
CPU, GPU = "benchmark table", "gpu table"  # the parts of README.md between <!-- NAME: begin --> and <!-- NAME: end -->


def put(readme: str, name: str, text: str) -> str:
    """`readme` with `text` as its part `name`."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = readme.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"README.md has no markers {begin} and {end}")
    return f"{before}{begin}\n{text}{end}{after}"


def newest(results: Path = RESULTS) -> list[tuple[Path, dict]]:
    """The newest report of every CPU, results/CPU/FILE.json, and what is in it; the newest of all first."""
    reports = [(path, json.loads(path.read_text())) for path in results.glob("*/*.json")]
    of_cpus = [(path, kept) for path, kept in reports if "outcomes" not in kept]  # a GPU's has its own table
    of_cpus.sort(key=lambda item: item[1]["date"])
    last = {path.parent: (path, kept) for path, kept in of_cpus}
    return sorted(last.values(), key=of_cpus.index, reverse=True)


def table(path: Path, header: dict, opened: bool) -> str:
    """A part of the page that folds away, with the counts as what is left to be seen."""
    results = report.read_json(path)
    counts = report.summary(results)
    seen = f"faster on {counts['faster']}, equal on {counts['equal']}, slower on {counts['slower']} of {len(results)}"
    start = f"<details{' open' if opened else ''}>\n<summary><b>{path.parent.name}</b>: {seen}</summary>\n\n"
    return f"{start}{report.markdown(results, header)}\n</details>\n"


def render(readme: str, results: Path = RESULTS) -> str:
    """`readme` with the tables of the newest reports, the newest of all unfolded."""
    return put(readme, CPU, "\n".join(table(*kept, opened=i == 0) for i, kept in enumerate(newest(results))))


if __name__ == "__main__":
    README.write_text(render(README.read_text()))
