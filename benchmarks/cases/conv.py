"""Convolution layers with what follows them, against the same layers of torch.nn."""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigmodel_kernels as bmk
from benchmarks.baselines import channels_last
from benchmarks.cases import Case, Problem, gated, on_grid
from benchmarks.contestant import FWD, PASSES, TRAIN, Contestant

GRID = 1 / 256  # of weights; inputs lie on multiples of 1/8


class Fused(nn.Sequential):
    """A convolution, its frozen normalisation, ReLU and max-pool in one call, with the parameters of the stock
    nn.Sequential it is made from. What comes after those, it runs as it stands."""

    def __init__(self, stock: nn.Sequential) -> None:
        super().__init__(*copy.deepcopy(stock))
        rest = list(self)[1:]
        self.scale = self.shift = None
        self.activation = self.pool = None
        if rest and isinstance(rest[0], nn.BatchNorm2d):
            norm = rest.pop(0)
            scale = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).detach()
            self.scale, self.shift = scale, (norm.bias - norm.running_mean * scale).detach()
        if rest and isinstance(rest[0], nn.ReLU):
            rest.pop(0)
            self.activation = "relu"
        if rest and isinstance(rest[0], nn.MaxPool2d):
            pool = rest.pop(0)
            self.pool = ("max", pool.kernel_size, pool.stride, pool.padding)
        self.rest = rest[0] if rest else None

    def forward(self, x: Tensor) -> Tensor:
        conv = self[0]
        x = bmk.conv(
            x,
            conv.weight,
            conv.bias,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            transposed=conv.transposed,
            scale=self.scale,
            shift=self.shift,
            activation=self.activation,
            pool=self.pool,
        )
        return x if self.rest is None else self.rest(x)


class Causal(nn.Conv1d):
    """Output t sees inputs up to t: stock pads on the left, in a pass of its own."""

    def forward(self, x: Tensor) -> Tensor:  # [B, C, T]
        return super().forward(F.pad(x, (self.dilation[0] * (self.kernel_size[0] - 1), 0)))


class CausalProducts(nn.Conv1d):
    """The rewrite of a causal convolution of width 2: two matrix products on shifted views."""

    def forward(self, x: Tensor) -> Tensor:  # [B, C, T]
        shift = self.dilation[0]
        past, present = self.weight.unbind(-1)  # [Cout, Cin] each
        return present @ x + (past @ F.pad(x[..., :-shift], (shift, 0))) + self.bias[:, None]


def accelerated(stack: nn.Sequential) -> nn.Sequential:
    """What a user of this library has in the place of `stack`: for one layer the layer of the same name."""
    if len(stack) > 1:
        return Fused(stack)
    (layer,) = copy.deepcopy(stack)
    model = nn.Sequential(layer)
    report = bmk.optimize(model)
    assert report.replaced, report
    return model


def draw(shape, dtype, *, grid: bool, train: bool) -> Tensor:
    x = torch.randn(shape)
    return (on_grid(x, 1 / 8) if grid else x).to(dtype).requires_grad_(train)


def conv_flops(conv: nn.Module, inputs: Tensor, output: Tensor) -> float:
    """2 * Cin/groups * taps for every output (every input, if transposed) before any pooling."""
    taps = conv.weight[0, 0].numel()
    if conv.transposed:
        return 2.0 * inputs.numel() * taps * conv.out_channels / conv.groups
    return 2.0 * output.numel() * taps * conv.in_channels / conv.groups


def build(dtype, pass_, *, layers, shape, last=False) -> Problem:
    """last: ours too is given channels_last, as in a network that is kept in it."""
    stack = nn.Sequential(*layers())
    for module in stack:
        if isinstance(module, nn.BatchNorm2d):  # statistics of a trained network, not the identity of a new one
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    grid = len(stack) > 1
    if grid:
        for parameter in stack.parameters():
            on_grid(parameter, GRID)
    stack = stack.to(dtype)
    eager = Contestant("eager", stack, (draw(shape, dtype, grid=grid, train=pass_ == TRAIN),))
    with torch.no_grad():
        flops = conv_flops(stack[0], eager.inputs[0], stack[0](eager.inputs[0]))
    ours = Contestant("ours", accelerated(stack), eager.inputs)
    return Problem(
        ours=ours.converted("ours", memory_format=torch.channels_last) if last else ours,
        stock=[eager, channels_last(eager)],
        flops=flops,
        compile=["eager", "channels_last"],
    )


def build_causal(dtype, pass_, *, channels, length, dilation) -> Problem:
    arguments = (channels, channels, 2)
    eager = Causal(*arguments, dilation=dilation).to(dtype)
    twins = [kind(*arguments, dilation=dilation).to(dtype) for kind in (CausalProducts, bmk.nn.CausalConv1d)]
    for twin in twins:
        twin.load_state_dict(eager.state_dict())
    x = draw((1, channels, length), dtype, grid=False, train=pass_ == TRAIN)
    products, ours = twins
    return Problem(
        ours=Contestant("ours", ours, (x,)),
        stock=[Contestant("eager", eager, (x,)), Contestant("two products", products, (x,))],
        flops=2.0 * 2 * channels * channels * length,
        compile=["eager", "two products"],
    )


def case(name: str, shape, layers, *, passes=PASSES, dtypes=("fp32",), quick=False, last=False) -> Case:
    return Case("conv", name, partial(build, layers=layers, shape=shape, last=last), passes, dtypes, quick=quick)


CASES = [
    case(
        "3x3 1-32 28² B64 + ReLU + pool",
        (64, 1, 28, 28),
        lambda: [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)],
        quick=True,
    ),
    case(
        "3x3 32-64 14² B64 + ReLU + pool",
        (64, 32, 14, 14),
        lambda: [nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)],
    ),
    case("3x3 64-64 56² B4", (4, 64, 56, 56), lambda: [nn.Conv2d(64, 64, 3, padding=1)]),
    case(
        "stem 7x7/2 3-64 224² B1 + BN + ReLU + pool",
        (1, 3, 224, 224),
        lambda: [
            nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        ],
        passes=(FWD,),
        dtypes=("fp32", "bf16"),
        last=True,
    ),
    case("1x1 256-64 56² B1", (1, 256, 56, 56), lambda: [nn.Conv2d(256, 64, 1)], last=True),
    case(
        "depthwise 3x3 256 28² B8",
        (8, 256, 28, 28),
        lambda: [nn.Conv2d(256, 256, 3, padding=1, groups=256)],
        last=True,
    ),
    case(
        "depthwise 3x3 256 28² B8 + ReLU",
        (8, 256, 28, 28),
        lambda: [nn.Conv2d(256, 256, 3, padding=1, groups=256), nn.ReLU()],
        last=True,
    ),
    case(
        "depthwise 7x7 96 56² B4 + ReLU",
        (4, 96, 56, 56),
        lambda: [nn.Conv2d(96, 96, 7, padding=3, groups=96), nn.ReLU()],
        last=True,
    ),
    Case("conv", "causal 1d k2 d4 64 T16000 B1", partial(build_causal, channels=64, length=16000, dilation=4)),
    case(
        "transposed 4x4/2 128-64 16² B16 + ReLU",
        (16, 128, 16, 16),
        lambda: [nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1), nn.ReLU()],
        last=True,
    ),
    *gated.CASES,
]
