"""python -m bigmodel_kernels tune --cpu: on a CPU with AMX, whether the kernels or PyTorch are faster in bfloat16.

Both multiply in tiles there. A family is measured forward and backward, in rounds of both; `auto` then takes the faster one of
attention and of the LSTM, as this file's results in the folder of _tuned.py tell. Results that break the error rule end it.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

import bigmodel_kernels as bmk
from bigmodel_kernels import _cpu, _tuned
from bigmodel_kernels._extension import build_info
from bigmodel_kernels.testing import check_error

ROUNDS, QUICK_ROUNDS = 30, 3
LEAST_GAIN = 1.02  # times are scattered by a percent or two
ATTENTION = [(1, 8, 1024, 64), (8, 8, 128, 64), (2, 8, 512, 128)]  # B, H, S, D; causal or not
LSTM = [(50, 32, 512, 512), (100, 32, 256, 256), (8, 16, 256, 256)]  # T, B, I, H

Run = Callable[[str, torch.dtype], list[Tensor]]  # (backend, dtype) -> the result and its gradients


def _gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    upstream = _numbers(*out.shape, seed=9).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


def _numbers(*shape: int, scale: float = 1.0, seed: int) -> Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).bfloat16()


def attention_case(batch: int, heads: int, length: int, depth: int, causal: bool) -> Run:
    tensors = [_numbers(batch, heads, length, depth, seed=seed) for seed in range(3)]

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        inputs = [t.to(dtype).requires_grad_() for t in tensors]
        return _gradients(bmk.attention(*inputs, is_causal=causal, backend=backend), inputs)

    return run


def lstm_case(steps: int, batch: int, inputs: int, hidden: int) -> Run:
    shapes = [(4 * hidden, inputs), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,)]
    tensors = [_numbers(steps, batch, inputs, seed=0)]
    tensors += [_numbers(*shape, scale=hidden**-0.5, seed=seed) for seed, shape in enumerate(shapes, 1)]

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        x, *weights = wanted = [t.to(dtype).requires_grad_() for t in tensors]
        return _gradients(bmk.lstm(x, None, weights, backend=backend)[0], wanted)

    return run


def families(quick: bool) -> dict[str, list[Run]]:
    some = slice(1, 2) if quick else slice(None)
    attention = [attention_case(*size, causal) for size in ATTENTION[some] for causal in (False, True)]
    return {"attention": attention, "lstm": [lstm_case(*size) for size in (LSTM[2:] if quick else LSTM)]}


def check(run: Run) -> None:
    results = zip(run("cpu", torch.bfloat16), run("torch", torch.float64), strict=True)
    for i, (result, exact) in enumerate(results):
        report = check_error(result, exact, None, dtype=torch.bfloat16, gradient=i > 0, name=f"result {i}")
        if not report.ok:
            raise RuntimeError(f"the kernels are not right on this CPU, please report it: {report.message}")


def times_as_fast(run: Run, rounds: int) -> float:
    """The kernels against PyTorch: the median of the ratios of `rounds` rounds."""
    ratios = []
    for i in range(rounds + 1):
        seconds = {}
        for backend in ("cpu", "torch") if i % 2 else ("torch", "cpu"):
            start = time.perf_counter()
            run(backend, torch.bfloat16)
            seconds[backend] = time.perf_counter() - start
        ratios.append(seconds["torch"] / seconds["cpu"])
    return statistics.median(ratios[1:])  # the first is a warm-up


def run(quick: bool) -> int:
    """The command; its exit status."""
    info = build_info()
    if info.get("isa") not in _cpu.TILED:
        print(f"tune --cpu needs a CPU with AMX: {info.get('amx', info['bindings'])}", file=sys.stderr)
        return 2
    rows = {}
    for family, cases in families(quick).items():
        for case in cases:
            check(case)
        ratios = [times_as_fast(case, QUICK_ROUNDS if quick else ROUNDS) for case in cases]
        mean = math.prod(ratios) ** (1 / len(ratios))
        rows[family] = {"constants": {"ours": int(mean >= LEAST_GAIN)}, "times_as_fast": ratios}
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        chosen = "cpu" if mean >= LEAST_GAIN else "torch"
        print(f"{family}: {mean:.2f} times as fast as PyTorch's ({each}); auto takes {chosen}")
    print(f"kept in {_tuned.save(_cpu.tiles_key(), rows)}")
    return 0
