"""Convolution in Triton as an implicit GEMM, and directly where there is one channel to a group; forward and dgrad.

out[n, o, q] = epilogue(sum over taps t and channels c of in[n, c, pixel that q meets through t] * weight[o, c, t])

A program owns BLOCK_M pixels of all images (of one phase, see triton_tile.py) by BLOCK_N output channels of one group, and sums
over taps * channels, BLOCK_K at a time; no patch matrix is ever written. Where BLOCK_K divides the channels, a step has one
tap, and reads along the channels; otherwise (FLAT) steps run across taps, so that few channels, as in a first layer, still
fill the matrix units. Programs that share pixels follow each other: the input stays in L2, as the weights do.
The epilogue is that of triton_tile.finish: bias, scale, shift, residual, activation, pool, in float32, rounded once. A gate
("tanh_sigmoid") is the second product of the same pixels, with the other half of the channels.
direct_kernel: groups of one input channel (depthwise), without matrix units: pixels by channels, tap after tap.
Saved for backward: out, the index of a max-pool, and z where the activation's derivative needs it.
Floor: 2 N P Q Cout taps Cin / groups operations over the peak of the matrix units; in, weight, residual read and out written
once. direct_kernel: those bytes.
"""

import triton
import triton.language as tl

from bigmodel_kernels.ops.conv.triton_tile import along, finish, offset_of, phase_of, pixels_of

SIZES = ["in_height", "in_width", "height", "batch", "origin_y", "origin_x"]


