"""python -m benchmarks: check every case against float64, time it against the best stock PyTorch option, report."""

import argparse
import shlex
import sys
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

import bigmodel_kernels as bmk
from benchmarks import cases, machine, plot, report, timer
from benchmarks.check import check
from benchmarks.contestant import DTYPES, PASSES

OUT = Path(__file__).parent / "out"
QUICK_ROUNDS = 10
TABLE_WIDTH = 165  # where the output is no terminal
PLACES = ("--json", "--out", "--compare")  # options with a path


def choices(allowed):
    """An argparse type: a comma-separated list of `allowed`."""

    def parse(text: str) -> tuple[str, ...]:
        values = tuple(part.strip() for part in text.split(","))
        unknown = [value for value in values if value not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(allowed)}")
        return values

    return parse


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--op", type=choices(cases.OPS), help=f"ops, of {','.join(cases.OPS)}")
    parser.add_argument("--model", type=choices(cases.MODELS), help=f"whole models, of {','.join(cases.MODELS)}")
    parser.add_argument("--pass", dest="passes", type=choices(PASSES), default=PASSES, help=f"of {','.join(PASSES)}")
    parser.add_argument("--dtype", type=choices(tuple(DTYPES)), default=tuple(DTYPES), help=f"of {','.join(DTYPES)}")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument("--quick", action="store_true", help="one case per op and model, eager baselines, fewer rounds")
    parser.add_argument("--rounds", type=int, help=f"interleaved rounds (default {timer.MIN_ROUNDS})")
    parser.add_argument("--threads", type=int, default=2, help="threads of every contestant (default 2)")
    parser.add_argument("--backend", default="auto", help="backend of ours (default auto)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON report here as well")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="folder of report.{json,csv,md,png}")
    parser.add_argument(
        "--compare", type=Path, metavar="OLD.json", help="exit with 1 where a ratio fell since OLD.json"
    )
    options = parser.parse_args(argv)
    for name in ("rounds", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    try:
        options.older = report.read_json(options.compare) if options.compare else None
    except (OSError, ValueError) as error:
        parser.error(f"--compare: {error}")
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else timer.MIN_ROUNDS)
    if options.op is None and options.model is None:
        options.groups = cases.OPS + cases.MODELS
    else:
        options.groups = (options.op or ()) + (options.model or ())
    return options


def command_line(argv: list[str]) -> str:
    """What gives these results again; without paths of this machine, which kept results have no use for."""
    kept, words = ["python", "-m", "benchmarks"], iter(argv)
    for word in words:
        if word.partition("=")[0] not in PLACES:
            kept.append(word)
        elif "=" not in word:
            next(words)
    return shlex.join(kept)


def run(row: cases.Row, *, rounds: int, compile: bool) -> report.Result:
    """Check, then time. A wrong result is returned with its errors and without a time."""
    problem = row.build(compile=compile)
    ours, stock = problem.ours, problem.stock
    checks = check(ours, stock, row.pass_, row.dtype, steps=problem.steps, whole=problem.whole)
    result = report.Result(
        group=row.case.group,
        case=row.case.name,
        pass_=row.pass_,
        dtype=row.dtype,
        backend=problem.backend(row.pass_),
        checks=[asdict(c) for c in checks],
        flops=row.flops(problem),
        traffic=row.traffic(problem),
    )
    if result.wrong:
        return result
    with machine.Others() as others:
        timing = timer.measure(
            (ours.name, ours.step(row.pass_)), {c.name: c.step(row.pass_) for c in stock}, rounds=rounds
        )
    best = timing.best([c.name for c in stock])
    ratio = timing.ratio(best, ours.name)
    result.ratio, result.ratio_low, result.ratio_high = ratio.median, ratio.low, ratio.high
    result.best_stock = best
    result.median = {name: timing.median(name) / 1e9 for name in timing.trials}
    result.left_early = [name for name in timing.trials if name not in timing.samples]
    result.rounds = rounds
    result.others = others.share
    return result


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    console = Console()
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    torch.set_num_threads(options.threads)
    rows = cases.rows(options.groups, options.passes, options.dtype, name=options.case, quick=options.quick)
    if not rows:
        console.print("no case has this combination of options", style="bold red")
        return 2
    started = time.perf_counter()
    dtypes = sorted({row.dtype for row in rows}, reverse=True)
    peaks = machine.measure_peaks(dtypes)
    results = []
    with Progress(console=console, transient=True) as progress, bmk.use_backend(options.backend):
        task = progress.add_task("", total=len(rows))
        for row in rows:
            progress.update(task, description=row.id)
            results.append(run(row, rounds=options.rounds, compile=not options.quick))
            progress.advance(task)
    peaks |= machine.measure_peaks(dtypes)  # once more: the machine may have been busy the first time
    for result in results:
        result.floor, result.floor_by = peaks.floor(result.flops, result.traffic, result.dtype)
    header = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(sys.argv[1:] if argv is None else argv),
        "seconds": round(time.perf_counter() - started, 1),
        "rounds": options.rounds,
        "machine": machine.describe(),
        "peaks": asdict(peaks),
    }
    report.print_table(console, results)
    console.print(report.machine_text(header["machine"], header["peaks"]), style="dim", markup=False)
    report.write(options.out, results, header)
    if options.json:
        report.write_json(options.json, results, header)
    plot.draw(
        results,
        options.out / "report.png",
        title="bigmodel_kernels against the best stock PyTorch option",
        subtitle=report.machine_text(header["machine"], header["peaks"]),
    )
    console.print(report.summary_text(results), markup=False)
    console.print(f"{header['seconds']:.0f} s; report.json, .csv, .md and .png in {options.out}", markup=False)
    fell = options.older is not None and report.print_comparison(console, results, options.older)
    return 1 if fell or any(result.wrong for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
