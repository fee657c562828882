"""python -m benchmarks.readme benchmarks/results/DEVICE/FILE.json: puts the table of a kept result into README.md."""

import json
import sys
from pathlib import Path

from benchmarks import report

README = Path(__file__).parents[1] / "README.md"
CPU, GPU = "benchmark table", "gpu table"  # the parts of README.md between <!-- NAME: begin --> and <!-- NAME: end -->


def put(readme: str, name: str, text: str) -> str:
    """`readme` with `text` as its part `name`."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = readme.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"README.md has no markers {begin} and {end}")
    return f"{before}{begin}\n{text}{end}{after}"


def render(readme: str, path: Path) -> str:
    """`readme` with the table of the report at `path`."""
    return put(readme, CPU, report.markdown(report.read_json(path), json.loads(path.read_text())))


if __name__ == "__main__":
    README.write_text(render(README.read_text(), Path(sys.argv[1])))
