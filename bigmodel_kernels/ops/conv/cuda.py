"""The CUDA C++ kernel of csrc/cuda/conv_depthwise.cuh: depthwise convolutions and all that follows them, forward.

"auto" does not choose it: it has not been measured on a GPU.
"""

from __future__ import annotations

import torch

from bigmodel_kernels import _gpu
from bigmodel_kernels.ops.conv import op

NATIVE_OP = "conv_depthwise_fwd"
native = torch.ops.bigmodel_native


def supports(
    x, weight, bias, scale, shift, residual, stride, padding, dilation, groups, transposed, output_padding, activation,
    pool, pool_size, pool_stride, pool_padding, slope, save,
) -> str | None:  # fmt: skip
    if (why := _gpu.reason(x)) is not None:
        return why
    if transposed or not groups == weight.shape[0] == x.shape[1]:
        return (
            f"it takes depthwise convolutions, one channel to each group; got {list(weight.shape)} in {groups} groups"
        )
    if activation == "tanh_sigmoid" or pool != "none":
        return "it has no gate and no pool"
    return "it has no backward" if save else None


def _contiguous(*tensors):
    return [None if t is None else t.contiguous() for t in tensors]


def fwd(
    x, weight, bias, scale, shift, residual, stride, padding, dilation, groups, transposed, output_padding, activation,
    pool, pool_size, pool_stride, pool_padding, slope, save,
):  # fmt: skip
    shape = [
        x.shape[0],
        x.shape[1],
        *op.output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation, False, [0] * len(stride)),
    ]
    out = op.channels_innermost(x, shape) if op.gives_channels_last(x, weight) else x.new_empty(shape)
    taps = weight.squeeze(1).movedim(0, -1).contiguous()  # [KH, KW, C]
    native.conv_depthwise_fwd(
        x, taps, *_contiguous(bias, scale, shift), residual, stride, padding[::2], dilation, activation, slope, out
    )
    return out, x.new_empty(0, dtype=torch.uint8), x.new_empty(0)
