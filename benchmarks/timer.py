"""Interleaved timing: every round times each contestant once, in an order shuffled per round.

An absolute time on a shared CPU drifts by tens of percent within seconds; the ratio of two times taken within the same
few milliseconds does not. So the figures that count are ratios formed round by round: their median and 10-90 % band.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

MIN_ROUNDS = 30
MIN_SAMPLE_NS = 1_000_000  # a sample is a loop of calls at least this long: timer and loop overhead stay below 0.1 %
WARMUP_NS = 20_000_000
TRIAL_ROUNDS = 3
TRIAL_MARGIN = 1.6  # a rival this much slower than the best rival in the trial rounds cannot be the best stock option


@dataclass(frozen=True)
class Ratio:
    """Median of per-round ratios and the band that holds 80 % of the rounds. Above 1: ours is faster."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Ratio":
        return cls(statistics.median(values), quantile(values, 0.1), quantile(values, 0.9))


@dataclass(frozen=True)
class Timing:
    """Per-call times in ns, one per round and contestant; `trials` are those of the contestants that left early."""

    samples: dict[str, list[float]]
    trials: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.samples.get(name) or self.trials[name])

    def ratio(self, rival: str, ours: str) -> Ratio:
        return Ratio.of([r / o for r, o in zip(self.samples[rival], self.samples[ours], strict=True)])

    def best(self, names: list[str]) -> str:
        return min((n for n in names if n in self.samples), key=self.median)


def quantile(values: list[float], q: float) -> float:
    """Linear interpolation between the order statistics."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


@contextmanager
def quiet_collector():
    """No garbage collection inside a sample: one pass of the collector is longer than many of the calls measured."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def sample(function: Callable[[], object], calls: int, clock: Callable[[], int] = time.perf_counter_ns) -> float:
    """ns per call, over `calls` calls."""
    start = clock()
    for _ in range(calls):
        function()
    return (clock() - start) / calls


def calls_per_sample(function: Callable[[], object], clock: Callable[[], int] = time.perf_counter_ns) -> int:
    """Warms `function` up and returns how many calls make a sample of at least MIN_SAMPLE_NS."""
    function()
    fastest, start = float("inf"), clock()
    while True:
        fastest = min(fastest, sample(function, 1, clock))
        if clock() - start >= WARMUP_NS:
            return max(1, -(-MIN_SAMPLE_NS // max(1, int(fastest))))


def measure(
    ours: tuple[str, Callable[[], object]],
    rivals: dict[str, Callable[[], object]],
    *,
    rounds: int = MIN_ROUNDS,
    seed: int = 0,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> Timing:
    """Times `ours` and the rivals in interleaved rounds; rivals that the trial rounds rule out leave."""
    functions = {ours[0]: ours[1], **rivals}
    if len(functions) != 1 + len(rivals):
        raise ValueError(f"a rival has the name of ours, {ours[0]!r}")
    order = random.Random(seed)
    with quiet_collector():
        calls = {name: calls_per_sample(function, clock) for name, function in functions.items()}

        def play(count: int, names: list[str]) -> dict[str, list[float]]:
            samples: dict[str, list[float]] = {name: [] for name in names}
            for _ in range(count):
                order.shuffle(names)
                for name in names:
                    samples[name].append(sample(functions[name], calls[name], clock))
            return samples

        trials = play(TRIAL_ROUNDS, list(functions))
        fastest = {name: min(times) for name, times in trials.items()}
        limit = TRIAL_MARGIN * min(fastest[name] for name in rivals)
        kept = [ours[0], *(name for name in rivals if fastest[name] <= limit)]
        return Timing(samples=play(rounds, kept), trials=trials)
