"""The layer of PyTorch's convolutions: `call` with their own autograd; `fwd` and `bwd` are the pair of operators for compiled
graphs, whose backend is chosen only when they run."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from bigmodel_kernels.ops.gated_conv import composed, layout


def supports(*args) -> str | None:
    return None


def _padded(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    return F.pad(x, (dilation * (weight.shape[2] - 1), 0))


def _causal(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    return F.conv1d(_padded(x, weight, dilation), weight, bias, dilation=dilation)


def call(x, weight, bias, out_weight, out_bias, skip_weight, skip_bias, skip, dilation):
    first, second = _causal(x, weight, bias, dilation).chunk(2, 1)
    a = first.tanh() * second.sigmoid()
    out = x.new_empty(0) if out_weight is None else x + F.conv1d(a, out_weight, out_bias)
    if skip_weight is None:
        return out, x.new_empty(0)
    total = F.conv1d(a, skip_weight, skip_bias)
    return out, total if skip is None else skip + total


def fwd(x, *rest):
    return tuple(t if t.dim() == 1 else layout.like(t, x) for t in call(x, *rest))


def _gradients(d, x, weight, bias, dilation, need_x, need_weights):
    source = _padded(x, weight, dilation)
    wanted = [need_x, need_weights, need_weights and bias is not None]
    found = torch.ops.aten.convolution_backward(
        d, source, weight, [weight.shape[0]], [1], [0], [dilation], False, [0], 1, wanted
    )
    d_x, *of_weights = (g if want else x.new_empty(0) for g, want in zip(found, wanted))
    return d_x[..., source.shape[2] - x.shape[2] :] if need_x else d_x, *of_weights


bwd = functools.partial(composed.bwd, _causal, _gradients)
