"""The layer of the Triton kernels of convolution: the gate is in the epilogue of the first one, residual and sum in those of the
other two, so that of what lies between only a, [N, D, T], is written and read again. The backward computes z again."""

from __future__ import annotations

import functools

from bigmodel_kernels.ops.conv import triton_kernels as conv
from bigmodel_kernels.ops.conv.reference import LEAKY_SLOPE
from bigmodel_kernels.ops.gated_conv import composed, layout


def _options(weight, dilation: int, activation: str, save: bool) -> tuple:
    """The convolution's arguments after its tensors."""
    padding = [dilation * (weight.shape[2] - 1), 0]
    return [1], padding, [dilation], 1, False, [0], activation, "none", [], [], [], LEAKY_SLOPE, save


def supports(x, weight, bias, out_weight, out_bias, skip_weight, skip_bias, skip, dilation) -> str | None:
    if skip_weight is not None and skip_weight.shape[0] == 0:
        return f"skip_weight has shape {list(skip_weight.shape)}: there is nothing to sum over"
    return conv.supports(x, weight, bias, None, None, None, *_options(weight, dilation, "tanh_sigmoid", False))


def _causal(x, weight, bias, dilation, activation="none", added=None):
    return conv.fwd(x, weight, bias, None, None, added, *_options(weight, dilation, activation, False))[0]


def fwd(x, weight, bias, out_weight, out_bias, skip_weight, skip_bias, skip, dilation):
    a = _causal(x, weight, bias, dilation, "tanh_sigmoid")
    return tuple(
        x.new_empty(0) if w is None else layout.like(_causal(a, w, b, 1, added=added), x)
        for w, b, added in ((out_weight, out_bias, x), (skip_weight, skip_bias, skip))
    )


def _gradients(d, x, weight, bias, dilation, need_x, need_weights):
    needs = [need_x, need_weights, need_weights and bias is not None, False, False, False]
    none = x.new_empty(0)
    options = _options(weight, dilation, "none", True)
    # Without an activation the result is not read.
    return conv.bwd(d, d, none, none, needs, x, weight, bias, None, None, None, *options)[:3]


bwd = functools.partial(composed.bwd, _causal, _gradients)
