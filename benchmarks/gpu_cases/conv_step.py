"""One step of WaveNet's layer, against a cached buffer in PyTorch, compiled too, each launched by itself and by a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import bigmodel_kernels as bmk
from benchmarks.gpu_bench import Bench, Result

BACKENDS = ("auto", "cuda", "triton")
KERNEL, DILATION = 2, 64
CASES = [(1, 64), (8, 64), (1, 128), (1, 256), (8, 256), (1, 512)]  # sequences, channels
DRY = [(2, 8)]


def measure(bench: Bench) -> None:
    for batch, channels in bench.pick(CASES, DRY):
        with torch.no_grad():
            _case(bench, batch, channels, bench.dtypes[0])


def _case(bench: Bench, batch: int, channels: int, dtype: torch.dtype) -> None:
    """All past inputs are those of the step, so that every step has the same result, whoever has done how many."""
    torch.manual_seed(0)
    shapes = [(2 * channels, channels, KERNEL), (2 * channels,), (channels, channels, 1), (channels,)]
    shapes += [(channels, channels, 1), (channels,)]
    weights = [bench.draw(*s, dtype=dtype, scale=s[1] ** -0.5 if len(s) > 1 else 1.0) for s in shapes]
    x = bench.draw(batch, channels, dtype=dtype)

    def cached(dtype: torch.dtype) -> Callable[[], tuple[Tensor, Tensor]]:
        held, now = [w.to(dtype).flatten(1) if w.dim() > 1 else w.to(dtype) for w in weights], x.to(dtype)
        past = now.unsqueeze(2).repeat(1, 1, DILATION * (KERNEL - 1))

        def step() -> tuple[Tensor, Tensor]:
            window = torch.cat([past, now.unsqueeze(2)], 2)
            past.copy_(window[..., 1:])
            first, second = F.linear(window[..., ::DILATION].flatten(1), *held[:2]).chunk(2, 1)
            a = torch.tanh(first) * torch.sigmoid(second)
            return now + F.linear(a, *held[2:4]), F.linear(a, *held[4:])

        return step

    def ours(backend: str) -> Callable[[], tuple[Tensor, Tensor]]:
        state = bmk.ConvState.start(batch, channels, KERNEL, DILATION, x)
        state.ring.copy_(x.unsqueeze(1).expand_as(state.ring))
        options = {"dilation": DILATION, "activation": "tanh_sigmoid", "backend": backend}
        return lambda: bmk.conv_step(x, state, *weights, **options)[:2]

    contestants = {backend: ours(backend) for backend in BACKENDS}
    stock = {"cached": cached(dtype), "compile": bench.compiled(cached(dtype))}
    numbers = sum(w.numel() for w in weights)
    bench.compare(
        f"conv_step {str(dtype)[6:]} N{batch} C{channels} K{KERNEL}",
        contestants | {f"{name}+graph": _graphed(bench, f) for name, f in contestants.items()},
        stock | {"cached+graph": _graphed(bench, stock["cached"])},
        cached(torch.float64)(),
        dtype=dtype, flops=2.0 * batch * numbers, traffic=x.element_size() * float(numbers + 5 * x.numel()),
    )  # fmt: skip


def _graphed(bench: Bench, function: Callable[[], Result]) -> Callable[[], Result]:
    """The call replayed from a CUDA graph, which is captured when it is first called."""
    if bench.dry:
        return function
    captured: list = []

    def replay() -> Result:
        if not captured:
            function()  # what is set up on first use stays out of the graph
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results = function()
            captured.extend((graph, results))
        captured[0].replay()
        return captured[1]

    return replay
