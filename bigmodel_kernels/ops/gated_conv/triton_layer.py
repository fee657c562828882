"""WaveNet's layer in Triton; see reference.py for the formulas.

forward_kernel: a program owns BLOCK_M time steps of all sequences, all values and all output channels. Both halves of z are sums
over taps * channels of x; a = tanh(first) * sigmoid(second) is rounded to the dtype of x and stays on chip as the left operand of
the two 1x1 products, whose epilogues add bias and x, bias and skip.
gradient_kernel: a program owns BLOCK_M time steps by BLOCK_D values. It computes z again, d_a = W_out^T d_out + W_skip^T d_skip,
and stores d_z, a, which the gradients of the 1x1 weights need, and the sums of d_z over its steps, which a second step adds up in
the order of the programs: the gradient of the bias. The products that are left are those of convolution.
Saved for backward: nothing.
Bytes: what a step of a sequence reads and writes, in elements. Forward: C + S read, C + S written, where three convolutions have
3 D + C more, a written once and read twice, x read twice. Backward, without the products that are left: C + C + S read and 3 D
written, where convolutions and PyTorch's pointwise ops read and write 47 D for z, t, s, d_a and d_z.
Floor: 2 N T (2 D C K + D C + D S) operations over the peak of the matrix units, or those bytes.
Refuses: more values than triton_configs.py has a row for (forward_kernel).
"""

import triton
import triton.language as tl

from bigmodel_kernels._triton import sigmoid, tanh
from bigmodel_kernels.ops.conv.triton_tile import along, load_tile, store_tile

SIZES = ["batch", "length", "dilation"]


@triton.jit
def steps_of(start, batch, length, BLOCK_M: tl.constexpr):
    """(sequence, time step, whether there is one) of BLOCK_M steps."""
    i = start.to(tl.int64) + tl.arange(0, BLOCK_M)
    n, t = i // length, i % length
    return n, t, n < batch


