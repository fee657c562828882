"""What the Triton kernels of convolution share: the pixels of a program, how they meet the other side, and the epilogue.

Images are [N, C, H, W] with any strides; one spatial axis is an image of height 1. A tile is pixels by channels: the pixels lie
on axis PIXELS of it, 0 where an image's channels are adjacent in memory (channels_last), 1 where its pixels are, so that the
last axis of a tile is the one to read along.

One rule per axis serves both directions:
    output  u * PHASES + phase  meets input  u * STEP + first + j * jump  through tap  first_tap + j * TAP_STEP
gather (the convolution; dgrad of a transposed one): one phase, STEP = stride, jump = dilation, TAP_STEP = 1.
scatter (the transposed convolution; dgrad of the other): STEP = 1, and a phase for every remainder by the stride, since its
outputs all meet the same taps: no zero is put between the inputs, and none is multiplied.
"""

import triton
import triton.language as tl

from bigmodel_kernels._triton import sigmoid, tanh
from bigmodel_kernels.ops.conv import reference

NO_GRADIENT = tl.constexpr(reference.NO_GRADIENT)
LEAKY_SLOPE = tl.constexpr(reference.LEAKY_SLOPE)
HALF_SQRT = tl.constexpr(0.5**0.5)
TWO_PI_ROOT = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@triton.jit
def along(v, AXIS: tl.constexpr):
    """A vector on one axis of a tile, to be broadcast along the other."""
    return tl.expand_dims(v, 1 - AXIS)


