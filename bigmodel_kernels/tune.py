"""python -m bigmodel_kernels tune: measures launch constants of the Triton kernels on the GPU at hand, and keeps what is faster.

For every row of an op's table a call that it serves is made once; the launch of the row's kernel is kept, and repeated with
each candidate. A candidate may win only if the whole call's results, with it, are within the error rule of float64. Those left
are timed by events with the L2 cache overwritten before each, in rounds of all; the fastest replaces the checked-in constants if
it is LEAST_GAIN faster. The winners go to the file of _tuned.py, which the next process reads at its first launch.

An op's `triton_tuning.py` has `problems(dtype, device, quick)`, the calls to measure.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from bigmodel_kernels import _triton, _tuned
from bigmodel_kernels.ops import names
from bigmodel_kernels.testing import check_error

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DEFAULT_DTYPES = ["bfloat16", "float32"]  # float16 has bfloat16's rows
LEAST_GAIN = 1.02  # times are scattered by a percent or two
FLUSH_BYTES = 512 << 20  # beyond every L2 cache, and long enough for Python to queue the launch behind it
TRIAL_ROUNDS, ROUNDS = 3, 20
TRIAL_MARGIN = 1.25  # a candidate this much slower than the best of the trial rounds leaves

Functions = dict[str, Callable[[], Any]]
Measure = Callable[[Functions, int], dict[str, list[float]]]  # (functions, rounds) -> microseconds of each


@dataclass
class Problem:
    """One row of an op's table and a call that it serves."""

    op: str
    kernel: str  # of the row
    function: str  # name of the kernel in Triton
    call: Callable[[], list[Tensor]]  # forward, or forward and backward, whose results are checked
    exact: Callable[[], list[Tensor]]  # the same in float64
    dtype: torch.dtype
    changes: list[dict[str, int]]  # what candidates have instead of the checked-in constants

    @classmethod
    def of(
        cls, op: str, kernel: str, function: str, run: Callable[..., Tensor], tensors: list[Tensor], changes: list[dict],
        wanted: tuple[int, ...] = (),
    ) -> Problem:  # fmt: skip
        """Of `run(*tensors, backend=...)`, with the gradients of the tensors at `wanted`."""

        def call(backend: str, convert: Callable[[Tensor], Tensor]) -> list[Tensor]:
            inputs = [convert(t).detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
            out = run(*inputs, backend=backend)
            if not wanted:
                return [out]
            upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
            return [out.detach(), *torch.autograd.grad(out, [inputs[i] for i in wanted], upstream)]

        return cls(
            op, kernel, function, lambda: call("triton", lambda t: t), lambda: call("torch", lambda t: t.double()),
            tensors[0].dtype, changes,
        )  # fmt: skip


@dataclass
class Outcome:
    row: str
    before: dict[str, int]
    constants: dict[str, int]
    microseconds_before: float
    microseconds: float
    tried: int
    refused: dict[str, str] = field(default_factory=dict)  # candidate -> why it could not win

    @property
    def gain(self) -> float:
        return self.microseconds_before / self.microseconds


def problems(ops: list[str], dtypes: list[str], device: str, quick: bool) -> Iterator[Problem]:
    for op in ops:
        module = importlib.import_module(f"bigmodel_kernels.ops.{op}.triton_tuning")
        for dtype in dtypes:
            yield from module.problems(DTYPES[dtype], device, quick)


def grid(**values: tuple[int, ...]) -> list[dict[str, int]]:
    """Every combination."""
    return [dict(zip(values, chosen)) for chosen in itertools.product(*values.values())]


def tunable_ops() -> list[str]:
    return [op for op in names() if importlib.util.find_spec(f"bigmodel_kernels.ops.{op}.triton_tuning")]


@contextlib.contextmanager
def launches_of(function: str) -> Iterator[list[tuple]]:
    """Gives the launches of a kernel in the block, which are made as ever."""
    found: list[tuple] = []
    launch = _triton.launch

    def watched(kernel, programs, *args, **constants):
        if kernel.__name__ == function:
            found.append((kernel, programs, args, constants))
        launch(kernel, programs, *args, **constants)

    _triton.launch = watched
    try:
        yield found
    finally:
        _triton.launch = launch


def _repeated(launches: list[tuple]) -> Callable[[], None]:
    def run() -> None:
        for kernel, programs, args, constants in launches:
            _triton.launch(kernel, programs, *args, **constants)

    return run


def tune(problem: Problem, measure: Measure, done: Callable[[], None] = lambda: None) -> Outcome | None:
    """The best of a problem's candidates; None if the call does not come to the row. `done` is called after each candidate."""
    prefix = f"{problem.op} {problem.kernel} "
    with _tuned.recording() as asked:
        problem.call()
    rows = [row for row in asked if row.startswith(prefix)]
    if len(rows) != 1:
        return None
    (row,) = rows
    before = asked[row]
    candidates = [before]
    for change in problem.changes:
        if (candidate := before | change) not in candidates:
            candidates.append(candidate)
    exact = problem.exact()
    functions: Functions = {}
    refused = {}
    for candidate in candidates:
        name = _name(candidate)
        with _tuned.trying({row: candidate}), launches_of(problem.function) as launches:
            why = _refusal(problem, exact)
        done()
        if why is None and launches:
            functions[name] = _repeated(launches)
        else:
            refused[name] = why or "it is not launched"
    old = _name(before)
    if old not in functions:
        raise RuntimeError(f"{row}: the checked-in constants {old} do not pass: {refused[old]}")
    times = measure(functions, TRIAL_ROUNDS)
    limit = TRIAL_MARGIN * min(min(t) for t in times.values())
    functions = {name: f for name, f in functions.items() if name == old or min(times[name]) <= limit}
    times = measure(functions, ROUNDS)
    medians = {name: statistics.median(t) for name, t in times.items()}
    best = min(medians, key=medians.get)
    if medians[old] < LEAST_GAIN * medians[best]:
        best = old
    constants = next(c for c in candidates if _name(c) == best)
    return Outcome(row, before, constants, medians[old], medians[best], len(candidates), refused)


def _refusal(problem: Problem, exact: list[Tensor]) -> str | None:
    """Why the constants tried now cannot win: they cannot run, or run wrong."""
    try:
        results = problem.call()
    except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError, triton.CompilationError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    except RuntimeError as error:  # of the compiler, which has no class for it
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # raises again if the GPU itself has failed
        return f"{type(error).__name__}: {error}".splitlines()[0]
    for i, (result, expected) in enumerate(zip(results, exact, strict=True)):
        report = check_error(result, expected, None, dtype=problem.dtype, gradient=i > 0, name=f"result {i}")
        if not report.ok:
            return report.message
    return None


def _name(constants: dict[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in constants.items())


def by_events(functions: Functions, rounds: int) -> dict[str, list[float]]:
    """Microseconds on the GPU, in an order drawn anew for each round."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    order, samples = random.Random(0), {name: [] for name in functions}
    for _ in range(rounds):
        for name in order.sample(list(functions), len(functions)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            functions[name]()
            end.record()
            end.synchronize()
            samples[name].append(start.elapsed_time(end) * 1e3)
    return samples


def entries(outcomes: list[Outcome]) -> dict[str, dict]:
    """What is kept of the outcomes: the rows that changed, and those that no longer do."""
    return {
        o.row: {"constants": o.constants, "microseconds": o.microseconds, "microseconds_before": o.microseconds_before}
        for o in outcomes
    }


def report(outcomes: list[Outcome], console) -> None:
    from rich.table import Table

    table = Table("row", "checked in", "us", "now", "us", "times as fast", "tried", "refused", title="Launch constants")
    for o in outcomes:
        changed = _name({k: v for k, v in o.constants.items() if o.before[k] != v}) or "the same"
        table.add_row(
            o.row, _name(o.before), f"{o.microseconds_before:.1f}", changed, f"{o.microseconds:.1f}", f"{o.gain:.2f}",
            str(o.tried), str(len(o.refused)),
        )  # fmt: skip
    console.print(table)


def run(ops: list[str] | None, dtypes: list[str] | None, quick: bool) -> int:
    """The command; its exit status."""
    if not torch.cuda.is_available():
        print(
            "tune needs a GPU, and torch.cuda.is_available() is false here; see: python -m bigmodel_kernels info",
            file=sys.stderr,
        )
        return 2
    if importlib.util.find_spec("rich") is None:
        print("tune needs rich: pip install rich", file=sys.stderr)
        return 2
    from rich.console import Console
    from rich.progress import Progress

    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = (
        "ieee"  # as float32 is checked
    )
    console = Console()
    device = torch.cuda.current_device()
    if (why := _triton.reason(torch.empty(1, device="cuda"))) is not None:
        print(f"tune cannot use this GPU: {why}", file=sys.stderr)
        return 2
    found = list(problems(ops or tunable_ops(), dtypes or DEFAULT_DTYPES, "cuda", quick))
    measured_with, outcomes = _tuned.key(device), []
    with Progress(console=console) as progress:
        task = progress.add_task("candidates", total=sum(1 + len(p.changes) for p in found))
        for problem in found:
            progress.update(
                task, description=f"{problem.op} {problem.kernel} {str(problem.dtype).removeprefix('torch.')}"
            )
            outcome = tune(problem, by_events, lambda: progress.advance(task))
            if outcome is not None:
                outcomes.append(outcome)
                _tuned.save(
                    measured_with, entries([outcome])
                )  # what is done stays done, should the rest be interrupted
    report(outcomes, console)
    console.print(f"kept in {_tuned.path_of(measured_with)}")
    return 0
