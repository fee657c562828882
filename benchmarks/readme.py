"""python -m benchmarks.readme benchmarks/results/DEVICE/FILE.json: puts the table of a kept result into README.md."""

import json
import sys
from pathlib import Path

from benchmarks import report

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- benchmark table: begin -->", "<!-- benchmark table: end -->"


def render(readme: str, path: Path) -> str:
    """`readme` with the table of the report at `path` between the two markers."""
    before, _, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"README.md has no markers {BEGIN} and {END}")
    table = report.markdown(report.read_json(path), json.loads(path.read_text()))
    return f"{before}{BEGIN}\n{table}{END}{after}"


if __name__ == "__main__":
    README.write_text(render(README.read_text(), Path(sys.argv[1])))