@triton.jit
def pixels_of(
    start, count_y, count_x, batch, BLOCK: tl.constexpr, WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr
):  # fmt: skip
    """(image, row, column, whether there is one) of BLOCK pixels; those of one window of a pool follow each other."""
    WINDOW: tl.constexpr = WINDOW_Y * WINDOW_X
    i = start + tl.arange(0, BLOCK)
    within, p = i % WINDOW, i // WINDOW
    wide = tl.maximum(count_x // WINDOW_X, 1)
    high = tl.maximum(count_y // WINDOW_Y, 1)
    n = p // (wide * high)
    y = p // wide % high * WINDOW_Y + within // WINDOW_X
    x = p % wide * WINDOW_X + within % WINDOW_X
    return n, y, x, (n < batch) & (y < count_y) & (x < count_x)


@triton.jit
def offset_of(n, y, x, strides):
    return n.to(tl.int64) * strides[0] + y.to(tl.int64) * strides[2] + x.to(tl.int64) * strides[3]


@triton.jit
def phase_of(
    phase, origin, size,
    KERNEL: tl.constexpr, DILATION: tl.constexpr, PHASES: tl.constexpr, TAP_STEP: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """(outputs, taps, first tap, input that output 0 meets through it) of one axis.

    `origin` is the padding of a scatter, minus that of a gather. The taps t of a phase solve t * dilation = phase + origin
    modulo the stride; INVERSE is that of dilation / gcd modulo TAP_STEP = stride / gcd.
    """
    GCD: tl.constexpr = PHASES // TAP_STEP
    outputs = (size - phase + PHASES - 1) // PHASES
    remainder = (phase + origin) % PHASES
    tap = remainder // GCD * INVERSE % TAP_STEP
    taps = tl.where(remainder % GCD == 0, (KERNEL - tap + TAP_STEP - 1) // TAP_STEP, 0)
    return outputs, taps, tap, (phase + origin - tap * DILATION) // PHASES


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        z = tl.where(z < 0, 0.0, z)
    elif ACTIVATION == "leaky_relu":
        z = tl.where(z > 0, z, LEAKY_SLOPE * z)
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * HALF_SQRT))
    elif ACTIVATION == "silu":
        z = z * sigmoid(z)
    elif ACTIVATION == "tanh":
        z = tanh(z)
    elif ACTIVATION == "sigmoid":
        z = sigmoid(z)
    return z


@triton.jit
def activation_gradient(g, out, z, gate, ACTIVATION: tl.constexpr):
    """g times the derivative, with respect to z and to the gate, from whichever of out, z and gate tell it."""
    d_gate = g
    if ACTIVATION == "relu":
        g = tl.where(out <= 0, 0.0, g)
    elif ACTIVATION == "leaky_relu":
        g = tl.where(out > 0, g, LEAKY_SLOPE * g)
    elif ACTIVATION == "tanh":
        g = g * (1.0 - out * out)
    elif ACTIVATION == "sigmoid":
        g = g * out * (1.0 - out)
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(z * HALF_SQRT))
        g = g * (cdf + z * tl.exp(-0.5 * z * z) * TWO_PI_ROOT)
    elif ACTIVATION == "silu":
        s = sigmoid(z)
        g = g * s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == "tanh_sigmoid":
        t = tanh(z)
        s = sigmoid(gate)
        d_gate = g * t * s * (1.0 - s)
        g = g * s * (1.0 - t * t)
    return g, d_gate


@triton.jit
def normalise(u, channel, wanted, bias_pointer, scale_pointer, shift_pointer, PIXELS: tl.constexpr):
    """scale * (u + bias) + shift, of the parts that there are."""
    if bias_pointer is not None:
        u += along(tl.load(bias_pointer + channel, mask=wanted, other=0.0).to(tl.float32), 1 - PIXELS)
    if scale_pointer is not None:
        u *= along(tl.load(scale_pointer + channel, mask=wanted, other=0.0).to(tl.float32), 1 - PIXELS)
    if shift_pointer is not None:
        u += along(tl.load(shift_pointer + channel, mask=wanted, other=0.0).to(tl.float32), 1 - PIXELS)
    return u


@triton.jit
def tile_pointers(pointer, strides, offset, channel, PIXELS: tl.constexpr):
    """Pointers to channels of the pixels at `offset`."""
    return pointer + (along(offset, PIXELS) + along(channel.to(tl.int64) * strides[1], 1 - PIXELS))


@triton.jit
def load_tile(pointer, strides, offset, channel, mask, PIXELS: tl.constexpr):
    return tl.load(tile_pointers(pointer, strides, offset, channel, PIXELS), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(pointer, strides, tile, offset, channel, mask, PIXELS: tl.constexpr):
    tl.store(tile_pointers(pointer, strides, offset, channel, PIXELS), tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def by_window(tile, WINDOW: tl.constexpr, PIXELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile with the pixels of each window on an axis of their own, 1 + PIXELS."""
    if PIXELS == 0:
        tile = tl.reshape(tile, (BLOCK_M // WINDOW, WINDOW, BLOCK_N))
    else:
        tile = tl.reshape(tile, (BLOCK_N, BLOCK_M // WINDOW, WINDOW))
    return tile


@triton.jit
def largest_of_window(a, WINDOW: tl.constexpr, PIXELS: tl.constexpr):
    """(position of the largest of each window, [.., WINDOW, ..] true at it): the first of equals, a NaN before all."""
    AXIS: tl.constexpr = 1 + PIXELS
    here = tl.arange(0, WINDOW)
    here = tl.expand_dims(tl.expand_dims(here, 0), 2 - 2 * PIXELS)
    nan = a != a
    any_nan = tl.expand_dims(tl.max(nan.to(tl.int32), AXIS), AXIS) > 0
    best = tl.expand_dims(tl.max(a, AXIS), AXIS)
    position = tl.min(tl.where(tl.where(any_nan, nan, a == best), here, WINDOW), AXIS)
    return position, tl.expand_dims(position, AXIS) == here


@triton.jit
def finish(
    u, v,  # float32 tiles; v belongs to the gates of u, if there are any
    start, count_y, count_x, batch, phase_y, phase_x, channel, wanted, gate,
    bias_pointer, scale_pointer, shift_pointer, residual_pointer, out_pointer, index_pointer, pre_pointer,
    residual_strides, out_strides, index_strides, pre_strides,
    PHASES_Y: tl.constexpr, PHASES_X: tl.constexpr, ACTIVATION: tl.constexpr, POOL: tl.constexpr,
    WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr, PIXELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """From the convolution itself to what is stored. channel + gate is the channel of a gate."""
    n, y, x, exists = pixels_of(start, count_y, count_x, batch, BLOCK_M, WINDOW_Y, WINDOW_X)
    y, x = y * PHASES_Y + phase_y, x * PHASES_X + phase_x
    mask = along(exists, PIXELS) & along(wanted, 1 - PIXELS)
    GATED: tl.constexpr = ACTIVATION == "tanh_sigmoid"
    z = normalise(u, channel, wanted, bias_pointer, scale_pointer, shift_pointer, PIXELS)
    z_gate = z
    if GATED:
        z_gate = normalise(v, channel + gate, wanted, bias_pointer, scale_pointer, shift_pointer, PIXELS)
    if residual_pointer is not None:
        at = offset_of(n, y, x, residual_strides)
        z += load_tile(residual_pointer, residual_strides, at, channel, mask, PIXELS)
        if GATED:
            z_gate += load_tile(residual_pointer, residual_strides, at, channel + gate, mask, PIXELS)
    if GATED:
        a = tanh(z) * sigmoid(z_gate)
    else:
        a = activate(z, ACTIVATION)

    if pre_pointer is not None and POOL != "max":
        at = offset_of(n, y, x, pre_strides)
        store_tile(pre_pointer, pre_strides, z, at, channel, mask, PIXELS)
        if GATED:
            store_tile(pre_pointer, pre_strides, z_gate, at, channel + gate, mask, PIXELS)
    if POOL == "none":
        store_tile(out_pointer, out_strides, a, offset_of(n, y, x, out_strides), channel, mask, PIXELS)
    else:
        WINDOW: tl.constexpr = WINDOW_Y * WINDOW_X
        n, y, x, exists = pixels_of(
            start // WINDOW, count_y // WINDOW_Y, count_x // WINDOW_X, batch, BLOCK_M // WINDOW, 1, 1
        )
        mask = along(exists, PIXELS) & along(wanted, 1 - PIXELS)
        a = by_window(a, WINDOW, PIXELS, BLOCK_M, BLOCK_N)
        if POOL == "avg":
            out = tl.sum(a, 1 + PIXELS) * (1.0 / WINDOW)
        else:
            position, chosen = largest_of_window(a, WINDOW, PIXELS)
            out = tl.sum(tl.where(chosen, a, 0.0), 1 + PIXELS)
            if pre_pointer is not None:
                at = offset_of(n, y, x, pre_strides)
                z = tl.sum(tl.where(chosen, by_window(z, WINDOW, PIXELS, BLOCK_M, BLOCK_N), 0.0), 1 + PIXELS)
                store_tile(pre_pointer, pre_strides, z, at, channel, mask, PIXELS)
                if GATED:
                    z = by_window(z_gate, WINDOW, PIXELS, BLOCK_M, BLOCK_N)
                    z = tl.sum(tl.where(chosen, z, 0.0), 1 + PIXELS)
                    store_tile(pre_pointer, pre_strides, z, at, channel + gate, mask, PIXELS)
            if index_pointer is not None:
                if ACTIVATION == "relu":
                    position = tl.where(out <= 0, NO_GRADIENT, position)
                at = offset_of(n, y, x, index_strides)
                store_tile(index_pointer, index_strides, position, at, channel, mask, PIXELS)
        store_tile(out_pointer, out_strides, out, offset_of(n, y, x, out_strides), channel, mask, PIXELS)
