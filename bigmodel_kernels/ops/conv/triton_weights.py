"""The gradient of the convolution's weight in Triton, in partial sums.

dw[r, t, c] = sum over images n and pixels p of narrow[n, r, p] * wide[n, c, p * stride - padding + t * dilation]
`wide` is the side with more pixels: x of a convolution, d of a transposed one; see reference.py.

weights_kernel: a program owns BLOCK_N narrow channels by BLOCK_M taps * channels of one group, and one chunk of the pixels,
BLOCK_K at a time. direct_weights_kernel (groups of one wide channel): BLOCK_N narrow channels by BLOCK_K taps, BLOCK_M pixels at
a time, without matrix units. Either leaves its sums in float32; the chunks are added up in their order by a second step, so that
every run gives the same bits.
Floor: as the forward; the partial sums, written and read once, are at most PROGRAMS tiles (triton_configs.py).
"""

import triton
import triton.language as tl

from bigmodel_kernels.ops.conv.triton_tile import along, offset_of, pixels_of

SIZES = ["batch", "wide_height", "wide_width", "height", "pad_y", "pad_x", "chunk"]


@triton.jit(do_not_specialize=SIZES)
def weights_kernel(
    wide_pointer,  # [N, groups * wide, wide_height, wide_width]
    narrow_pointer,  # [N, groups * narrow, height, width]
    partial_pointer,  # [chunks, groups * narrow, taps * wide] float32
    wide_strides, narrow_strides, batch, wide_height, wide_width, height, width, pad_y, pad_x, groups, wide, narrow, chunk,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, STEP_Y: tl.constexpr, STEP_X: tl.constexpr,
    DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr, WIDE_PIXELS: tl.constexpr, NARROW_PIXELS: tl.constexpr,
    PRECISION: tl.constexpr, FLAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    columns = KERNEL_Y * KERNEL_X * wide
    tiles_m, tiles_n = tl.cdiv(columns, BLOCK_M), tl.cdiv(narrow, BLOCK_N)
    program = tl.program_id(0)
    start_m = program % tiles_m * BLOCK_M
    program //= tiles_m
    row = program % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    program //= tiles_n
    group, part = program % groups, program // groups

    k = start_m + tl.arange(0, BLOCK_M)
    if FLAT:
        tap, c = k // wide, k % wide
    else:
        tap, c = start_m // wide, tl.multiple_of(start_m % wide, BLOCK_M) + tl.arange(0, BLOCK_M)
    move_y, move_x = tap // KERNEL_X * DILATION_Y - pad_y, tap % KERNEL_X * DILATION_X - pad_x
    moved = move_y.to(tl.int64) * wide_strides[2] + move_x.to(tl.int64) * wide_strides[3]
    wide_channel = moved + (group * wide + c).to(tl.int64) * wide_strides[1]
    narrow_channel = (group * narrow + row).to(tl.int64) * narrow_strides[1]
    wanted, row_wanted = k < columns, row < narrow

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, batch * height * width), BLOCK_K):
        n, y, x, exists = pixels_of(start, height, width, batch, BLOCK_K, 1, 1)
        at = offset_of(n, y, x, narrow_strides)
        pointers = narrow_pointer + (along(at, NARROW_PIXELS) + along(narrow_channel, 1 - NARROW_PIXELS))
        mask = along(exists, NARROW_PIXELS) & along(row_wanted, 1 - NARROW_PIXELS)
        narrow_tile = tl.load(pointers, mask=mask, other=0.0)
        y, x = y * STEP_Y, x * STEP_X
        at = offset_of(n, y, x, wide_strides)
        if FLAT:
            in_y = along(y, WIDE_PIXELS) + along(move_y, 1 - WIDE_PIXELS)
            in_x = along(x, WIDE_PIXELS) + along(move_x, 1 - WIDE_PIXELS)
        else:
            in_y, in_x = along(y + move_y, WIDE_PIXELS), along(x + move_x, WIDE_PIXELS)
        mask = (in_y >= 0) & (in_y < wide_height) & (in_x >= 0) & (in_x < wide_width)
        mask = mask & along(exists, WIDE_PIXELS) & along(wanted, 1 - WIDE_PIXELS)
        pointers = wide_pointer + (along(at, WIDE_PIXELS) + along(wide_channel, 1 - WIDE_PIXELS))
        wide_tile = tl.load(pointers, mask=mask, other=0.0)
        if NARROW_PIXELS == 1:
            narrow_tile = tl.trans(narrow_tile)
        if WIDE_PIXELS == 0:
            wide_tile = tl.trans(wide_tile)
        acc = tl.dot(wide_tile, narrow_tile, acc, input_precision=PRECISION)

    out_row = (part * groups + group).to(tl.int64) * narrow + row
    pointers = partial_pointer + (out_row[None, :] * columns + k[:, None])
    tl.store(pointers, acc, mask=row_wanted[None, :] & wanted[:, None])