@triton.jit
def gates(
    x_pointer, x_strides, w_pointer, bias_pointer, n, t, exists, value, values, channels, dilation,
    KERNEL: tl.constexpr, PIXELS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(tanh of the first half, sigmoid of the second) of these values, float32 [BLOCK_M, BLOCK_D]; w is [2 D, KERNEL, C]."""
    wanted = value < values
    at = n * x_strides[0] + t * x_strides[2]
    row = value.to(tl.int64) * (KERNEL * channels)
    half = tl.cast(values, tl.int64) * (KERNEL * channels)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc_gate = acc
    blocks = tl.cdiv(channels, BLOCK_K)
    for i in range(0, KERNEL * blocks):
        tap = i // blocks
        c = tl.multiple_of(i % blocks * BLOCK_K, BLOCK_K) + tl.arange(0, BLOCK_K)
        delay = tl.cast(dilation, tl.int64) * (KERNEL - 1 - tap)
        inside = along(exists & (t >= delay), PIXELS) & along(c < channels, 1 - PIXELS)
        c_offset = c.to(tl.int64) * x_strides[1] - delay * x_strides[2]
        x = tl.load(x_pointer + (along(at, PIXELS) + along(c_offset, 1 - PIXELS)), mask=inside, other=0.0)
        if PIXELS == 1:
            x = tl.trans(x)
        w_pointers = w_pointer + (row[None, :] + (tap * channels + c)[:, None])
        w_inside = wanted[None, :] & (c < channels)[:, None]
        acc = tl.dot(x, tl.load(w_pointers, mask=w_inside, other=0.0), acc, input_precision=PRECISION)
        w = tl.load(w_pointers + half, mask=w_inside, other=0.0)
        acc_gate = tl.dot(x, w, acc_gate, input_precision=PRECISION)
    if bias_pointer is not None:
        acc += tl.load(bias_pointer + value, mask=wanted, other=0.0).to(tl.float32)[None, :]
        acc_gate += tl.load(bias_pointer + values + value, mask=wanted, other=0.0).to(tl.float32)[None, :]
    return tanh(acc), sigmoid(acc_gate)


@triton.jit
def mix(
    a, value, values, rows, w_pointer, bias_pointer, added_pointer, added_strides, out_pointer, out_strides, n, t, exists,
    PIXELS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = added + w a + bias; a is [BLOCK_M, BLOCK_D], w [rows, values]."""
    for start in range(0, rows, BLOCK_N):
        row = tl.multiple_of(start, BLOCK_N) + tl.arange(0, BLOCK_N)
        wanted = row < rows
        w_pointers = w_pointer + (row.to(tl.int64)[None, :] * values + value[:, None])
        w = tl.load(w_pointers, mask=wanted[None, :] & (value < values)[:, None], other=0.0)
        y = tl.dot(a, w, input_precision=PRECISION)
        if bias_pointer is not None:
            y += tl.load(bias_pointer + row, mask=wanted, other=0.0).to(tl.float32)[None, :]
        if PIXELS == 1:
            y = tl.trans(y)
        mask = along(exists, PIXELS) & along(wanted, 1 - PIXELS)
        if added_pointer is not None:
            at = n * added_strides[0] + t * added_strides[2]
            y += load_tile(added_pointer, added_strides, at, row, mask, PIXELS)
        store_tile(out_pointer, out_strides, y, n * out_strides[0] + t * out_strides[2], row, mask, PIXELS)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    x_pointer,  # [N, C, T]
    w_pointer, bias_pointer,  # [2 D, KERNEL, C], [2 D]
    out_w_pointer, out_bias_pointer, out_pointer,  # [C, D], [C], [N, C, T]
    skip_w_pointer, skip_bias_pointer, skip_pointer, total_pointer,  # [S, D], [S], [N, S, T], [N, S, T]
    x_strides, out_strides, skip_strides, total_strides,
    batch, length, channels, values, skips, dilation,
    KERNEL: tl.constexpr, PIXELS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n, t, exists = steps_of(tl.program_id(0) * BLOCK_M, batch, length, BLOCK_M)
    value = tl.arange(0, BLOCK_D)
    first, second = gates(
        x_pointer, x_strides, w_pointer, bias_pointer, n, t, exists, value, values, channels, dilation,
        KERNEL, PIXELS, PRECISION, BLOCK_M, BLOCK_D, BLOCK_K,
    )  # fmt: skip
    a = (first * second).to(x_pointer.dtype.element_ty)
    if out_w_pointer is not None:
        mix(
            a, value, values, channels, out_w_pointer, out_bias_pointer, x_pointer, x_strides, out_pointer, out_strides,
            n, t, exists, PIXELS, PRECISION, BLOCK_K,
        )  # fmt: skip
    if skip_w_pointer is not None:
        mix(
            a, value, values, skips, skip_w_pointer, skip_bias_pointer, skip_pointer, skip_strides, total_pointer,
            total_strides, n, t, exists, PIXELS, PRECISION, BLOCK_K,
        )  # fmt: skip


@triton.jit
def mix_gradient(
    d_a, d_pointer, d_strides, w_pointer, n, t, exists, value, values, rows,
    PIXELS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """d_a + w^T d, [BLOCK_M, BLOCK_D]."""
    at = n * d_strides[0] + t * d_strides[2]
    for start in range(0, rows, BLOCK_N):
        row = tl.multiple_of(start, BLOCK_N) + tl.arange(0, BLOCK_N)
        mask = along(exists, PIXELS) & along(row < rows, 1 - PIXELS)
        d_offset = row.to(tl.int64) * d_strides[1]
        d = tl.load(d_pointer + (along(at, PIXELS) + along(d_offset, 1 - PIXELS)), mask=mask, other=0.0)
        if PIXELS == 1:
            d = tl.trans(d)
        w_pointers = w_pointer + (row.to(tl.int64)[:, None] * values + value[None, :])
        w = tl.load(w_pointers, mask=(row < rows)[:, None] & (value < values)[None, :], other=0.0)
        d_a = tl.dot(d, w, d_a, input_precision=PRECISION)
    return d_a


@triton.jit(do_not_specialize=SIZES)
def gradient_kernel(
    x_pointer, w_pointer, bias_pointer,  # as above
    d_out_pointer, out_w_pointer, d_skip_pointer, skip_w_pointer,  # [N, C, T], [C, D], [N, S, T], [S, D]; d None: left out
    a_pointer, d_z_pointer,  # [N, D, T] or None, [N, 2 D, T]
    sums_pointer,  # [tiles, 2 D] float32, or None
    x_strides, d_out_strides, d_skip_strides, a_strides, d_z_strides,
    batch, length, channels, values, skips, dilation,
    KERNEL: tl.constexpr, PIXELS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_d = tl.cdiv(values, BLOCK_D)
    tile = tl.program_id(0) // tiles_d
    value = tl.program_id(0) % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    wanted = value < values
    n, t, exists = steps_of(tile * BLOCK_M, batch, length, BLOCK_M)
    first, second = gates(
        x_pointer, x_strides, w_pointer, bias_pointer, n, t, exists, value, values, channels, dilation,
        KERNEL, PIXELS, PRECISION, BLOCK_M, BLOCK_D, BLOCK_K,
    )  # fmt: skip
    mask = along(exists, PIXELS) & along(wanted, 1 - PIXELS)
    if a_pointer is not None:
        a = first * second
        if PIXELS == 1:
            a = tl.trans(a)
        store_tile(a_pointer, a_strides, a, n * a_strides[0] + t * a_strides[2], value, mask, PIXELS)
    d_a = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if d_out_pointer is not None:
        d_a = mix_gradient(
            d_a, d_out_pointer, d_out_strides, out_w_pointer, n, t, exists, value, values, channels,
            PIXELS, PRECISION, BLOCK_K,
        )  # fmt: skip
    if d_skip_pointer is not None:
        d_a = mix_gradient(
            d_a, d_skip_pointer, d_skip_strides, skip_w_pointer, n, t, exists, value, values, skips,
            PIXELS, PRECISION, BLOCK_K,
        )  # fmt: skip
    d_first = d_a * second * (1.0 - first * first)
    d_second = d_a * first * second * (1.0 - second)
    if sums_pointer is not None:  # d of steps that do not exist is 0
        row = sums_pointer + tl.cast(tile, tl.int64) * (2 * values) + value
        tl.store(row, tl.sum(d_first, 0), mask=wanted)
        tl.store(row + values, tl.sum(d_second, 0), mask=wanted)
    if PIXELS == 1:
        d_first, d_second = tl.trans(d_first), tl.trans(d_second)
    at = n * d_z_strides[0] + t * d_z_strides[2]
    store_tile(d_z_pointer, d_z_strides, d_first, at, value, mask, PIXELS)
    store_tile(d_z_pointer, d_z_strides, d_second, at, value + values, mask, PIXELS)
