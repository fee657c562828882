"""The report: rows, summary, files (JSON, CSV, Markdown), table on the terminal, comparison with an older report.

The JSON schema is described in docs/benchmarking.md.
"""

import csv
import json
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

SCHEMA = 1
EQUAL = (0.97, 1.03)  # ratios that count as equal
FELL = 0.9  # a ratio below this part of its older value, with bands apart, is a regression
WIN, TIE, LOSS, WRONG = "faster", "equal", "slower", "WRONG"
UNIT = {"compute": "flops", "memory": "bytes"}  # what the floor of a row counts
BUSY = 0.05  # from this part of the CPUs on, other programs are named as a disturbance
STYLE = {WIN: "green", TIE: "yellow", LOSS: "bold red", WRONG: "bold white on red"}


@dataclass
class Result:
    """One row. Times in seconds per call; a wrong result has none."""

    group: str
    case: str
    pass_: str
    dtype: str
    backend: str
    checks: list[dict]
    ratio: float | None = None  # best stock time / ours, median over the rounds
    ratio_low: float | None = None  # 10 % and 90 % of the rounds
    ratio_high: float | None = None
    best_stock: str | None = None
    median: dict[str, float] = field(default_factory=dict)  # contestant -> seconds
    left_early: list[str] = field(default_factory=list)  # contestants that the trial rounds ruled out
    rounds: int = 0
    others: float | None = None  # part of the CPUs that other programs took meanwhile
    flops: float = 0.0
    traffic: float = 0.0
    floor: float | None = None
    floor_by: str | None = None  # compute | memory

    @property
    def id(self) -> str:
        return f"{self.group} | {self.case} | {self.pass_} | {self.dtype}"

    @property
    def wrong(self) -> list[dict]:
        return [check for check in self.checks if not check["ok"]]

    @property
    def verdict(self) -> str:
        if self.wrong:
            return WRONG
        shown = round(self.ratio, 2)  # judged as it is printed
        return WIN if shown > EQUAL[1] else LOSS if shown < EQUAL[0] else TIE

    @property
    def of_floor(self) -> float | None:
        """Part of the measured peak that ours reaches: floor time / our time."""
        return None if self.floor is None or "ours" not in self.median else self.floor / self.median["ours"]

    @property
    def rel_l2(self) -> float:
        """The largest relative L2 error of output and gradients, against float64."""
        return max(check["rel_l2"] for check in self.checks)


def cells(result: Result) -> dict[str, str]:
    """One row as text, ratios first; the same for terminal, CSV and Markdown."""
    row = {"op": result.group, "case": result.case, "pass": result.pass_, "dtype": result.dtype}
    error = f"{result.rel_l2:.1e}"
    if result.wrong:
        worst = max(result.wrong, key=lambda check: check["rel_l2"])
        return row | {
            "vs best": WRONG,
            "10-90 %": "",
            "best stock": worst["message"],
            "backend": result.backend,
            "ours ms": "",
            "of peak": "",
            "error": error,
        }
    return row | {
        "vs best": f"{result.ratio:.2f}x",
        "10-90 %": f"{result.ratio_low:.2f}-{result.ratio_high:.2f}",
        "best stock": result.best_stock,
        "backend": result.backend,
        "ours ms": f"{result.median['ours'] * 1e3:.3g}",
        "of peak": f"{result.of_floor:.0%} {UNIT[result.floor_by]}",
        "error": error,
    }


def summary(results: list[Result]) -> dict:
    """Counts, the losses and wrong rows by name, and how many rows were timed beside other programs."""
    count = Counter(result.verdict for result in results)
    return {
        "faster": count[WIN],
        "equal": count[TIE],
        "slower": count[LOSS],
        "wrong": count[WRONG],
        "slower_rows": [f"{r.id} ({r.ratio:.2f}x)" for r in results if r.verdict == LOSS],
        "disturbed_rows": sum((result.others or 0.0) > BUSY for result in results),
        "wrong_rows": [r.id for r in results if r.verdict == WRONG],
    }


def summary_text(results: list[Result]) -> str:
    s = summary(results)
    low, high = EQUAL
    head = (
        f"{len(results)} cases: faster on {s['faster']}, equal ({low}-{high}) on {s['equal']}, slower on {s['slower']}"
    )
    lines = [head + (f", wrong on {s['wrong']}" if s["wrong"] else "")]
    lines += [f"  slower: {row}" for row in s["slower_rows"]]
    lines += [f"  WRONG: {row}" for row in s["wrong_rows"]]
    if s["disturbed_rows"]:
        lines.append(
            f"other programs took more than {BUSY:.0%} of the CPUs while {s['disturbed_rows']} of these were timed:"
        )
        lines.append("  threads that wait for each other suffer most from that; repeat it on a quiet machine")
    return "\n".join(lines)


