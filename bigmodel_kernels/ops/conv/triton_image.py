"""What surrounds the convolution where its own kernel cannot do it, in Triton: activation and pool after, their gradient before.

pool_kernel: out = pool(activation(z)). For windows that are no tile's neighbours (see triton_kernels.fuses), and for gates whose
two halves lie in different groups. A program owns BLOCK_M pixels of the result by BLOCK_N channels.
spread_kernel: d, the gradient of z, from that of the result. A program owns BLOCK_M pixels of d by BLOCK_N channels, and looks
up the windows that hold each of them, so that overlapping windows need no atomic; it also leaves the sums of d over its pixels,
which a second step adds up in the order of the programs: dbias, dshift and dscale come from them.
Floor: bytes; every tensor read or written once (overlapping windows: from L2).
"""

import triton
import triton.language as tl

from bigmodel_kernels._triton import sigmoid, tanh
from bigmodel_kernels.ops.conv.triton_tile import (
    NO_GRADIENT,
    activate,
    activation_gradient,
    along,
    load_tile,
    offset_of,
    pixels_of,
    store_tile,
)


@triton.jit
def empty_tile(PIXELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    if PIXELS == 0:
        tile = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    else:
        tile = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    return tile


@triton.jit(do_not_specialize=["batch", "out_height", "out_width"])
def pool_kernel(
    z_pointer,  # [N, C, H, W]; [N, 2 C, H, W] if gated
    out_pointer, index_pointer,  # [N, C, out_height, out_width]; index may be None
    pre_pointer,  # as z, pooled, or None
    z_strides, out_strides, index_strides, pre_strides,
    batch, channels, out_height, out_width,
    ACTIVATION: tl.constexpr, POOL: tl.constexpr, SIZE_Y: tl.constexpr, SIZE_X: tl.constexpr,
    STEP_Y: tl.constexpr, STEP_X: tl.constexpr, PIXELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    GATED: tl.constexpr = ACTIVATION == "tanh_sigmoid"
    tiles_n = tl.cdiv(channels, BLOCK_N)
    channel = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    start_m = tl.program_id(0) // tiles_n * BLOCK_M
    n, y, x, exists = pixels_of(start_m, out_height, out_width, batch, BLOCK_M, 1, 1)
    mask = along(exists, PIXELS) & along(channel < channels, 1 - PIXELS)
    out = empty_tile(PIXELS, BLOCK_M, BLOCK_N)
    chosen_z, chosen_gate, position = out, out, out.to(tl.int32)
    for i in range(0, SIZE_Y * SIZE_X):
        at = offset_of(n, y * STEP_Y + i // SIZE_X, x * STEP_X + i % SIZE_X, z_strides)
        z = load_tile(z_pointer, z_strides, at, channel, mask, PIXELS)
        gate = z
        if GATED:
            gate = load_tile(z_pointer, z_strides, at, channel + channels, mask, PIXELS)
            a = tanh(z) * sigmoid(gate)
        else:
            a = activate(z, ACTIVATION)
        if POOL == "max":
            better = (a > out) | (a != a) & (out == out) | (i == 0)
            out = tl.where(better, a, out)
            chosen_z = tl.where(better, z, chosen_z)
            chosen_gate = tl.where(better, gate, chosen_gate)
            position = tl.where(better, i, position)
        else:
            out += a
    if POOL == "max":
        if pre_pointer is not None:
            at = offset_of(n, y, x, pre_strides)
            store_tile(pre_pointer, pre_strides, chosen_z, at, channel, mask, PIXELS)
            if GATED:
                store_tile(pre_pointer, pre_strides, chosen_gate, at, channel + channels, mask, PIXELS)
        if index_pointer is not None:
            if ACTIVATION == "relu":
                position = tl.where(out <= 0, NO_GRADIENT, position)
            at = offset_of(n, y, x, index_strides)
            store_tile(index_pointer, index_strides, position, at, channel, mask, PIXELS)
    else:
        out *= 1.0 / (SIZE_Y * SIZE_X)
    store_tile(out_pointer, out_strides, out, offset_of(n, y, x, out_strides), channel, mask, PIXELS)


@triton.jit(do_not_specialize=["batch", "height", "width", "out_height", "out_width"])
def spread_kernel(
    grad_pointer, out_pointer,  # [N, C, out_height, out_width]
    index_pointer, pre_pointer,  # as saved by the forward; read only where the activation and the pool need them
    d_pointer,  # [N, C, height, width], [N, 2 C, ..] if gated; None: the sums only
    sums_pointer,  # [tiles, C or 2 C] float32, or None
    grad_strides, out_strides, index_strides, pre_strides, d_strides,
    batch, channels, height, width, out_height, out_width,
    ACTIVATION: tl.constexpr, POOL: tl.constexpr, SIZE_Y: tl.constexpr, SIZE_X: tl.constexpr,
    STEP_Y: tl.constexpr, STEP_X: tl.constexpr, PIXELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    GATED: tl.constexpr = ACTIVATION == "tanh_sigmoid"
    FROM_PRE: tl.constexpr = GATED or ACTIVATION == "gelu" or ACTIVATION == "silu"
    tiles_n = tl.cdiv(channels, BLOCK_N)
    tile = tl.program_id(0) // tiles_n
    channel = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n, y, x, exists = pixels_of(tile * BLOCK_M, height, width, batch, BLOCK_M, 1, 1)
    wanted = channel < channels
    mask = along(exists, PIXELS) & along(wanted, 1 - PIXELS)
    d = empty_tile(PIXELS, BLOCK_M, BLOCK_N)
    d_gate = d
    REACH_X: tl.constexpr = (SIZE_X + STEP_X - 1) // STEP_X  # windows that hold a pixel, along one axis
    for i in range(0, (SIZE_Y + STEP_Y - 1) // STEP_Y * REACH_X):
        out_y, out_x = y // STEP_Y - i // REACH_X, x // STEP_X - i % REACH_X
        in_y, in_x = y - out_y * STEP_Y, x - out_x * STEP_X  # the pixel's place in the window
        holds = (
            (out_y >= 0) & (out_y < out_height) & (in_y < SIZE_Y) & (out_x >= 0) & (out_x < out_width) & (in_x < SIZE_X)
        )
        window = mask & along(holds, PIXELS)
        at = offset_of(n, out_y, out_x, grad_strides)
        g = load_tile(grad_pointer, grad_strides, at, channel, window, PIXELS)
        if POOL == "max":
            at = offset_of(n, out_y, out_x, index_strides)
            position = load_tile(index_pointer, index_strides, at, channel, window, PIXELS).to(tl.int32)
            chosen = window & (position == along(in_y * SIZE_X + in_x, PIXELS))
            out, z, gate = g, g, g
            if FROM_PRE:
                at = offset_of(n, out_y, out_x, pre_strides)
                z = load_tile(pre_pointer, pre_strides, at, channel, chosen, PIXELS)
                if GATED:
                    gate = load_tile(pre_pointer, pre_strides, at, channel + channels, chosen, PIXELS)
            elif ACTIVATION != "none" and ACTIVATION != "relu":  # the index tells of a ReLU
                out = load_tile(
                    out_pointer, out_strides, offset_of(n, out_y, out_x, out_strides), channel, chosen, PIXELS
                )
            if ACTIVATION == "relu":
                g_gate = g
            else:
                g, g_gate = activation_gradient(g, out, z, gate, ACTIVATION)
            d += tl.where(chosen, g, 0.0)
            d_gate += tl.where(chosen, g_gate, 0.0)
        else:
            d += g
    if POOL != "max":
        d *= 1.0 / (SIZE_Y * SIZE_X)
        out, z, gate = d, d, d
        if (POOL == "avg" and ACTIVATION != "none") or FROM_PRE:
            at = offset_of(n, y, x, pre_strides)
            z = load_tile(pre_pointer, pre_strides, at, channel, mask, PIXELS)
            if GATED:
                gate = load_tile(pre_pointer, pre_strides, at, channel + channels, mask, PIXELS)
            else:
                out = activate(z, ACTIVATION)
        elif ACTIVATION != "none":
            out = load_tile(out_pointer, out_strides, offset_of(n, y, x, out_strides), channel, mask, PIXELS)
        d, d_gate = activation_gradient(d, out, z, gate, ACTIVATION)
        d, d_gate = tl.where(mask, d, 0.0), tl.where(mask, d_gate, 0.0)

    if d_pointer is not None:
        at = offset_of(n, y, x, d_strides)
        store_tile(d_pointer, d_strides, d, at, channel, mask, PIXELS)
        if GATED:
            store_tile(d_pointer, d_strides, d_gate, at, channel + channels, mask, PIXELS)
    if sums_pointer is not None:
        row = sums_pointer + tl.cast(tile, tl.int64) * (2 * channels if GATED else channels) + channel
        tl.store(row, tl.sum(d, PIXELS), mask=wanted)
        if GATED:
            tl.store(row + channels, tl.sum(d_gate, PIXELS), mask=wanted)
