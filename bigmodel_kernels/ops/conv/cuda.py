"""The CUDA C++ kernels of csrc/cuda/conv_*.cuh, forward and backward: depthwise convolutions, and images with few channels
together with the pool that follows.

"auto" does not choose them: they have not been measured on a GPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bigmodel_kernels import _gpu
from bigmodel_kernels.ops.conv import op, reference

NATIVE_OP = "conv_depthwise_fwd"
LARGEST_WINDOW = 512  # elements of a stem's window: past it, a product over im2col is the better kernel
LARGEST_POOL = 254  # elements of a max-pool's window that the saved byte can tell apart
RESERVED = 1024  # bytes of shared memory that every block has besides its own
MOST_OUTPUTS = 512  # of a stem's block, before pooling
MOST_GRADIENTS = 256  # of a tile of the stem's backward
TILES = {  # of a stem's output, by the number of axes
    1: [(1, 256), (1, 64), (1, 16), (1, 4), (1, 1)],
    2: [(16, 16), (8, 16), (8, 8), (4, 8), (4, 4), (2, 2), (1, 1)],
}
STEM_PAD, STEM_COLUMNS = 8, 192  # as kStemPad and kStemColumns of csrc/cuda/conv_stem*.cuh
TAPS, THREADS = 10, 128  # of a block of conv_depthwise_weights.cuh: elements of the kernel, threads
SHORTEST_SUM = 16  # pixels of a thread there, at least
BLOCKS_PER_MULTIPROCESSOR = 2
native = torch.ops.bigmodel_native


def is_depthwise(x, weight, groups: int) -> bool:
    return groups > 1 and groups == weight.shape[0] == x.shape[1]


def supports(
    x, weight, bias, scale, shift, residual, stride, padding, dilation, groups, transposed, output_padding, activation,
    pool, pool_size, pool_stride, pool_padding, slope, save,
) -> str | None:  # fmt: skip
    depthwise = is_depthwise(x, weight, groups)
    if transposed or not (depthwise or groups == 1):
        return f"it takes depthwise convolutions and those of one group; got {list(weight.shape)} in {groups} groups"
    if (why := _gpu.reason(x)) is not None:
        return why
    if activation == "tanh_sigmoid":
        return "it has no gate"
    if depthwise:
        return "it pools only after few input channels" if pool != "none" else None
    if weight[0].numel() > LARGEST_WINDOW:
        return f"a window has {weight[0].numel()} elements, the kernel takes up to {LARGEST_WINDOW}"
    if residual is not None:
        return "it adds a residual only to depthwise convolutions"
    if save and pool == "max" and math.prod(pool_size) > LARGEST_POOL:
        return f"pool has a window of {math.prod(pool_size)} elements; its gradient takes up to {LARGEST_POOL}"
    shared = _gpu.properties(x.device.index).shared_bytes
    geometry = (weight.shape, stride, dilation)
    sizes = _pool_sizes(pool, pool_size, pool_stride, pool_padding)
    tiles = [stem_tile(*geometry, sizes, x.element_size(), save, shared)]
    if save:
        tiles.append(stem_gradient_tile(*geometry, x.element_size(), shared))
    return f"a tile does not fit in {shared} bytes of shared memory" if None in tiles else None


def _image(t: Tensor | None) -> Tensor | None:
    """[N, C, L] as [N, C, 1, L]."""
    return t if t is None or t.dim() == 4 else t.unsqueeze(2)


def _pair(values, otherwise: int) -> list[int]:
    """(for h, for w)."""
    return [otherwise, *values] if len(values) == 1 else list(values)


def _pool_sizes(pool, size, stride, padding) -> list[int]:
    """Window, stride and padding; without a pool, of a single element."""
    if pool == "none":
        return [1, 1, 1, 1, 0, 0]
    return [n for values, otherwise in ((size, 1), (stride, 1), (padding, 0)) for n in _pair(values, otherwise)]


# ---- what a block of the kernels for few input channels takes ----


def stem_channels(channels: int) -> int:
    """How many output channels a block makes, forward."""
    return next((n for n in (16, 32) if channels <= n), 64)


def stem_gradient_channels(channels: int) -> int:
    """How many output channels a block has, backward."""
    return 32 if channels <= 32 else 64


def _input_elements(weight_shape, stride, dilation, full) -> int:
    """Of the part of x that `full` convolution outputs need; as StemExtent of csrc/cuda/conv_stem_tile.cuh."""
    reach = zip(full, _pair(stride, 1), _pair(weight_shape[2:], 1), _pair(dilation, 1))
    return weight_shape[1] * math.prod((f - 1) * s + (k - 1) * d + 1 for f, s, k, d in reach)


def stem_shared_bytes(weight_shape, stride, dilation, pool_sizes, element_size: int, save: bool, tile) -> int:
    """As StemTile of csrc/cuda/conv_stem.cuh."""
    channels = stem_channels(weight_shape[0])
    depth = -(-math.prod(weight_shape[1:]) // 16) * 16
    full = [(t - 1) * s + k for t, s, k in zip(tile, pool_sizes[2:4], pool_sizes[:2])]
    copied = channels * (depth + STEM_PAD) + _input_elements(weight_shape, stride, dilation, full)
    kept = math.prod(full) * (channels + STEM_PAD)
    return 4 * depth + element_size * copied + (4 if save else element_size) * kept


def stem_gradient_shared_bytes(weight_shape, stride, dilation, element_size: int, tile) -> int:
    """As StemWeightsTile of csrc/cuda/conv_stem_backward.cuh."""
    pixels = -(-math.prod(tile) // 16) * 16
    gradients = stem_gradient_channels(weight_shape[0]) * (pixels + STEM_PAD)
    return 4 * (STEM_COLUMNS + pixels) + element_size * (
        gradients + _input_elements(weight_shape, stride, dilation, tile)
    )


def _largest(axes: int, shared_bytes: int, outputs, most: int, bytes_of) -> list[int] | None:
    """The largest tile of so many outputs that leaves room for a second block; None if not even the smallest fits."""
    for tile in TILES[axes]:
        last = tile == (1, 1)
        if (last or outputs(tile) <= most) and bytes_of(tile) <= (
            shared_bytes if last else (shared_bytes - RESERVED) // 2
        ):
            return list(tile)
    return None


def stem_tile(weight_shape, stride, dilation, pool_sizes, element_size: int, save: bool, shared: int):
    """The part of the pooled output that a block makes."""

    def outputs(tile) -> int:
        return math.prod((t - 1) * s + k for t, s, k in zip(tile, pool_sizes[2:4], pool_sizes[:2]))

    def size(tile) -> int:
        return stem_shared_bytes(weight_shape, stride, dilation, pool_sizes, element_size, save, tile)

    return _largest(len(weight_shape) - 2, shared, outputs, MOST_OUTPUTS, size)


def stem_gradient_tile(weight_shape, stride, dilation, element_size: int, shared: int):
    """The part of the convolution's output that a block of the backward takes at a time."""

    def size(tile) -> int:
        return stem_gradient_shared_bytes(weight_shape, stride, dilation, element_size, tile)

    return _largest(len(weight_shape) - 2, shared, math.prod, MOST_GRADIENTS, size)