@triton.jit
def load_step(
    in_pointer, in_strides, w_pointer, w_strides, at, y, x, exists, in_height, in_width,
    tap_y, tap_x, c, c_wanted, w_column, w_wanted, first_tap_y, first_tap_x,
    WIDTH: tl.constexpr, JUMP_Y: tl.constexpr, JUMP_X: tl.constexpr, TAP_STEP_Y: tl.constexpr, TAP_STEP_X: tl.constexpr,
    FLAT: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """One step's tiles of input and weight, whose channels c lie on axis 1 - PIXELS of the one and PIXELS of the other.

    tap_y, tap_x count the taps of the phase; if FLAT they are vectors like c.
    """
    c_offset = c.to(tl.int64) * in_strides[1]
    w_offset = c.to(tl.int64) * w_strides[1]
    moved = (tap_y * JUMP_Y).to(tl.int64) * in_strides[2] + (tap_x * JUMP_X).to(tl.int64) * in_strides[3]
    tap = (first_tap_y + tap_y * TAP_STEP_Y) * WIDTH + first_tap_x + tap_x * TAP_STEP_X
    if FLAT:
        in_y = along(y, PIXELS) + along(tap_y * JUMP_Y, 1 - PIXELS)
        in_x = along(x, PIXELS) + along(tap_x * JUMP_X, 1 - PIXELS)
    else:
        in_y = along(y + tap_y * JUMP_Y, PIXELS)
        in_x = along(x + tap_x * JUMP_X, PIXELS)
    inside = (in_y >= 0) & (in_y < in_height) & (in_x >= 0) & (in_x < in_width) & along(exists, PIXELS)
    w_inside = along(w_wanted, 1 - PIXELS)
    if FLAT:
        inside = inside & along(c_wanted, 1 - PIXELS)
        w_inside = w_inside & along(c_wanted, PIXELS)
    in_pointers = in_pointer + (along(at, PIXELS) + along(c_offset + moved, 1 - PIXELS))
    w_pointers = w_pointer + (along(w_column, 1 - PIXELS) + along(w_offset + tap * w_strides[2], PIXELS))
    return tl.load(in_pointers, mask=inside, other=0.0), w_pointers, w_inside


@triton.jit
def multiply(in_tile, w_tile, acc, PIXELS: tl.constexpr, PRECISION: tl.constexpr):
    """acc [pixels, channels], the long side first, as the matrix units of sm_90 want it."""
    if PIXELS == 1:
        in_tile, w_tile = tl.trans(in_tile), tl.trans(w_tile)
    return tl.dot(in_tile, w_tile, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=SIZES)
def product_kernel(
    in_pointer,  # [N, groups * channels, in_height, in_width]
    w_pointer,  # [groups, columns, taps, channels] by w_strides (group, channel, tap, column)
    bias_pointer, scale_pointer, shift_pointer,  # [Cout], or None
    residual_pointer,  # [N, Cout, height, width], or None
    out_pointer,  # [N, Cout, ..]; pooled, half of the channels if gated
    index_pointer, pre_pointer,  # what the backward needs of a max-pool and of the activation, or None
    in_strides, w_strides, residual_strides, out_strides, index_strides, pre_strides,
    batch, in_height, in_width, height, width, origin_y, origin_x, groups, channels, columns, gate,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, STEP_Y: tl.constexpr, STEP_X: tl.constexpr,
    DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr, JUMP_Y: tl.constexpr, JUMP_X: tl.constexpr,
    PHASES_Y: tl.constexpr, PHASES_X: tl.constexpr, TAP_STEP_Y: tl.constexpr, TAP_STEP_X: tl.constexpr,
    INVERSE_Y: tl.constexpr, INVERSE_X: tl.constexpr, ACTIVATION: tl.constexpr, POOL: tl.constexpr,
    WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr, PIXELS: tl.constexpr, PRECISION: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(columns, BLOCK_N)
    program = tl.program_id(0)
    column = program % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    program //= tiles_n
    group = program % groups
    program //= groups
    phase_y, phase_x = program % PHASES_Y, program // PHASES_Y % PHASES_X
    start_m = program // (PHASES_Y * PHASES_X) * BLOCK_M
    count_y, taps_y, tap_y0, first_y = phase_of(
        phase_y, origin_y, height, KERNEL_Y, DILATION_Y, PHASES_Y, TAP_STEP_Y, INVERSE_Y
    )
    count_x, taps_x, tap_x0, first_x = phase_of(
        phase_x, origin_x, width, KERNEL_X, DILATION_X, PHASES_X, TAP_STEP_X, INVERSE_X
    )
    n, y, x, exists = pixels_of(start_m, count_y, count_x, batch, BLOCK_M, WINDOW_Y, WINDOW_X)
    y, x = y * STEP_Y + first_y, x * STEP_X + first_x
    at = offset_of(n, y, x, in_strides)
    in_group = in_pointer + (group * channels).to(tl.int64) * in_strides[1]
    w_group = w_pointer + group.to(tl.int64) * w_strides[0]
    w_column = column.to(tl.int64) * w_strides[3]
    wanted = column < columns

    GATED: tl.constexpr = ACTIVATION == "tanh_sigmoid"
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_gate = acc
    total = taps_y * taps_x * channels
    for start in range(0, total, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if FLAT > 0:
            tap, c = k // FLAT, k % FLAT
        else:
            tap, c = start // channels, tl.multiple_of(start % channels, BLOCK_K) + tl.arange(0, BLOCK_K)
        in_tile, w_pointers, w_inside = load_step(
            in_group, in_strides, w_group, w_strides, at, y, x, exists, in_height, in_width,
            tap // tl.maximum(taps_x, 1), tap % tl.maximum(taps_x, 1), c, k < total, w_column, wanted, tap_y0, tap_x0,
            KERNEL_X, JUMP_Y, JUMP_X, TAP_STEP_Y, TAP_STEP_X, FLAT > 0, PIXELS,
        )  # fmt: skip
        acc = multiply(in_tile, tl.load(w_pointers, mask=w_inside, other=0.0), acc, PIXELS, PRECISION)
        if GATED:
            w_tile = tl.load(w_pointers + tl.cast(gate, tl.int64) * w_strides[3], mask=w_inside, other=0.0)
            acc_gate = multiply(in_tile, w_tile, acc_gate, PIXELS, PRECISION)

    if PIXELS == 1:
        acc, acc_gate = tl.trans(acc), tl.trans(acc_gate)
    finish(
        acc, acc_gate, start_m, count_y, count_x, batch, phase_y, phase_x, group * columns + column, wanted, gate,
        bias_pointer, scale_pointer, shift_pointer, residual_pointer, out_pointer, index_pointer, pre_pointer,
        residual_strides, out_strides, index_strides, pre_strides,
        PHASES_Y, PHASES_X, ACTIVATION, POOL, WINDOW_Y, WINDOW_X, PIXELS, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def direct_kernel(
    in_pointer,  # [N, groups * channels, in_height, in_width]
    w_pointer,  # [groups, columns, taps, channels] by w_strides (group, channel, tap, column)
    bias_pointer, scale_pointer, shift_pointer, residual_pointer, out_pointer, index_pointer, pre_pointer,
    in_strides, w_strides, residual_strides, out_strides, index_strides, pre_strides,
    batch, in_height, in_width, height, width, origin_y, origin_x, groups, channels, columns, gate,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, STEP_Y: tl.constexpr, STEP_X: tl.constexpr,
    DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr, JUMP_Y: tl.constexpr, JUMP_X: tl.constexpr,
    PHASES_Y: tl.constexpr, PHASES_X: tl.constexpr, TAP_STEP_Y: tl.constexpr, TAP_STEP_X: tl.constexpr,
    INVERSE_Y: tl.constexpr, INVERSE_X: tl.constexpr, ACTIVATION: tl.constexpr, POOL: tl.constexpr,
    WINDOW_Y: tl.constexpr, WINDOW_X: tl.constexpr, PIXELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program's BLOCK_N output channels run over groups: output channel o has the input channels of group o // columns."""
    outputs = groups * columns
    tiles_n = tl.cdiv(outputs, BLOCK_N)
    program = tl.program_id(0)
    o = program % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    program //= tiles_n
    phase_y, phase_x = program % PHASES_Y, program // PHASES_Y % PHASES_X
    start_m = program // (PHASES_Y * PHASES_X) * BLOCK_M
    count_y, taps_y, tap_y0, first_y = phase_of(
        phase_y, origin_y, height, KERNEL_Y, DILATION_Y, PHASES_Y, TAP_STEP_Y, INVERSE_Y
    )
    count_x, taps_x, tap_x0, first_x = phase_of(
        phase_x, origin_x, width, KERNEL_X, DILATION_X, PHASES_X, TAP_STEP_X, INVERSE_X
    )
    n, y, x, exists = pixels_of(start_m, count_y, count_x, batch, BLOCK_M, WINDOW_Y, WINDOW_X)
    y, x = y * STEP_Y + first_y, x * STEP_X + first_x
    at = offset_of(n, y, x, in_strides)
    wanted = o < outputs
    group = (o // columns).to(tl.int64)
    in_channel = group * channels * in_strides[1]
    w_channel = group * w_strides[0] + (o % columns) * w_strides[3]

    if PIXELS == 0:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    else:
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for c in range(0, channels):
        for tap_y in range(0, taps_y):
            in_y = y + tap_y * JUMP_Y
            row_exists = exists & (in_y >= 0) & (in_y < in_height)
            for tap_x in range(0, taps_x):
                in_x = x + tap_x * JUMP_X
                inside = row_exists & (in_x >= 0) & (in_x < in_width)
                moved = (
                    tl.cast(tap_y * JUMP_Y, tl.int64) * in_strides[2]
                    + tl.cast(tap_x * JUMP_X, tl.int64) * in_strides[3]
                )
                tap = (tap_y0 + tap_y * TAP_STEP_Y) * KERNEL_X + tap_x0 + tap_x * TAP_STEP_X
                pointers = in_pointer + (
                    along(at + moved, PIXELS) + along(in_channel + tl.cast(c, tl.int64) * in_strides[1], 1 - PIXELS)
                )
                mask = along(inside, PIXELS) & along(wanted, 1 - PIXELS)
                w = tl.load(w_pointer + w_channel + c * w_strides[1] + tap * w_strides[2], mask=wanted, other=0.0)
                tile = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
                acc += tile * along(w.to(tl.float32), 1 - PIXELS)

    finish(
        acc, acc, start_m, count_y, count_x, batch, phase_y, phase_x, o, wanted, gate,
        bias_pointer, scale_pointer, shift_pointer, residual_pointer, out_pointer, index_pointer, pre_pointer,
        residual_strides, out_strides, index_strides, pre_strides,
        PHASES_Y, PHASES_X, ACTIVATION, POOL, WINDOW_Y, WINDOW_X, PIXELS, BLOCK_M, BLOCK_N,
    )  # fmt: skip
