"""What the measurements on a GPU share: how a contestant is checked, how it is timed, what its time is held against.

With `dry` everything runs on the CPU at tiny sizes, through the same code: what it shows then is no figure of anything.
"""

from __future__ import annotations

import functools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.timer import MIN_ROUNDS, Ratio
from bigmodel_kernels.testing import check_error, check_whole_model, relative_l2

FLUSH_BYTES = 256 << 20  # beyond every L2 cache
HEAD_START = (
    1_000_000  # cycles that the GPU sleeps before a timed call, so that the host has queued all of it meanwhile
)
GEMM_SIZE = 8192
COPY_BYTES = 1 << 30
KERNELS_SHOWN = 12  # of a profile, those that take longest
WALL_CALLS = 20  # back to back, for the time that a program sees
SAME_COMPUTATION = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}  # of a stock contestant

Result = Tensor | tuple[Tensor, ...]
Contestants = dict[str, Callable[[], Result]]


def show(**figure: object) -> None:
    print(json.dumps(figure), flush=True)


def tensors(result: Result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def gradients(function: Callable[[], Tensor], leaves: Iterable[Tensor], upstream: Tensor) -> Callable[[], Result]:
    """A call that runs forward and backward and gives the gradients of `leaves`."""
    leaves = tuple(leaves)
    return lambda: torch.autograd.grad(function(), leaves, upstream)


@dataclass
class Bench:
    """One run of measurements; `failures` holds what was wrong.

    With `only`, every other case is left out; with `profiled`, that contestant (of ours or stock) is profiled in place of timing.
    """

    dry: bool = False
    rounds: int = MIN_ROUNDS
    only: str | None = None
    profiled: str | None = None
    failures: list[str] = field(default_factory=list)

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def pick(self, real, tiny):
        """The sizes of a case: those to measure, or those of a dry run."""
        return tiny if self.dry else real

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return (torch.float32,) if self.dry else (torch.bfloat16, torch.float16)

    def draw(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=self.device) * scale).to(dtype)

    def compiled(self, function: Callable, mode: str | None = None) -> Callable:
        """torch.compile for these shapes alone. A dry run traces and does not generate code, which takes long."""
        torch._dynamo.reset()
        if self.dry:
            return torch.compile(function, backend="eager", dynamic=False)
        return torch.compile(function, mode=mode, dynamic=False)

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def microseconds(self, function: Callable[[], object], flush: Tensor) -> float:
        """The time of one call on the device alone, with nothing of its data in the L2 cache."""
        flush.zero_()
        if self.dry:
            start = time.perf_counter()
            function()
            return (time.perf_counter() - start) * 1e6
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START)
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3

    def interleaved(self, functions: Contestants, rounds: int | None = None) -> dict[str, list[float]]:
        """Microseconds of each contestant, one per round, in an order drawn anew for each round."""
        flush = torch.empty(self.pick(FLUSH_BYTES, 1 << 10), dtype=torch.uint8, device=self.device)
        order, names = random.Random(0), list(functions)
        samples: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(1 if self.dry else rounds or self.rounds):
            order.shuffle(names)
            for name in names:
                samples[name].append(self.microseconds(functions[name], flush))
        return samples

    def wall(self, function: Callable[[], object]) -> float:
        """Microseconds of a call among calls, launches included."""
        calls = 1 if self.dry else WALL_CALLS
        self.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        self.synchronize()
        return (time.perf_counter() - start) * 1e6 / calls

    @functools.cached_property
    def bandwidth(self) -> float:
        """Bytes per second of a copy, read and written."""
        size = self.pick(COPY_BYTES, 1 << 12)
        source = torch.ones(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / (statistics.median(self.interleaved({"copy": lambda: target.copy_(source)})["copy"]) / 1e6)

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP per second of a product of two large matrices."""
        if dtype not in self._peaks:
            size = self.pick(GEMM_SIZE, 64)
            a, b = (self.draw(size, size, dtype=dtype) for _ in range(2))
            times = self.interleaved({"mm": lambda: torch.mm(a, b)}, rounds=10)["mm"]
            self._peaks[dtype] = 2 * size**3 / (statistics.median(times) / 1e6)
        return self._peaks[dtype]

    _peaks: dict[torch.dtype, float] = field(default_factory=dict)

    def compare(
        self,
        case: str,
        ours: Contestants,
        stock: Contestants,
        exact: Result,
        *,
        dtype: torch.dtype,
        flops: float = 0.0,
        traffic: float = 0.0,
        gradient: bool = False,
        steps: int = 0,
        whole: bool = False,
        part: Callable[[Result], Result] = lambda result: result,
    ) -> None:
        """Checks every contestant, times those that are right, and shows the case as one line.

        Args:
            ours: by the name of the backend; one that cannot run the call is listed, and so is a stock one.
            stock: what a user of PyTorch could write; the first is also the measure of our largest error.
            exact: the result in float64.
            flops, traffic: what the mathematics needs, in operations and bytes.
            gradient, steps: as in `bigmodel_kernels.testing`.
            whole: a whole model, held to `check_whole_model` in place of the rule for one op.
            part: what of a result is compared with `exact`.
        """
        if self.only not in (None, case):
            return
        if self.profiled is not None:
            self._profile(case, self.profiled, (ours | stock)[self.profiled])
            return
        results, missing, wrong = {}, {}, {}
        for name, function in (stock | ours).items():
            try:
                results[name] = tensors(part(function()))
                self.synchronize()
            except Exception as error:  # a peer may refuse a call in any way; what ours must not do is told apart below
                missing[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
                if name in ours and "cannot run this call" not in str(error) and "has no kernel" not in str(error):
                    wrong[name] = missing.pop(name)
        truth = tensors(exact)
        baseline = results.get(next(iter(stock)))
        for name in results:
            if (
                why := self._error(results[name], truth, baseline, name in ours, dtype, gradient, steps, whole)
            ) is not None:
                wrong[name] = why
        del results
        self.failures += [f"{case}: {name}: {wrong[name]}" for name in wrong if name in ours]
        extras = {key: value for key, value in (("missing", missing), ("wrong", wrong)) if value}
        good = {name: f for name, f in (ours | stock).items() if name not in missing and name not in wrong}
        mine, rivals = [n for n in ours if n in good], [n for n in stock if n in good]
        if not mine or not rivals:
            show(case=case, not_measured="ours" if not mine else "stock", **extras)
            return
        for function in good.values():
            function()
        samples = self.interleaved(good)
        medians = {name: statistics.median(times) for name, times in samples.items()}
        first, best = min(mine, key=medians.get), min(rivals, key=medians.get)
        ratio = Ratio.of([b / a for a, b in zip(samples[first], samples[best])])
        seconds = medians[first] / 1e6
        floor = max(flops / self.peak(dtype), traffic / self.bandwidth)
        show(
            case=case,
            ours=first,
            ratio=ratio.median,
            low=ratio.low,
            high=ratio.high,
            best=best,
            **({"auto_ratio": medians[best] / medians["auto"]} if "auto" in mine else {}),
            wall_ratio=self.wall(good[best]) / self.wall(good[first]),
            teraflops=flops / seconds / 1e12,
            gigabytes_per_second=traffic / seconds / 1e9,
            of_ceiling=floor / seconds,
            us={name: round(value, 2) for name, value in medians.items()},
            **extras,
        )

    def _profile(self, case: str, name: str, function: Callable[[], object]) -> None:
        """The kernels of one call with their times, by torch.profiler; then a call that an outer profiler such as ncu sees."""
        for _ in range(3):
            function()
        self.synchronize()
        activity = torch.profiler.ProfilerActivity.CPU if self.dry else torch.profiler.ProfilerActivity.CUDA
        with torch.profiler.profile(activities=[activity]) as recorded:
            function()
            self.synchronize()
        on_device = [e for e in recorded.key_averages() if self.dry or e.device_type == torch.autograd.DeviceType.CUDA]
        took = {e.key: e.self_cpu_time_total if self.dry else e.self_device_time_total for e in on_device}
        calls = {e.key: e.count for e in on_device}
        kernels = [
            {"kernel": key[:120], "us": round(took[key], 2), "calls": calls[key]}
            for key in sorted(took, key=took.get, reverse=True)[:KERNELS_SHOWN]
        ]
        show(profiled=case, contestant=name, device_us=round(sum(took.values()), 2), kernels=kernels)
        if not self.dry:
            torch.cuda.profiler.start()
            function()
            self.synchronize()
            torch.cuda.profiler.stop()

    def _error(self, results, truth, baseline, ours, dtype, gradient, steps, whole) -> str | None:
        """What is wrong with the results; None where nothing is."""
        if len(results) != len(truth):
            return f"{len(results)} results instead of {len(truth)}"
        for i, (found, exact) in enumerate(zip(results, truth)):
            stock = None if baseline is None else baseline[i]
            if not ours:
                limit = SAME_COMPUTATION[dtype] * (4 if gradient or whole else 1)
                error = relative_l2(found, exact) if found.shape == exact.shape else float("inf")
                if not error <= limit:
                    return f"result {i}: relative L2 error {error:.2e} above {limit:.2e}"
                continue
            if whole and stock is not None:
                report = check_whole_model(found, exact, stock, dtype=dtype, name=f"result {i}")
            else:
                report = check_error(
                    found, exact, stock, dtype=dtype, gradient=gradient, steps=steps, magnitude=1e-3, name=f"result {i}"
                )
            if not report.ok:
                return report.message
        return None
