"""Convolutions and what follows them, against cuDNN in both layouts with benchmark mode, its fused calls, and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bigmodel_kernels as bmk
from benchmarks.gpu_bench import Bench, Contestants, gradients

BACKENDS = ("auto", "cuda", "triton")


@dataclass(frozen=True)
class Conv:
    """One layer: `tail` names what follows the convolution, `options` are those of bmk.conv."""

    name: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    tail: str = ""  # of: norm residual relu gate pool
    options: dict[str, Any] = field(default_factory=dict)
    autotune: bool = False  # torch.compile's max-autotune as well, which takes a minute


CASES = [
    Conv("3x3", (32, 64, 56, 56), (64, 64, 3, 3), "norm residual relu", {"padding": 1}, autotune=True),
    Conv("1x1", (32, 256, 56, 56), (64, 256, 1, 1), "norm relu"),
    Conv("stem+pool", (64, 3, 224, 224), (64, 3, 7, 7), "norm relu pool", {"stride": 2, "padding": 3}, autotune=True),
    Conv("small CNN", (256, 3, 32, 32), (16, 3, 5, 5), "relu pool", {"padding": 2}),
    Conv("depthwise 3x3", (32, 256, 56, 56), (256, 1, 3, 3), "", {"padding": 1, "groups": 256}),
    Conv("depthwise 7x7", (32, 96, 56, 56), (96, 1, 7, 7), "", {"padding": 3, "groups": 96}),
    Conv(
        "depthwise causal K4", (8, 2048, 4096), (2048, 1, 4), "", {"padding": "causal", "groups": 2048}, autotune=True
    ),
    Conv("gated WaveNet", (8, 64, 16000), (128, 64, 2), "gate", {"padding": "causal", "dilation": 64}, autotune=True),
    Conv("transposed 4x4", (64, 128, 32, 32), (128, 64, 4, 4), "relu", {"stride": 2, "padding": 1, "transposed": True}),
    Conv("3x3 deep", (32, 512, 7, 7), (512, 512, 3, 3), "norm relu", {"padding": 1}),
]
DRY = [
    Conv("3x3", (2, 4, 9, 9), (6, 4, 3, 3), "norm residual relu", {"padding": 1}),
    Conv("stem+pool", (2, 3, 17, 17), (4, 3, 7, 7), "norm relu pool", {"stride": 2, "padding": 3}),
    Conv("depthwise causal K4", (2, 4, 20), (4, 1, 4), "", {"padding": "causal", "groups": 4}),
    Conv("gated WaveNet", (2, 4, 20), (8, 4, 2), "gate", {"padding": "causal", "dilation": 4}),
    Conv("transposed 4x4", (2, 4, 5, 5), (4, 3, 4, 4), "relu", {"stride": 2, "padding": 1, "transposed": True}),
]
POOL = ("max", 3, 2, 1)


def measure(bench: Bench) -> None:
    torch.backends.cudnn.benchmark = True  # for every stock contestant: cuDNN tries its algorithms once per shape
    for case in bench.pick(CASES, DRY):
        for training in (False, True):
            _case(bench, case, bench.dtypes[0], training)


def _case(bench: Bench, case: Conv, dtype: torch.dtype, training: bool) -> None:
    torch.manual_seed(0)
    transposed = case.options.get("transposed", False)
    channels = case.weight[1] if transposed else case.weight[0]
    taps = case.weight[0 if transposed else 1] * torch.Size(case.weight[2:]).numel()
    grid = 1 / 8  # sums before a ReLU or a maximum are exact, so that all jump at the same places
    x = _on_grid(bench.draw(*case.x, dtype=torch.float32), grid).to(dtype)
    weight = _on_grid(bench.draw(*case.weight, dtype=torch.float32), grid).to(dtype)
    bias = _on_grid(bench.draw(channels, dtype=torch.float32), grid).to(dtype)
    scale, shift = (torch.full((channels,), value, device=bench.device, dtype=dtype) for value in (0.5, 0.25))
    plain = _plain(case, {"x": x, "weight": weight, "bias": bias, "scale": scale, "shift": shift, "residual": None})
    residual = None
    if "residual" in case.tail:
        with torch.no_grad():
            residual = _on_grid(bench.draw(*plain().shape, dtype=torch.float32), grid).to(dtype)
    values = {"x": x, "weight": weight, "bias": bias, "scale": scale, "shift": shift, "residual": residual}
    leaves = ("x", "weight", "bias")

    def stored(last: bool) -> dict[str, Tensor | None]:
        """Fresh leaves in one layout or the other; only images have two."""

        def put(t: Tensor | None) -> Tensor | None:
            if t is None or not t.is_floating_point():
                return t
            last_here = last and t.dim() == 4
            return t.detach().clone(memory_format=torch.channels_last if last_here else torch.contiguous_format)

        found = {name: put(t) for name, t in values.items()}
        for name in leaves:
            found[name].requires_grad_(training)
        return found

    layouts = {"": stored(False)} | ({" channels_last": stored(True)} if x.dim() == 4 else {})
    ours: dict[str, tuple[Callable, dict]] = {}
    stock: dict[str, tuple[Callable, dict]] = {}
    for suffix, held in layouts.items():
        stock["eager" + suffix] = (_plain(case, held), held)
        for backend in BACKENDS:
            ours[backend + suffix] = (_ours(case, held, backend), held)
    suffix, held = list(layouts.items())[-1]  # inductor and cuDNN's fused calls are at their best in channels_last
    stock["compile" + suffix] = (bench.compiled(_plain(case, held)), held)
    if case.autotune and not training:
        stock["max-autotune" + suffix] = (bench.compiled(_plain(case, held), "max-autotune-no-cudagraphs"), held)
    if not training and "relu" in case.tail and "pool" not in case.tail and not transposed:
        stock["cuDNN fused" + suffix] = (_cudnn_fused(case, held), held)
    doubles = {name: t if t is None else t.detach().double() for name, t in values.items()}
    for name in leaves:
        doubles[name].requires_grad_(training)
    exact = _plain(case, doubles)
    outputs = exact().shape
    name = f"conv {str(dtype)[6:]} {case.name} {list(case.x)}"
    positions = torch.Size(case.x[2:]).numel() if transposed else _positions(case, plain)
    per_position = taps if not transposed else case.weight[0] * case.weight[1] * torch.Size(case.weight[2:]).numel()
    flops = 2.0 * case.x[0] * positions * (per_position if transposed else channels * taps)
    traffic = x.element_size() * float(x.numel() + weight.numel() + outputs.numel())
    if not training:
        with torch.no_grad():
            bench.compare(
                f"{name} fwd",
                {n: f for n, (f, _) in ours.items()}, {n: f for n, (f, _) in stock.items()}, exact(),
                dtype=dtype, flops=flops, traffic=traffic,
            )  # fmt: skip
        return
    upstream = bench.draw(*outputs, dtype=dtype)
    truth = gradients(exact, [doubles[n] for n in leaves], upstream.double())()

    def trained(contestants: dict[str, tuple[Callable, dict]]) -> Contestants:
        return {n: gradients(f, [held[leaf] for leaf in leaves], upstream) for n, (f, held) in contestants.items()}

    bench.compare(
        f"{name} fwd+bwd", trained(ours), trained(stock), truth,
        dtype=dtype, flops=3 * flops, traffic=3 * traffic, gradient=True,
    )  # fmt: skip


def _on_grid(t: Tensor, step: float) -> Tensor:
    return (t.clamp(-2, 2) / step).round() * step


def _positions(case: Conv, plain: Callable[[], Tensor]) -> int:
    """Positions of the convolution's own output, before a pool."""
    with torch.no_grad():
        return _convolution(case, plain.values["x"][:1], plain.values["weight"], None).shape[2:].numel()


