"""Which of the CPU kernels and PyTorch runs a call of bmk.conv under backend "auto": the rules behind `prefer` of op.py, from the
tables "Convolution on the CPU" in docs/decisions_conv.md."""

from __future__ import annotations

import functools
import math

import torch

from bigmodel_kernels import _cpu


def _bfloat16_is_ours(last, axes, taps, second, outputs, weights, transposed, few) -> bool:
    """Inference in bfloat16: PyTorch multiplies by the CPU's bfloat16 instructions, the kernels only by some of them."""
    if not _cpu.dot_products():
        return second <= 3 and not transposed
    if weights > (32 * 64 if last else 128 * 128) or (few and taps * weights >= 1 << 16):
        return False
    if axes == 2 and taps == 1:
        return (second > 48 or second <= 8) and not last
    return outputs >= 16 or not last


def _bfloat16_training_is_ours(last, axes, taps, second, channels, weights, transposed, strided) -> bool:
    """Training in bfloat16: all three products by dot products, where the CPU has them."""
    if not _cpu.dot_products():
        return False
    if axes == 2 and taps == 1:
        return second <= 8 and not transposed
    if channels < 16:
        return False
    if transposed:
        return axes == 2 and strided and taps == 16 and weights <= 64 * 128
    if axes == 1:
        return weights <= 128 * 128
    if strided and 9 <= taps <= 16:
        return weights <= 128 * 256
    most = {9: 64 * 64, 25: 32 * 32}
    return not last and weights <= most.get(taps, 0)


def _depthwise_is_ours(dtype, last, x_shape, kernel, transposed, strided, spread, save, activated) -> bool:
    """One channel a group. PyTorch trains those with a stride, and in bfloat16 those with many taps, in 2 to 12 times as long."""
    taps, size = math.prod(kernel), math.prod(x_shape)
    plain = not strided and not spread and len(kernel) == 2
    stepped = strided and not transposed and len(kernel) == 2
    if dtype == torch.bfloat16:
        if not _cpu.dot_products() or transposed or spread or len(kernel) == 1:
            return False
        if save:
            return taps >= 25 or stepped or (taps == 1 and not last)
        return not strided and not last
    if save:
        if taps >= 25 or len(kernel) == 1 or spread:
            return True
        if strided:
            return stepped and (taps == 1 or not last)
        return not last and (taps == 1 or size >= 3 << 18)
    if not last:
        return (taps <= 25 and (stepped or not strided)) or (taps == 49 and plain and min(x_shape[2:]) >= 14)
    # PyTorch's loops of small kernels in channels_last are as fast on small images; its activation is another pass.
    large = math.prod(x_shape[2:]) >= 28 * 28
    small_taps = (taps == 9 and large) or (taps in (9, 25) and activated and (large or size <= 1 << 19))
    return not strided and not spread and (taps == 49 or small_taps)


def _mostly_padding(dtype, last, image, kernel) -> bool:
    """Whether so many taps meet padding, which PyTorch's kernels leave out, that they are ahead in inference."""
    full = dtype == torch.float32
    return (
        len(kernel) == 2
        and max(kernel) >= (7 if full else 5)
        and min(image) < (3 if full and not last else 2) * max(kernel)
    )


