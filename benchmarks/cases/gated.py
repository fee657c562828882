"""WaveNet's layer, whole and one step at a time, against the ways to write it in stock PyTorch. Part of the group `conv`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigmodel_kernels as bmk
from benchmarks.cases import Case, Problem
from benchmarks.contestant import FWD, PASSES, TRAIN, Contestant

CHANNELS, LENGTH, KERNEL, DILATION = 64, 16000, 2, 4
REACH = DILATION * (KERNEL - 1)


class Stock(nn.Module):
    """Three nn.Conv1d, on [N, C, T] as PyTorch lays it out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(CHANNELS, 2 * CHANNELS, KERNEL, dilation=DILATION)
        self.out, self.skip = nn.Conv1d(CHANNELS, CHANNELS, 1), nn.Conv1d(CHANNELS, CHANNELS, 1)

    def layer(self, x: Tensor) -> tuple[Tensor, Tensor]:  # [N, C, T]
        first, second = self.conv(F.pad(x, (REACH, 0))).chunk(2, 1)
        a = torch.tanh(first) * torch.sigmoid(second)
        return x + self.out(a), self.skip(a)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        out, skip = self.layer(x)
        return out + skip if torch.is_grad_enabled() else (out, skip)  # a training step goes through both


class ChannelsLast(Stock):
    """The rewrite as 2-d convolutions of height 1, whose channels_last layout oneDNN takes without reordering."""

    def layer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.unsqueeze(2)
        weights = [m.weight.unsqueeze(2).contiguous(memory_format=torch.channels_last) for m in self.children()]
        biases = [m.bias for m in self.children()]
        z = F.conv2d(F.pad(x, (REACH, 0)), weights[0], biases[0], dilation=(1, DILATION))
        first, second = z.chunk(2, 1)
        a = torch.tanh(first) * torch.sigmoid(second)
        out, skip = (F.conv2d(a, w, b) for w, b in zip(weights[1:], biases[1:]))
        return (x + out).squeeze(2), skip.squeeze(2)


class Products(Stock):
    """The rewrite as matrix products on [N, T, C]: the taps side by side, one linear layer, two more for the outputs."""

    def layer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.mT
        delayed = F.pad(x[:, :-REACH], (0, 0, REACH, 0))
        weight = self.conv.weight.transpose(1, 2).flatten(1)
        first, second = F.linear(torch.cat([delayed, x], 2), weight, self.conv.bias).chunk(2, 2)
        a = torch.tanh(first) * torch.sigmoid(second)
        out, skip = (F.linear(a, m.weight.squeeze(2), m.bias) for m in (self.out, self.skip))
        return (x + out).mT, skip.mT


class Ours(bmk.nn.WaveNetLayer):
    def __init__(self) -> None:
        super().__init__(CHANNELS, kernel_size=KERNEL, dilation=DILATION)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        out, skip = super().forward(x)
        return out + skip if torch.is_grad_enabled() else (out, skip)


class OursStep(Ours):
    def forward(self, x_t: Tensor, ring: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        return self.step(x_t, bmk.ConvState(ring, position))[:2]


class Again(Stock):
    """One step by the whole receptive field."""

    def forward(self, x_t: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:  # [N, C], [N, C, REACH]
        out, skip = self.layer(torch.cat([past, x_t.unsqueeze(2)], 2))
        return out[..., -1], skip[..., -1]


class Cached(Stock):
    """One step on a cached buffer of the inputs so far, moved on in place."""

    def forward(self, x_t: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:  # [N, C], [N, C, REACH]
        window = torch.cat([past, x_t.unsqueeze(2)], 2)
        past.copy_(window[..., 1:])
        first, second = F.linear(window[..., ::DILATION].flatten(1), self.conv.weight.flatten(1), self.conv.bias).chunk(
            2, 1
        )
        a = torch.tanh(first) * torch.sigmoid(second)
        out, skip = (F.linear(a, m.weight.squeeze(2), m.bias) for m in (self.out, self.skip))
        return x_t + out, skip


FLOPS = 2.0 * (2 * CHANNELS * CHANNELS * KERNEL + 2 * CHANNELS * CHANNELS)  # of one step


def _alike(dtype, *kinds) -> list[nn.Module]:
    """One module of each kind, all with the same weights."""
    modules = [kind() for kind in kinds]
    for module in modules[1:]:
        module.load_state_dict(modules[0].state_dict())
    return [module.to(dtype) for module in modules]


def build_layer(dtype, pass_) -> Problem:
    """Every contestant gets the layout that it is fastest in."""
    stock, last, products, ours = _alike(dtype, Stock, ChannelsLast, Products, Ours)
    x = torch.randn(1, CHANNELS, LENGTH).to(dtype)
    innermost = x.mT.contiguous().mT
    plain, inner = ((t.requires_grad_(pass_ == TRAIN),) for t in (x, innermost))
    return Problem(
        ours=Contestant("ours", ours, inner),
        stock=[
            Contestant("eager", stock, plain),
            Contestant("channels_last", last, inner),
            Contestant("products", products, inner),
        ],
        flops=FLOPS * LENGTH,
        compile=["eager", "channels_last", "products"],
    )


def build_step(dtype, pass_) -> Problem:
    """All past inputs are those of the step, so that every step has the same result, whoever has done how many."""
    again, cached, ours = _alike(dtype, Again, Cached, OursStep)
    x = torch.randn(1, CHANNELS).to(dtype)
    past = x.unsqueeze(2).repeat(1, 1, REACH)
    position = torch.zeros(1, dtype=torch.int64)
    return Problem(
        ours=Contestant("ours", ours, (x, past.mT.contiguous(), position)),
        stock=[Contestant("receptive field", again, (x, past)), Contestant("cached", cached, (x, past.clone()))],
        flops=FLOPS,
        compile=["cached"],
    )


BOTH = ("fp32", "bf16")
NAME = f"WaveNet layer {CHANNELS} k{KERNEL} d{DILATION}"
CASES = [
    Case("conv", f"{NAME} T{LENGTH} B1", build_layer, PASSES, BOTH),
    Case("conv", f"{NAME} step B1", build_step, (FWD,), BOTH),
]