def _convolution(case: Conv, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    options = dict(case.options)
    if options.pop("transposed", False):
        return F.conv_transpose2d(x, weight, bias, **options)
    if options.get("padding") == "causal":
        reach = options.get("dilation", 1) * (weight.shape[2] - 1)
        return F.conv1d(F.pad(x, (reach, 0)), weight, bias, **{**options, "padding": 0})
    return (F.conv1d if x.dim() == 3 else F.conv2d)(x, weight, bias, **options)


class _plain:
    """The layer as one writes it with torch.nn.functional."""

    def __init__(self, case: Conv, values: dict[str, Tensor | None]) -> None:
        self.case, self.values = case, values

    def __call__(self) -> Tensor:
        v = self.values
        y = _convolution(self.case, v["x"], v["weight"], v["bias"])
        if "norm" in self.case.tail:
            per_channel = (-1, *[1] * (y.dim() - 2))
            y = y * v["scale"].view(per_channel) + v["shift"].view(per_channel)
        y = y if v["residual"] is None else y + v["residual"]
        if "gate" in self.case.tail:
            first, second = y.chunk(2, 1)
            return first.tanh() * second.sigmoid()
        y = F.relu(y) if "relu" in self.case.tail else y
        return F.max_pool2d(y, *POOL[1:]) if "pool" in self.case.tail else y


def _ours(case: Conv, v: dict[str, Tensor | None], backend: str) -> Callable[[], Tensor]:
    norm = "norm" in case.tail
    activation = "tanh_sigmoid" if "gate" in case.tail else "relu" if "relu" in case.tail else None
    return lambda: bmk.conv(
        v["x"], v["weight"], v["bias"], **case.options, scale=v["scale"] if norm else None,
        shift=v["shift"] if norm else None, residual=v["residual"], activation=activation,
        pool=POOL if "pool" in case.tail else None, backend=backend,
    )  # fmt: skip


def _cudnn_fused(case: Conv, v: dict[str, Tensor | None]) -> Callable[[], Tensor]:
    """cuDNN's convolution + bias (+ residual) + ReLU in one call, with the norm folded into the weights beforehand."""
    weight, bias = v["weight"].detach(), v["bias"].detach()
    if "norm" in case.tail:
        folded = weight * v["scale"].view(-1, *[1] * (weight.dim() - 1))
        weight, bias = folded.contiguous(memory_format=torch.channels_last), bias * v["scale"] + v["shift"]
    axes = weight.dim() - 2
    sizes = [[case.options.get(key, value)] * axes for key, value in (("stride", 1), ("padding", 0), ("dilation", 1))]
    groups = case.options.get("groups", 1)
    if v["residual"] is None:
        return lambda: torch.cudnn_convolution_relu(v["x"], weight, bias, *sizes, groups)
    return lambda: torch.cudnn_convolution_add_relu(v["x"], weight, v["residual"], 1.0, bias, *sizes, groups)