# ---- the calls ----


def fwd(
    x, weight, bias, scale, shift, residual, stride, padding, dilation, groups, transposed, output_padding, activation,
    pool, pool_size, pool_stride, pool_padding, slope, save,
):  # fmt: skip
    full, shape, pre_shape = op.shapes(
        x, weight, stride, padding, dilation, groups, False, [0] * len(stride), activation,
        pool, pool_size, pool_stride, pool_padding,
    )  # fmt: skip
    out = op.channels_innermost(x, shape) if op.gives_channels_last(x, weight) else x.new_empty(shape)
    index = op.channels_innermost(x, shape, torch.uint8) if save and pool == "max" else None
    pre = op.channels_innermost(x, pre_shape) if save and op.saves_pre(activation, pool) else None
    vectors = [None if t is None else t.contiguous() for t in (bias, scale, shift)]
    geometry = (_pair(stride, 1), _pair(padding[::2], 0), _pair(dilation, 1))
    source, result, chosen, z = map(_image, (x, out, index, pre))
    if is_depthwise(x, weight, groups):
        native.conv_depthwise_fwd(
            source, _taps(weight), *vectors, _image(residual), *geometry, [1, 1], activation, slope, result, z
        )
    elif out.numel():
        sizes = _pool_sizes(pool, pool_size, pool_stride, pool_padding)
        shared = _gpu.properties(x.device.index).shared_bytes
        tile = stem_tile(weight.shape, stride, dilation, sizes, x.element_size(), save, shared)
        native.conv_stem_fwd(
            source, _image(weight).contiguous(), *vectors, *geometry, activation, slope, pool, sizes,
            _pair(full[2:], 1), tile, result, chosen, z,
        )  # fmt: skip
    return (
        out,
        x.new_empty(0, dtype=torch.uint8) if index is None else index,
        x.new_empty(0) if pre is None else pre,
    )


