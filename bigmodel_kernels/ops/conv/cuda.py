"""The CUDA C++ kernels of csrc/cuda/conv_*.cuh, forward: depthwise convolutions, and images with few channels together with the
pool that follows.

"auto" does not choose them: they have not been measured on a GPU.
"""

from __future__ import annotations

import math

import torch

from bigmodel_kernels import _gpu
from bigmodel_kernels.ops.conv import op

NATIVE_OP = "conv_depthwise_fwd"
STEM_DTYPES = (torch.float16, torch.bfloat16)
LARGEST_WINDOW = 512  # elements of a stem's window: past it, a product over im2col is the better kernel
MOST_OUTPUTS = 512  # of a stem's block, before pooling
TILES = {  # of a stem's output, by the number of axes
    1: [(1, 256), (1, 64), (1, 16), (1, 4), (1, 1)],
    2: [(16, 16), (8, 16), (8, 8), (4, 8), (4, 4), (2, 2), (1, 1)],
}
native = torch.ops.bigmodel_native


def is_depthwise(x, weight, groups: int) -> bool:
    return groups == weight.shape[0] == x.shape[1]


def supports(
    x, weight, bias, scale, shift, residual, stride, padding, dilation, groups, transposed, output_padding, activation,
    pool, pool_size, pool_stride, pool_padding, slope, save,
) -> str | None:  # fmt: skip
    depthwise = is_depthwise(x, weight, groups)
    if transposed or not (depthwise or groups == 1):
        return f"it takes depthwise convolutions and those of one group; got {list(weight.shape)} in {groups} groups"
    if (why := _gpu.reason(x, _gpu.DTYPES if depthwise else STEM_DTYPES)) is not None:
        return why
    if save:
        return "it has no backward"
    if activation == "tanh_sigmoid":
        return "it has no gate"
    if depthwise:
        return "it pools only after few input channels" if pool != "none" else None
    if weight[0].numel() > LARGEST_WINDOW:
        return f"a window has {weight[0].numel()} elements, the kernel takes up to {LARGEST_WINDOW}"
    if residual is not None:
        return "it adds a residual only to depthwise convolutions"
    shared = _gpu.properties(x.device.index).shared_bytes
    if (
        stem_tile(weight.shape, stride, dilation, *_pool(pool, pool_size, pool_stride, pool_padding)[1:3], shared)
        is None
    ):
        return f"a tile does not fit in {shared} bytes of shared memory"
    return None


def _contiguous(*tensors):
    return [None if t is None else t.contiguous() for t in tensors]


def _pool(pool, size, stride, padding) -> tuple:
    """Without a pool: one of a single element."""
    return (pool, size, stride, padding) if pool != "none" else ("max", [1, 1], [1, 1], [0, 0])


def _pair(values, otherwise: int) -> list[int]:
    """(for h, for w): a sequence is an image of height 1."""
    return [otherwise, *values] if len(values) == 1 else list(values)


def stem_channels(channels: int) -> int:
    """How many output channels a block makes."""
    return next((n for n in (16, 32) if channels <= n), 64)


def stem_shared_bytes(weight_shape, stride, dilation, pool_size, pool_stride, tile) -> int:
    """As StemTile of csrc/cuda/conv_stem.cuh."""
    out_channels, in_channels, *kernel = weight_shape
    channels, pad = stem_channels(out_channels), 8
    depth = -(-in_channels * math.prod(kernel) // 16) * 16
    full = [(t - 1) * s + k for t, s, k in zip(tile, _pair(pool_stride, 1), _pair(pool_size, 1))]
    reach = zip(full, _pair(stride, 1), _pair(kernel, 1), _pair(dilation, 1))
    in_h, in_w = ((f - 1) * s + (k - 1) * d + 1 for f, s, k, d in reach)
    elements = channels * (depth + pad) + full[0] * full[1] * (channels + pad) + in_channels * in_h * in_w
    return 4 * depth + 2 * elements


def stem_tile(weight_shape, stride, dilation, pool_size, pool_stride, shared_bytes: int) -> list[int] | None:
    """The part of the pooled output that a block makes: the largest that leaves room for a second block; None if none fits."""
    for tile in TILES[len(weight_shape) - 2]:
        outputs = [(t - 1) * s + k for t, s, k in zip(tile, _pair(pool_stride, 1), _pair(pool_size, 1))]
        room = shared_bytes if tile == (1, 1) else shared_bytes // 2
        small = outputs[0] * outputs[1] <= MOST_OUTPUTS or tile == (1, 1)
        if small and stem_shared_bytes(weight_shape, stride, dilation, pool_size, pool_stride, tile) <= room:
            return list(tile)
    return None


def fwd(
    x, weight, bias, scale, shift, residual, stride, padding, dilation, groups, transposed, output_padding, activation,
    pool, pool_size, pool_stride, pool_padding, slope, save,
):  # fmt: skip
    full, shape, _ = op.shapes(
        x, weight, stride, padding, dilation, groups, False, [0] * len(stride), activation,
        pool, pool_size, pool_stride, pool_padding,
    )  # fmt: skip
    out = op.channels_innermost(x, shape) if op.gives_channels_last(x, weight) else x.new_empty(shape)
    vectors = _contiguous(bias, scale, shift)
    if is_depthwise(x, weight, groups):
        taps = weight.squeeze(1).movedim(0, -1).contiguous()  # [KH, KW, C]
        native.conv_depthwise_fwd(x, taps, *vectors, residual, stride, padding[::2], dilation, activation, slope, out)
    elif out.numel():
        kind, *window = _pool(pool, pool_size, pool_stride, pool_padding)
        shared = _gpu.properties(x.device.index).shared_bytes
        tile = stem_tile(weight.shape, stride, dilation, *window[:2], shared)
        images = [t.unsqueeze(2) if t.dim() == 3 else t for t in (x, weight.contiguous(), out)]
        native.conv_stem_fwd(
            *images[:2], *vectors, _pair(stride, 1), _pair(padding[::2], 0), _pair(dilation, 1), activation, slope,
            kind, *(_pair(values, least) for values, least in zip(window, (1, 1, 0))), _pair(full[2:], 1), tile, images[2],
        )  # fmt: skip
    return out, x.new_empty(0, dtype=torch.uint8), x.new_empty(0)
