"""python -m tests.cuda.random_cases FAMILY: random calls of a family, drawn from a seed, each held to the error rule on every
backend that takes it; the result is one JSON object. With --device cpu it runs the CPU's kernels, so that it is tested where
there is no GPU.

A case depends on family, seed and number alone. Several processes share the numbers, since most of the time goes into
compiling Triton's kernels.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bigmodel_kernels.testing import LAYOUTS, assert_matches, tf32
from tests.ops import attention_problem, conv_problem, test_lstm

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF)
ENOUGH = 3000  # numbers from which on the largest error of PyTorch's own result says something
SMOOTH_TAILS = ("bias", "sigmoid", "gate")  # in 16 bits a ReLU or a maximum may jump where float64 does not


@dataclass
class Outcome:
    """How many cases each backend ran, and what went wrong."""

    seed: int
    ran: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        cases = ", ".join(f"{backend}: {count}" for backend, count in sorted(self.ran.items())) or "no case"
        return f"seed {self.seed}; {cases}; {len(self.failures)} wrong" + "".join(
            f"\n  {f}" for f in self.failures[:20]
        )


def attention(rng: random.Random, dtype: torch.dtype, device: str) -> tuple[Any, Callable[[str], None]]:
    kv_heads = rng.randint(1, 3)
    length = rng.choice((1, 7, 64, 129))
    sizes = (
        rng.randint(1, 3), kv_heads * rng.randint(1, 3), kv_heads, rng.randint(1, length), rng.randint(1, 2 * length),
        *([rng.choice((8, 16, 24, 40, 64, 80, 128))] * 2),
    )  # fmt: skip
    flags, layout = rng.choice(tuple(attention_problem.FLAGS)), rng.choice(LAYOUTS)
    problem = attention_problem.Problem(sizes, flags, dtype, rng.randrange(1 << 20), layout)
    for name in ("q", "k", "v", "mask", "grad_out", "grad_lse"):
        if (t := getattr(problem, name)) is not None:
            setattr(problem, name, t if device == "cpu" else t.to(device))
    if (slopes := problem.options["alibi_slopes"]) is not None:
        problem.options["alibi_slopes"] = slopes.to(device)
    enough = min(problem.q.numel(), problem.k.numel()) >= ENOUGH
    return (sizes, flags, layout), lambda backend: problem.check(backend, baseline=enough)


def conv(rng: random.Random, dtype: torch.dtype, device: str) -> tuple[Any, Callable[[str], None]]:
    axes = rng.randint(1, 2)
    groups = rng.choice((1, 1, 1, 2, 0))  # 0: depthwise
    cin = rng.choice((1, 3, 4, 8, 16, 33, 64))
    cout = rng.choice((1, 4, 8, 24, 32, 65))
    if groups == 2:
        cin, cout = cin + cin % 2, cout + cout % 2
    elif groups == 0:
        groups, cout = cin, cin * rng.choice((1, 1, 2))
    options: dict[str, Any] = {"stride": rng.choice((1, 1, 2, 3)), "dilation": rng.choice((1, 1, 2)), "groups": groups}
    options["padding"] = rng.randint(0, 3)
    if rng.random() < 0.2:
        options["transposed"] = True
    elif axes == 1 and rng.random() < 0.3:
        options["padding"] = "causal"
    kernel = tuple(rng.choice((1, 2, 3, 4, 5, 7)) for _ in range(axes))
    size = tuple(rng.randint(8, 40 if axes == 2 else 200) for _ in range(axes))
    geometry = (rng.randint(1, 3), cin, cout, size, kernel, options)
    tails = SMOOTH_TAILS if dtype in HALF else tuple(conv_problem.TAILS | conv_problem.MORE_TAILS)
    tail = rng.choice(tails)
    conv_problem.GEOMETRIES["random"] = geometry
    try:
        problem = conv_problem.Problem("random", tail, dtype, rng.randrange(1 << 10))
    finally:
        del conv_problem.GEOMETRIES["random"]
    last = axes == 2 and rng.random() < 0.5
    problem.tensors = {k: None if t is None else t.to(device) for k, t in problem.tensors.items()}
    problem.grad = problem.grad.to(device)

    def layout(t: torch.Tensor) -> torch.Tensor:
        return t.contiguous(memory_format=torch.channels_last) if last and t.dim() == 4 else t

    def check(backend: str) -> None:
        found = problem.run(dtype, backend, layout=layout)
        exact, baseline = problem.run(torch.float64, "torch"), problem.run(dtype, "torch", layout=layout)
        for name, *results in zip(("out", *conv_problem.NAMES), found, exact, baseline):
            if results[0] is not None:
                assert_matches(
                    *results[:2], results[2] if results[0].numel() >= ENOUGH else None, dtype=dtype,
                    gradient=name != "out", magnitude=max(0.05, problem._magnitude(name)), name=name,
                )  # fmt: skip

    return (geometry, tail, "channels_last" if last else "contiguous"), check


def lstm(rng: random.Random, dtype: torch.dtype, device: str) -> tuple[Any, Callable[[str], None]]:
    sizes = (rng.randint(1, 20), rng.randint(1, 24), rng.randint(1, 40), rng.choice((4, 16, 24, 33, 64, 96)))
    variant = rng.choice(tuple(test_lstm.VARIANTS))
    problem = test_lstm.Problem(*sizes, **test_lstm.VARIANTS[variant], dtype=dtype, seed=rng.randrange(1 << 10))
    for name in ("x", "h0", "c0"):
        setattr(problem, name, getattr(problem, name).to(device))
    problem.weights = [w.to(device) for w in problem.weights]
    problem.upstream = [g.to(device) for g in problem.upstream]
    return (sizes, variant), lambda backend: test_lstm.check(problem, backend)


FAMILIES: dict[str, Callable] = {"attention": attention, "conv": conv, "lstm": lstm}


def run(
    family: str,
    numbers: range,
    *,
    seed: int,
    device: str,
    backends: tuple[str, ...],
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    seconds: float = float("inf"),
) -> Outcome:
    """Draws the cases of these numbers, as many as `seconds` allow, and runs each on every backend that takes it."""
    outcome, end = Outcome(seed), time.monotonic() + seconds
    for i in numbers:
        if time.monotonic() > end:
            break
        rng = random.Random(f"{family} {seed} {i}")
        dtype = rng.choice(dtypes)
        short = dtype == torch.float32 and rng.random() < 0.5
        try:
            what, check = FAMILIES[family](rng, dtype, device)
        except (RuntimeError, ValueError):  # sizes that do not go together: not a call
            outcome.ran["not a call"] += 1
            continue
        for backend in backends:
            try:
                with tf32(short):
                    check(backend)
            except (RuntimeError, AssertionError) as error:
                if "cannot run this call" in str(error):
                    continue
                if isinstance(error, RuntimeError) and "CUDA error" in str(error):
                    raise  # nothing more can run in this process
                kind = "tf32" if short else str(dtype)[6:]
                outcome.failures.append(f"{i} {backend} {kind} {what}: {str(error).splitlines()[0]}")
            outcome.ran[backend] += 1
    return outcome


def _part(family: str, numbers: range, options: dict[str, Any]) -> Outcome:
    torch.set_num_threads(1)
    return run(family, numbers, **options)


def run_in_parts(family: str, count: int, processes: int, **options: Any) -> Outcome:
    """`run` on `count` cases, dealt out to so many processes."""
    parts = [(family, range(first, count, processes), options) for first in range(processes)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        outcomes = pool.starmap(_part, parts, chunksize=1)
    whole = Outcome(options["seed"])
    for outcome in outcomes:
        whole.ran.update(outcome.ran)
        whole.failures += outcome.failures
    return whole


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cuda.random_cases", description=__doc__)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, help="of an earlier run; the clock's by default")
    parser.add_argument("--seconds", type=float, default=230, help="no case begins later than that")
    parser.add_argument("--processes", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    asked = parser.parse_args(argv)
    backends = ("cuda", "triton") if asked.device == "cuda" else ("cpu",)
    seed = time.time_ns() % (1 << 31) if asked.seed is None else asked.seed
    outcome = run_in_parts(
        asked.family, asked.cases, asked.processes, seed=seed, device=asked.device, backends=backends,
        seconds=asked.seconds,
    )  # fmt: skip
    for failure in outcome.failures:
        print(f"WRONG {failure}")
    ran = {backend: outcome.ran[backend] for backend in backends}
    print(
        json.dumps(
            {"family": asked.family, "seed": seed, "asked": asked.cases, **ran, "failures": len(outcome.failures)}
        )
    )
    return int(bool(outcome.failures) or not any(ran.values()))


if __name__ == "__main__":
    sys.exit(main())