def _taps(weight: Tensor) -> Tensor:
    """Of a depthwise convolution: [KH, KW, C]."""
    return _image(weight).squeeze(1).movedim(0, -1).contiguous()


def bwd(
    grad, out, index, pre, needs,
    x, weight, bias, scale, shift, residual, stride, padding, dilation, groups, transposed, output_padding, activation,
    pool, pool_size, pool_stride, pool_padding, slope, save,
):  # fmt: skip
    full, _, _ = op.shapes(
        x, weight, stride, padding, dilation, groups, False, output_padding, activation,
        pool, pool_size, pool_stride, pool_padding,
    )  # fmt: skip
    depthwise = is_depthwise(x, weight, groups)
    sizes = _pool_sizes(pool, pool_size, pool_stride, pool_padding)
    geometry = (_pair(stride, 1), _pair(padding[::2], 0), _pair(dilation, 1))
    kept = (index if pool == "max" else None, pre if op.saves_pre(activation, pool) else None)
    tail = (*map(_image, (grad, out, *kept)), activation, slope, pool, sizes)
    plain = activation == "none" and pool == "none"
    d, dx, dw, sums = grad if plain else None, None, None, None
    if needs[5] or needs[0] or (depthwise and d is None):
        # Channels innermost, but for planes that only kernels of planes read.
        planes = depthwise and not needs[5] and grad.stride(1) != 1
        if d is None or needs[5] or not depthwise:
            d = grad.new_empty(full) if planes else op.channels_innermost(grad, full)
            native.conv_spread(*tail, _image(d))
    if needs[0]:
        dx = op.channels_innermost(x, x.shape) if op.is_channels_last(x) else x.new_empty(x.shape)
        folded = weight if scale is None else weight * reference.per_output_channel(scale, weight, False, groups)
        if depthwise:
            reach = zip(_image(weight).shape[2:], geometry[1], geometry[2])
            native.conv_depthwise_fwd(
                _image(d), _taps(folded).flip(0, 1), None, None, None, None,
                [1, 1], [(k - 1) * step - p for k, p, step in reach], geometry[2], geometry[0], "none", 0.0, _image(dx), None,
            )  # fmt: skip
        else:
            native.conv_stem_input(_image(d), _image(folded).permute(2, 3, 1, 0).contiguous(), *geometry, _image(dx))
    if any(needs[1:5]):
        kernel = list(_image(weight).shape[2:])
        multiprocessors = _gpu.properties(x.device.index).multiprocessors
        if depthwise:
            channels, taps = weight.shape[0], math.prod(kernel)
            lanes = 16 if d.stride(1) == 1 else 1
            blocks = -(-channels // lanes) * -(-(taps + 1) // TAPS)
            pixels = full[0] * math.prod(full[2:])
            splits = _splits(pixels * lanes // (THREADS * SHORTEST_SUM), blocks, multiprocessors)
            partial = x.new_empty(splits, taps + 1, channels, dtype=torch.float32)
            native.conv_depthwise_weights(_image(x), _image(d), kernel, *geometry, partial)
            total = partial.sum(0).t()  # [C, taps + 1]
        else:
            shared = _gpu.properties(x.device.index).shared_bytes
            tile = stem_gradient_tile(weight.shape, stride, dilation, x.element_size(), shared)
            channels, columns = weight.shape[0], weight[0].numel() + 1
            blocks = -(-channels // stem_gradient_channels(channels)) * -(-columns // STEM_COLUMNS)
            tiles = full[0] * math.prod(-(-n // t) for n, t in zip(_pair(full[2:], 1), tile))
            splits = _splits(tiles, blocks, multiprocessors)
            partial = x.new_empty(splits, channels, columns, dtype=torch.float32)
            native.conv_stem_weights(
                _image(x), *tail[:4], kernel, *geometry, *tail[4:], _pair(full[2:], 1), tile, partial
            )
            total = partial.sum(0)
        dw, sums = total[:, :-1].reshape(weight.shape), total[:, -1]
    return reference.promised(d, sums, dx, dw, x, weight, bias, scale, transposed, groups, needs)


def _splits(most: int, blocks: int, multiprocessors: int) -> int:
    """How many blocks share a sum: enough to fill the GPU, none without work."""
    return max(1, min(most, -(-BLOCKS_PER_MULTIPROCESSOR * multiprocessors // blocks)))
