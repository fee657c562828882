"""The C++ kernels of csrc/cpu/conv*.h."""

from __future__ import annotations

import functools

import torch

from bigmodel_kernels import _cpu, _extension
from bigmodel_kernels.ops.conv import op

POOLINGS = ("none", "max", "avg")
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


def _contiguous(t):
    return t if t is None else t.contiguous()


@functools.lru_cache(maxsize=4096)
def _geometry(
    channels_last, stride, padding, dilation, groups, transposed, output_padding, pool, pool_size, pool_stride, pool_padding,
) -> list[int]:  # fmt: skip
    """As ConvCall of csrc/cpu/conv_arguments.h takes it."""
    flat = [groups, int(transposed), POOLINGS.index(pool), int(channels_last)]
    for i, of_axis in enumerate(zip(stride, padding[::2], padding[1::2], dilation, output_padding)):
        flat += of_axis
        if pool != "none":
            flat += pool_size[i], pool_stride[i], pool_padding[i]
    return flat


def _arguments(channels_last, options):
    stride, padding, dilation, groups, transposed, output_padding, activation, pool, size, step, rim, slope, _ = options
    key = (stride, padding, dilation, groups, transposed, output_padding, pool, size, step, rim)
    try:
        return _geometry(channels_last, *key), activation, slope
    except TypeError:  # lists, as operators give them, have no hash
        return _geometry.__wrapped__(channels_last, *key), activation, slope


def _forward(native, x, weight, bias, scale, shift, residual, *options):
    arguments = _arguments(op.gives_channels_last(x, weight), options)
    return native(x, weight, _contiguous(bias), _contiguous(scale), _contiguous(shift), residual, *arguments)


def infer(*args):
    return (_forward(torch.ops.bigmodel_native.conv_infer, *args),)


def plan(x, weight, bias, scale, shift, residual, *options):
    """`infer` for arguments of these shapes and options as a function of the six tensors; None where a backward follows."""
    if options[-1]:
        return None
    native = torch.ops.bigmodel_native.conv_infer.default
    arguments = _arguments(op.gives_channels_last(x, weight), options)

    def run(x, weight, bias, scale, shift, residual):
        tensors = (x, weight, _contiguous(bias), _contiguous(scale), _contiguous(shift), residual)
        try:
            return native(*tensors, *arguments)
        except RuntimeError as error:
            if (lack := _extension.lack_of_memory(error, "conv", tensors)) is None:
                raise
            raise lack from error

    return run


def fwd(*args):
    if args[-1]:
        return _forward(torch.ops.bigmodel_native.conv_fwd, *args)
    x = args[0]
    return *infer(*args), x.new_empty(0, dtype=torch.uint8), x.new_empty(0)


def bwd(grad, out, index, pre, needs, x, weight, bias, scale, shift, residual, *options):
    return torch.ops.bigmodel_native.conv_bwd(
        grad, out, index, pre, needs, x, weight, _contiguous(bias), _contiguous(scale),
        *_arguments(op.is_channels_last(x), options),
    )  # fmt: skip
