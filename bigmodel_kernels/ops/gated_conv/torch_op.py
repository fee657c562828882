"""The layer of PyTorch's convolutions: `call` with their own autograd; `fwd` and `bwd` are the pair of operators for compiled
graphs, whose backend is chosen only when they run."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bigmodel_kernels.ops.gated_conv import layout


def supports(*args) -> str | None:
    return None


def _padded(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    return F.pad(x, (dilation * (weight.shape[2] - 1), 0))


def _causal(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    return F.conv1d(_padded(x, weight, dilation), weight, bias, dilation=dilation)


def call(x, weight, bias, out_weight, out_bias, skip_weight, skip_bias, skip, dilation, save=False):
    first, second = _causal(x, weight, bias, dilation).chunk(2, 1)
    a = first.tanh() * second.sigmoid()
    out = x.new_empty(0) if out_weight is None else x + F.conv1d(a, out_weight, out_bias)
    if skip_weight is None:
        return out, x.new_empty(0)
    total = F.conv1d(a, skip_weight, skip_bias)
    return out, total if skip is None else skip + total


def fwd(x, weight, *rest):
    results = (t if t.dim() == 1 else layout.like(t, x) for t in call(x, weight, *rest))
    return *results, layout.no_gates(x, weight, rest[-1])


def _gradients(d, x, weight, bias, dilation, need_x, need_weights):
    source = _padded(x, weight, dilation)
    wanted = [need_x, need_weights, need_weights and bias is not None]
    found = torch.ops.aten.convolution_backward(
        d, source, weight, [weight.shape[0]], [1], [0], [dilation], False, [0], 1, wanted
    )
    d_x, *of_weights = (g if want else x.new_empty(0) for g, want in zip(found, wanted))
    return d_x[..., source.shape[2] - x.shape[2] :] if need_x else d_x, *of_weights


def bwd(
    d_out, d_skip, gates, need_x, need_weights,
    x, weight, bias, out_weight, out_bias, skip_weight, skip_bias, skip, dilation, save,
):  # fmt: skip
    first, second = _causal(x, weight, bias, dilation).chunk(2, 1)
    t, s = first.tanh(), second.sigmoid()
    d_a, mixed = torch.zeros_like(t), []
    for d, w, b in ((d_out, out_weight, out_bias), (d_skip, skip_weight, skip_bias)):
        if d is None:
            mixed += [x.new_empty(0) if p is None or not need_weights else torch.zeros_like(p) for p in (w, b)]
            continue
        part, *of_weights = _gradients(d, t * s, w, b, 1, True, need_weights)
        d_a = d_a + part
        mixed += of_weights
    d_z = torch.cat([d_a * s * (1 - t * t), d_a * t * s * (1 - s)], 1)
    d_x, *of_weights = _gradients(d_z, x, weight, bias, dilation, need_x, need_weights)
    if need_x:
        d_x = layout.like(d_x if d_out is None else d_x + d_out, x)
    return d_x, *of_weights, *mixed
