"""python -m benchmarks.gpu (make gpu): everything that needs a GPU in one go, shortest step first.

Each step is bounded and its log is kept; a call ends within nine minutes, and says which steps it did not come to. STEP=name,name
(or --step) runs only those. Where something is missing, such as the GPU itself, a step says "not measured" and why.
Results go to $OUT, else to benchmarks/out/gpu; python -m benchmarks.gpu_report makes a table and a picture of them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch.utils.cpp_extension import CUDA_HOME

ROOT = Path(__file__).parents[1]
SECONDS = 520  # of a call
LEAST_SECONDS = 10  # that a step is started with
EQUAL = 0.97  # a ratio below is a loss
SCHEMA = 1  # of gpu.json
# What tools say where a machine does not let them at the GPU: no fault of what they were to look at.
REFUSALS = ("Device not supported", "LibraryNotLoaded", "ERR_NVGPUCTRPERM", "the user does not have permission")


@dataclass(frozen=True)
class Step:
    """`command` is run from the root of the clone for at most `seconds`."""

    name: str
    seconds: int
    command: tuple[str, ...]
    tool: str | None = None  # a program that must be on the PATH
    file: str | None = None  # a file of the clone that must be there
    environment: dict[str, str] = field(default_factory=dict)


def python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


def sanitizer(tool: str) -> Step:
    """Every allocation is one of the driver's, so that memcheck sees where each tensor ends."""
    command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *python("-m", "pytest", "tests/cuda"))
    own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Step(tool, 120, (*command, "-k", "tiny"), tool="compute-sanitizer", environment=own)


def measure(name: str, seconds: int) -> Step:
    return Step(name, seconds, python("-m", "benchmarks.gpu_measure", name))


def random_cases(family: str) -> Step:
    """5,000 random cases of a family, or as many as the time allows; the figure says how many, and the seed."""
    return Step(f"random-{family}", 260, python("-m", "tests.cuda.random_cases", family, "--seconds", "220"))


STEPS = (
    measure("machine", 60),
    measure("sync", 60),
    measure("ceilings", 60),
    # The binary that came with the clone, built on a machine without a GPU: it must load and be right here.
    Step("carried", 60, python("-m", "bigmodel_kernels", "check"), file="bigmodel_kernels/_native.so"),
    Step(
        "build", 330, python("setup.py", "-q", "build_ext", "--inplace", "--force"), environment={"FORCE_CUDA": "1"}
    ),
    Step("check", 60, python("-m", "bigmodel_kernels", "check")),
    measure("decode", 90),
    measure("conv_step", 90),
    measure("pointwise", 90),
    sanitizer("memcheck"),
    sanitizer("synccheck"),
    sanitizer("racecheck"),
    measure("lstm", 200),
    measure("attention", 300),
    measure("conv", 300),
    Step("hard", 300, python("-m", "pytest", "tests/cuda/test_hard_device.py")),
    Step("tests", 300, python("-m", "pytest", "tests/cuda", "--ignore", "tests/cuda/test_hard_device.py")),
    random_cases("attention"),
    random_cases("conv"),
    random_cases("lstm"),
    measure("models", 450),
    Step("profile", 200, python("-m", "benchmarks.gpu_profile")),
)  # fmt: skip


@dataclass
class Outcome:
    step: str
    result: str  # ok, failed, timeout, not measured
    seconds: float = 0.0
    note: str = ""
    figures: list[dict] = field(default_factory=list)  # the lines of the log that are JSON objects


