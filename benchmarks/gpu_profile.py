"""python -m benchmarks.gpu_profile [--results gpu.json]: why the two worst cases are as slow as they are.

Of the cases where the fastest of our own kernels is furthest behind the best stock option: the kernels of both with their times,
by torch.profiler, and ours under Nsight Compute, where it may count: which share of the machine's arithmetic and memory is used,
how many warps are at hand, how long an instruction waits. One JSON object a line.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_measure import MEASURES

ROOT = Path(__file__).parents[1]
OWN = ("cuda", "triton")  # contestants whose kernels are ours begin so
SECONDS = 80  # of one program; two of each case, and ncu for one
METRICS = {  # of Nsight Compute's sections, by the names that we show
    "Duration": "duration",
    "Compute (SM) Throughput": "arithmetic",
    "DRAM Throughput": "memory",
    "L2 Hit Rate": "l2_hits",
    "Achieved Occupancy": "warps",
    "Registers Per Thread": "registers",
    "Warp Cycles Per Issued Instruction": "cycles_per_instruction",
    "No Eligible": "stalled",
}
SECTIONS = ("SpeedOfLight", "Occupancy", "LaunchStats", "SchedulerStats", "WarpStateStats", "MemoryWorkloadAnalysis")


def worst(outcomes: list[dict], count: int) -> list[dict]:
    """Of the measured cases, those furthest behind: {step, case, ours, best, ratio} with the fastest kernel of ours."""
    found = []
    for outcome in outcomes:
        for figure in outcome["figures"]:
            mine = {n: us for n, us in figure.get("us", {}).items() if n.startswith(OWN)}
            if mine and outcome["step"] in MEASURES:
                name = min(mine, key=mine.get)
                ratio = figure["us"][figure["best"]] / mine[name]
                found.append(
                    {
                        "step": outcome["step"],
                        "case": figure["case"],
                        "ours": name,
                        "best": figure["best"],
                        "ratio": ratio,
                    }
                )
    return sorted(found, key=lambda case: case["ratio"])[:count]


def program(case: dict, contestant: str, *flags: str) -> list[str]:
    arguments = [*flags, case["step"], "--only", case["case"], "--profile", contestant]
    return [sys.executable, "-m", "benchmarks.gpu_measure", *arguments]


def by_ncu(command: list[str], ncu: str) -> list[str]:
    sections = [word for section in SECTIONS for word in ("--section", section)]
    return [
        ncu,
        "--profile-from-start",
        "off",
        "--csv",
        "--page",
        "details",
        "--print-units",
        "base",
        *sections,
        *command,
    ]


def counted(text: str) -> list[dict]:
    """The kernels in ncu's output, a dict each: name and METRICS."""
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), None)
    kernels: dict[str, dict] = {}
    for row in csv.DictReader(lines[first:]) if first is not None else ():
        kernel = kernels.setdefault(row["ID"], {"kernel": row["Kernel Name"][:120]})
        if (name := METRICS.get(row["Metric Name"])) is not None:
            kernel[name] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return list(kernels.values())


def run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)


def show_case(case: dict, flags: tuple[str, ...], ncu: str | None) -> bool:
    """Prints what is found; whether our contestant could be profiled."""
    print(json.dumps(case), flush=True)
    fine = True
    for name in (case["ours"], case["best"]):
        done = run(program(case, name, *flags))
        shown = [line for line in done.stdout.splitlines() if line.startswith("{")]
        print("\n".join(shown or [done.stderr[-1000:]]), flush=True)
        fine = fine and bool(shown)
    if ncu is None:
        print(json.dumps({"case": case["case"], "not_measured": "ncu is not installed"}))
        return fine
    done = run(by_ncu(program(case, case["ours"], *flags), ncu))
    kernels = counted(done.stdout)
    for kernel in kernels:
        print(json.dumps({"case": case["case"], **kernel}))
    if not kernels:
        said = (done.stdout + done.stderr).strip().splitlines()
        print(json.dumps({"case": case["case"], "not_measured": f"ncu: {said[-1] if said else 'no output'}"}))
    return fine


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_profile", description=__doc__)
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "out" / "gpu")
    parser.add_argument("--results", type=Path, default=folder / "gpu.json")
    parser.add_argument("--worst", type=int, default=2, help="how many cases")
    parser.add_argument("--dry", action="store_true", help="on the CPU, at tiny sizes, as in benchmarks.gpu_measure")
    options = parser.parse_args(argv)
    cases = (
        worst(json.loads(options.results.read_text())["outcomes"], options.worst) if options.results.is_file() else []
    )
    if not cases:
        print(json.dumps({"not_measured": f"no case of our own kernels in {options.results}"}))
        return 0
    flags = ("--dry",) if options.dry else ()
    return int(not all([show_case(case, flags, shutil.which("ncu")) for case in cases]))


if __name__ == "__main__":
    sys.exit(main())
