"""The C++ kernels of csrc/cpu/gated_conv*.h."""

from __future__ import annotations

import torch
from torch import Tensor

from bigmodel_kernels import _cpu
from bigmodel_kernels.ops.gated_conv import layout


def supports(x, weight, bias, out_weight, out_bias, skip_weight, *rest) -> str | None:
    if (why := _cpu.reason(x)) is not None:
        return why
    if 0 in weight.shape or (skip_weight is not None and skip_weight.shape[0] == 0):
        return f"weight has shape {list(weight.shape)} and no skip channels: there is nothing to sum over"
    return None


def _signal(t: Tensor | None) -> Tensor | None:
    """The kernels read either layout, but one axis must be adjacent in memory."""
    return t if t is None or 1 in t.stride()[1:] else t.contiguous()


def _weights(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def fwd(x, weight, bias, out_weight, out_bias, skip_weight, skip_bias, skip, dilation, save):
    weights = _weights(weight, bias, out_weight, out_bias, skip_weight, skip_bias)
    return torch.ops.bigmodel_native.gated_conv_fwd(
        _signal(x), *weights, _signal(skip), dilation, layout.is_innermost(x), save
    )


def bwd(
    d_out, d_skip, gates, need_x, need_weights,
    x, weight, bias, out_weight, out_bias, skip_weight, skip_bias, skip, dilation, save,
):  # fmt: skip
    weights = _weights(weight, bias, out_weight, out_bias, skip_weight, skip_bias)
    return torch.ops.bigmodel_native.gated_conv_bwd(
        _signal(d_out),
        _signal(d_skip),
        gates,
        need_x,
        need_weights,
        _signal(x),
        *weights,
        dilation,
        layout.is_innermost(x),
    )