def machine_text(machine: dict, peaks: dict) -> str:
    """What the figures were measured on, in two lines."""
    flops = ", ".join(f"{dtype} {value / 1e9:.0f} GFLOP/s" for dtype, value in peaks["flops"].items())
    sizes = sorted((int(size), speed) for size, speed in peaks["bandwidth"].items())
    copies = ", ".join(f"{size >> 20} MiB {speed / 1e9:.0f} GB/s" for size, speed in sizes)
    return (
        f"{machine['device']}, {machine['threads']} threads of {machine['cpus']} CPUs, {machine['isa']}, "
        f"torch {machine['torch']} ({machine['torch_isa']}), Python {machine['python']}, "
        f"bigmodel_kernels {machine['version']} {machine['commit']}\nmeasured peaks: {flops}; copy of {copies}"
    )


def print_table(console: Console, results: list[Result]) -> None:
    """The rows in colour, a line between the groups."""
    table = Table(header_style="bold", pad_edge=False)
    for name in cells(results[0]):
        right = name in ("vs best", "ours ms", "of peak")
        table.add_column(name, justify="right" if right else "left", no_wrap=name not in ("case", "best stock"))
    for result, following in zip(results, [*results[1:], None], strict=True):
        style = STYLE[result.verdict]
        whole_row = style if result.verdict in (LOSS, WRONG) else ""
        values = cells(result).items()
        row = [Text(value, style=style if name == "vs best" else whole_row) for name, value in values]
        table.add_row(*row, end_section=following is not None and following.group != result.group)
    console.print(table)


def write_json(path: Path, results: list[Result], header: dict) -> None:
    """The whole report in one file."""
    rows = [{name.rstrip("_"): v for name, v in asdict(r).items()} | {"verdict": r.verdict} for r in results]
    document = {"schema": SCHEMA, **header, "summary": summary(results), "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1))


def read_json(path: Path) -> list[Result]:
    """The rows of a report that write_json has written.

    Raises:
        ValueError: the file has another schema.
    """
    document = json.loads(path.read_text())
    if document.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected a report with schema {SCHEMA}, got {document.get('schema')!r}")
    names = {field.name: field.name.rstrip("_") for field in fields(Result)}
    return [Result(**{name: row[key] for name, key in names.items() if key in row}) for row in document["rows"]]


def markdown(results: list[Result], header: dict) -> str:
    """The table for a README; losses in bold."""
    names = list(cells(results[0]))
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for result in results:
        values = cells(result)
        if result.verdict in (LOSS, WRONG):
            values["vs best"] = f"**{values['vs best']}**"
        lines.append("| " + " | ".join(values.values()) + " |")
    about = machine_text(header["machine"], header["peaks"]).replace("\n", "; ")
    return "\n".join([f"{header['date']}: {about}. `{header['command']}`", "", *lines, "", summary_text(results), ""])


def write(out: Path, results: list[Result], header: dict) -> None:
    """report.json, report.csv and report.md in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "report.json", results, header)
    (out / "report.md").write_text(markdown(results, header))
    with (out / "report.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["verdict", *cells(results[0])])
        writer.writeheader()
        writer.writerows({"verdict": r.verdict, **cells(r)} for r in results)


def compare(new: list[Result], old: list[Result]) -> tuple[list[tuple[str, float, float, bool]], list[str]]:
    """(row, old ratio, new ratio, fell) of the rows that both have, and the rows that only one has.

    A row fell if its ratio lost more than 10 % and its band lies below the old band; a row that is wrong now fell too.
    """
    before = {r.id: r for r in old if r.ratio is not None}
    after = {r.id: r for r in new}
    lines = []
    for name in (name for name in after if name in before):
        then, now = before[name], after[name]
        if now.ratio is None:
            lines.append((name, then.ratio, 0.0, True))
        else:
            lines.append(
                (name, then.ratio, now.ratio, now.ratio < FELL * then.ratio and now.ratio_high < then.ratio_low)
            )
    return lines, sorted(before.keys() ^ after.keys())


def print_comparison(console: Console, new: list[Result], old: list[Result]) -> bool:
    """True if a row fell."""
    lines, apart = compare(new, old)
    table = Table(title="ratio against the older report", header_style="bold", pad_edge=False)
    for name in ("row", "then", "now", "change"):
        table.add_column(name, justify="left" if name == "row" else "right")
    for name, then, now, fell in lines:
        style = "bold red" if fell else "green" if now > then / FELL else ""
        table.add_row(
            name, f"{then:.2f}x", f"{now:.2f}x", f"{now / then - 1:+.0%}" + (" FELL" if fell else ""), style=style
        )
    console.print(table)
    for name in apart:
        console.print(f"only in one of the two reports: {name}", markup=False)
    return any(fell for *_, fell in lines)