@triton.jit(do_not_specialize=SIZES)
def direct_weights_kernel(
    wide_pointer,  # [N, groups, wide_height, wide_width]
    narrow_pointer,  # [N, groups * narrow, height, width]
    partial_pointer,  # [chunks, groups * narrow, taps] float32
    wide_strides, narrow_strides, batch, wide_height, wide_width, height, width, pad_y, pad_x, groups, wide, narrow, chunk,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, STEP_Y: tl.constexpr, STEP_X: tl.constexpr,
    DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr, WIDE_PIXELS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tiles are taps by pixels by channels, or taps by channels by pixels: their last axis is the one to read `wide` along."""
    TAPS: tl.constexpr = KERNEL_Y * KERNEL_X
    channels = groups * narrow
    tiles_t, tiles_n = tl.cdiv(TAPS, BLOCK_K), tl.cdiv(channels, BLOCK_N)
    program = tl.program_id(0)
    tap = program % tiles_t * BLOCK_K + tl.arange(0, BLOCK_K)
    program //= tiles_t
    channel = program % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    part = program // tiles_n
    wanted, tap_wanted = channel < channels, tap < TAPS
    move_y, move_x = tap // KERNEL_X * DILATION_Y - pad_y, tap % KERNEL_X * DILATION_X - pad_x
    moved = move_y.to(tl.int64) * wide_strides[2] + move_x.to(tl.int64) * wide_strides[3]
    narrow_channel = channel.to(tl.int64) * narrow_strides[1]
    wide_channel = (channel // narrow).to(tl.int64) * wide_strides[1]

    if WIDE_PIXELS == 0:
        acc = tl.zeros([BLOCK_K, BLOCK_M, BLOCK_N], tl.float32)
    else:
        acc = tl.zeros([BLOCK_K, BLOCK_N, BLOCK_M], tl.float32)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, batch * height * width), BLOCK_M):
        n, y, x, exists = pixels_of(start, height, width, batch, BLOCK_M, 1, 1)
        at = offset_of(n, y, x, narrow_strides)
        pointers = narrow_pointer + (along(at, WIDE_PIXELS) + along(narrow_channel, 1 - WIDE_PIXELS))
        mask = along(exists, WIDE_PIXELS) & along(wanted, 1 - WIDE_PIXELS)
        narrow_tile = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        in_y = along(y * STEP_Y, WIDE_PIXELS)[None, :, :] + move_y[:, None, None]
        in_x = along(x * STEP_X, WIDE_PIXELS)[None, :, :] + move_x[:, None, None]
        inside = (in_y >= 0) & (in_y < wide_height) & (in_x >= 0) & (in_x < wide_width) & tap_wanted[:, None, None]
        at = offset_of(n, y * STEP_Y, x * STEP_X, wide_strides)
        offset = (along(at, WIDE_PIXELS) + along(wide_channel, 1 - WIDE_PIXELS))[None, :, :] + moved[:, None, None]
        wide_tile = tl.load(wide_pointer + offset, mask=inside & mask[None, :, :], other=0.0).to(tl.float32)
        acc += wide_tile * narrow_tile[None, :, :]

    row = tl.cast(part, tl.int64) * channels + channel
    tl.store(
        partial_pointer + (row[None, :] * TAPS + tap[:, None]),
        tl.sum(acc, 1 + WIDE_PIXELS),
        mask=tap_wanted[:, None] & wanted[None, :],
    )
