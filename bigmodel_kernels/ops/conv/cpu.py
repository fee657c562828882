"""The C++ kernels of csrc/cpu/conv*.h."""

from __future__ import annotations

import torch

from bigmodel_kernels import _cpu
from bigmodel_kernels.ops.conv import op

LARGEST_WINDOW = 254  # elements of a max-pool window that the saved byte can tell apart


def supports(
    x, weight, bias, scale, shift, residual, stride, padding, dilation, groups, transposed, output_padding, activation,
    pool, pool_size, *rest,
) -> str | None:  # fmt: skip
    if (why := _cpu.reason(x)) is not None:
        return why
    if activation == "tanh_sigmoid" and groups != 1:
        return f"activation 'tanh_sigmoid' pairs channels of different groups, groups is {groups}"
    if pool == "max" and (elements := pool_size[0] * pool_size[-1] ** (len(pool_size) - 1)) > LARGEST_WINDOW:
        return f"pool has a window of {elements} elements; the kernels take up to {LARGEST_WINDOW}"
    if 0 in x.shape[1:] or 0 in weight.shape:
        return f"x has shape {list(x.shape)} and weight {list(weight.shape)}: there is nothing to sum over"
    return None


def _contiguous(*tensors):
    return [None if t is None else t.contiguous() for t in tensors]


def fwd(x, weight, bias, scale, shift, residual, *options):
    return torch.ops.bigmodel_native.conv_fwd(
        x, weight, *_contiguous(bias, scale, shift), residual, *options, op.gives_channels_last(x, weight)
    )


def bwd(grad, out, index, pre, needs, x, weight, bias, scale, shift, residual, *options):
    return torch.ops.bigmodel_native.conv_bwd(
        grad, out, index, pre, needs, x, weight, *_contiguous(bias, scale), *options[:-1], op.is_channels_last(x)
    )