def path() -> str:
    """Where programs are looked for: the toolkit's own folder too, which need not be on the PATH."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(CUDA_HOME or "/usr/local/cuda", "bin"))])


def why_not(step: Step) -> str | None:
    if not torch.cuda.is_available():
        return "no GPU was found"
    if step.tool and shutil.which(step.tool, path=path()) is None:
        return f"{step.tool} is not installed"
    if step.file and not (ROOT / step.file).exists():
        return f"there is no {step.file}"
    return None


def run(step: Step, seconds: float, folder: Path) -> Outcome:
    """Runs a step for at most `seconds`, its output in <folder>/<step>.log; ends all of its processes where it takes longer."""
    log = folder / f"{step.name}.log"
    start = time.monotonic()
    with open(log, "w") as out:
        process = subprocess.Popen(
            step.command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"PATH": path(), "OUT": str(folder)} | step.environment,
        )  # fmt: skip
        try:
            code = process.wait(min(step.seconds, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    lines = log.read_text(errors="replace").splitlines()
    figures = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    took = time.monotonic() - start
    if code is None:
        return Outcome(step.name, "timeout", took, f"after {took:.0f} s; {log}", figures)
    if code and (refused := next((line for line in lines if any(words in line for words in REFUSALS)), None)):
        return Outcome(step.name, "not measured", took, f"{refused.strip()}; {log}", figures)
    if code:
        return Outcome(step.name, "failed", took, f"exit status {code}: {lines[-1] if lines else ''}; {log}", figures)
    return Outcome(step.name, "ok", took, "", figures)


def run_all(steps: tuple[Step, ...], folder: Path, seconds: float = SECONDS) -> list[Outcome]:
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.gpu", "--step", ",".join(step.name for step in steps)]),
    }
    end = time.monotonic() + seconds
    outcomes = []
    for step in steps:
        left = end - time.monotonic()
        if (why := why_not(step)) is not None:
            outcomes.append(Outcome(step.name, "not measured", note=why))
        elif left < LEAST_SECONDS:
            outcomes.append(Outcome(step.name, "not measured", note=f"no time was left: STEP={step.name} make gpu"))
        else:
            outcomes.append(run(step, left, folder))
        known = about | {"outcomes": [asdict(outcome) for outcome in outcomes]}
        (folder / "gpu.json").write_text(json.dumps(known, indent=1) + "\n")
        print(line(outcomes[-1]), flush=True)
    return outcomes


def line(outcome: Outcome) -> str:
    text = f"{outcome.step:16s} {outcome.result:12s} {outcome.seconds:5.0f} s  {outcome.note}".rstrip()
    return "\n    ".join([text, *map(figure_line, outcome.figures)])


def figure_line(figure: dict) -> str:
    """A measured case in one line; any other figure as it is."""
    if "ratio" not in figure:
        return "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in figure.items())
    rate = f"{figure['teraflops']:.0f} TFLOP/s" if figure["teraflops"] >= 1 else ""
    text = (
        f"{figure['case']:58s} {figure['ratio']:5.2f} ({figure['low']:.2f}-{figure['high']:.2f}) of {figure['best']}, "
        f"by {figure['ours']}; auto {figure.get('auto_ratio', math.nan):.2f}; wall {figure['wall_ratio']:.2f}; "
        f"{figure['gigabytes_per_second']:.0f} GB/s {rate}; {figure['of_ceiling']:.0%} of the ceiling"
    )
    return text + (f"; WRONG: {', '.join(figure['wrong'])}" if "wrong" in figure else "")


def losses(outcomes: list[Outcome]) -> list[dict]:
    """The cases where `auto` is below 0.97 of the best stock option."""
    figures = [figure for outcome in outcomes for figure in outcome.figures]
    return [figure for figure in figures if figure.get("auto_ratio", 1.0) < EQUAL]


def main(argv: list[str] | None = None, steps: tuple[Step, ...] = STEPS) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--step", default=os.environ.get("STEP", ""), help=f"of {','.join(s.name for s in steps)}")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT") or ROOT / "benchmarks" / "out" / "gpu")
    options = parser.parse_args(argv)
    wanted = [name for name in options.step.split(",") if name]
    if unknown := set(wanted) - {step.name for step in steps}:
        parser.error(f"--step: {sorted(unknown)[0]!r} is none of {', '.join(s.name for s in steps)}")
    chosen = tuple(step for step in steps if not wanted or step.name in wanted)
    outcomes = run_all(chosen, Path(options.out))
    if behind := losses(outcomes):
        print(f"\nauto is slower than the best stock option in {len(behind)} cases:")
        print("\n".join(f"    {f['auto_ratio']:5.2f} {f['case']} ({f['best']})" for f in behind))
    print(f"\n{len(chosen)} steps; logs and gpu.json in {options.out}")
    return int(any(outcome.result in ("failed", "timeout") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