def _filtered(x_shape, weight_shape, stride, dilation, groups, transposed) -> tuple[bool, int]:
    """Whether Winograd's filtering finds the gradient of the weights (and, from 32 channels on, the rest): 3x3, or 3 or 4 taps an
    axis with a stride of 2. And how many tiles share a weight."""
    first, second, *kernel = weight_shape
    strides = set(stride)
    fits = kernel == [3, 3] if strides == {1} else len(kernel) == 2 and set(kernel) <= {3, 4} and strides == {2}
    fits = fits and set(dilation) == {1} and groups == 1 and min(first, second) >= 16
    side = 4 if strides == {2} and not transposed else 2
    return fits, x_shape[0] * math.prod(-(-n // side) for n in x_shape[2:])


def _in_runs(weight_shape, stride, dilation, groups) -> bool:
    """Whether csrc/cpu/conv_winograd_taps.h computes the convolution in float32, but for the number of channels."""
    first, _, *kernel = weight_shape
    fits = len(kernel) == 2 and min(kernel) > 3 and max(stride) <= 2 and set(dilation) == {1} and groups == 1
    return fits and first >= (64 if kernel == [4, 4] else 32)


@functools.lru_cache(maxsize=4096)
def order(dtype, last, x_shape, weight_shape, stride, dilation, groups, transposed, save, activated) -> tuple[str, ...]:
    first, second, *kernel = weight_shape
    pixels = math.prod(x_shape[2:])
    taps, weights = math.prod(kernel), first * second
    places = x_shape[0] * math.prod(-(-n // s) for n, s in zip(x_shape[2:], stride))
    few = places <= (96 if last or taps > 1 else 256)
    strided = any(v > 1 for v in stride)
    filtered, tiles = _filtered(x_shape, weight_shape, stride, dilation, groups, transposed)
    filtered = filtered and dtype == torch.float32
    in_phases = filtered and strided and min(first, second) >= 32
    in_runs = dtype == torch.float32 and not transposed and _in_runs(weight_shape, stride, dilation, groups)
    beyond = any(k > n for k, n in zip(kernel, x_shape[2:]))
    # The gradient of such weights in channels_last was seen to read and write past the channels and to end the process.
    past = last and taps == 1 and len(kernel) == 2 and strided and second < 16 and groups == 1 and not transposed
    if save and (beyond or past):  # of a kernel beyond the image PyTorch's backward was seen not to return
        ours = True
    elif save and x_shape[0] == 1 and places * weights * taps < 1 << 20:  # a call through Python takes longer
        ours = False
    elif groups > 1:
        spread = any(v > 1 for v in dilation)
        ours = first == groups and second == 1
        ours = ours and _depthwise_is_ours(dtype, last, x_shape, kernel, transposed, strided, spread, save, activated)
    elif not save and not transposed and _mostly_padding(dtype, last, x_shape[2:], kernel):
        ours = False
    elif (
        not save
        and not transposed
        and taps > 1
        and second >= max(128, 4 * first)
        and (strided or dtype == torch.bfloat16)
    ):
        # The copy to blocks of so many channels is large beside the products of so few.
        ours = False
    elif dtype == torch.bfloat16:
        outputs = second if transposed else first
        if save:
            channels = min(first, second)
            ours = _bfloat16_training_is_ours(last, len(kernel), taps, second, channels, weights, transposed, strided)
        else:
            ours = _bfloat16_is_ours(last, len(kernel), taps, second, outputs, weights, transposed, few)
    elif in_phases and tiles >= 128 and not save:
        ours = taps == 16 or weights <= 128 * 256
    elif filtered and save and strided:
        ours = tiles >= 128 and weights <= 512 * tiles and (taps == 16 or transposed or weights <= 128 * 256)
    elif filtered and save:
        ours = weights <= max(128 * 128, 700 * tiles)
    elif transposed:
        ours = not save and not last and weights <= 128 * 128
    elif taps == pixels == 1:  # a matrix product
        ours = not save and x_shape[0] >= 32 and weights >= 1 << 16
    elif not save and few and (taps > 1 or strided) and weights * taps >= 1 << 16:
        ours = True
    elif len(kernel) == 1:
        ours = taps > 1 and weights <= 128 * 128
    elif filtered and not strided and min(first, second) >= 32:
        ours = weights <= min(256 * 256, (400 if tiles > 64 else 128) * tiles)
    elif save and taps == 1:
        ours = strided and second <= 8
    elif save:
        ours = second <= 8 and (taps < 49 or first <= 64) if in_runs else taps <= 9 and second <= 16
    elif taps == 1 and strided:
        ours = weights <= 128 * 256 and (not last or second <= 8)
    elif taps == 1:
        ours = weights <= 128 * 128 and (second > 48 or second <= 8) and not last
    else:
        ours = second <= (64 if not last else 32 if in_runs else 8)
    return ("cpu", "torch") if ours else ("torch", "cpu")
