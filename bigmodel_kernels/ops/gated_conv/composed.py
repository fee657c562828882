"""The gradient of the layer from that of its three convolutions, for the backends that run them as such."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bigmodel_kernels.ops.gated_conv import layout


def bwd(
    causal: Callable,
    gradients: Callable,
    d_out, d_skip, need_x, need_weights, x, weight, bias, out_weight, out_bias, skip_weight, skip_bias, skip, dilation,
):  # fmt: skip
    """The op's backward.

    Args:
        causal: `causal(x, weight, bias, dilation)` is the causal convolution.
        gradients: `gradients(d, x, weight, bias, dilation, need_x, need_weights)` are its three gradients, empty where they
            are not wanted.
    """
    first, second = causal(x, weight, bias, dilation).chunk(2, 1)
    t, s = first.tanh(), second.sigmoid()
    d_a, mixed = torch.zeros_like(t), []
    for d, w, b in ((d_out, out_weight, out_bias), (d_skip, skip_weight, skip_bias)):
        if d is None:
            mixed += [x.new_empty(0) if p is None or not need_weights else torch.zeros_like(p) for p in (w, b)]
            continue
        part, *of_weights = gradients(d, t * s, w, b, 1, True, need_weights)
        d_a = d_a + part
        mixed += of_weights
    d_z = torch.cat([d_a * s * (1 - t * t), d_a * t * s * (1 - s)], 1)
    d_x, *of_weights = gradients(d_z, x, weight, bias, dilation, need_x, need_weights)
    if need_x:
        d_x = layout.like(d_x if d_out is None else d_x + d_out, x)
    return d_x, *of_weights, *mixed
