"""Bias, activation, dropout and residual in Triton, forward and backward.

    y = keep activation(x + bias) / (1 - p) + residual        dz = keep dy / (1 - p) activation'(x + bias)

Program: forward, BLOCK_R rows by BLOCK_C columns; backward, the same columns of one block of rows after the other, `chunk`
rows in all, whose sums for the bias are its part of `partial`, added up afterwards in a fixed order.
Saved for backward: nothing but the inputs: z is computed again, and dropout's numbers are drawn again (Philox, counted by
row and column: see reference.dropout_keep).
Arithmetic is float32; offsets are int64 from the row on.
Floor: memory: x, residual read and y written; backward x, dy read and dx written.
"""

import triton
import triton.language as tl

from bigmodel_kernels import _tuned
from bigmodel_kernels.ops.attention.triton_tile import keep_tile
from bigmodel_kernels.ops.conv.triton_tile import activate, activation_gradient

SIZES = ["rows", "chunk", "threshold"]
ELEMENTS = 1024  # of a program's tile
LARGEST_BLOCK_C = 512


@_tuned.cached
def blocks(device: int | None, kernel: str, element_size: int, columns: int) -> dict[str, int]:
    """The launch constants of a kernel, forward or backward, for rows of so many columns."""
    block_c = min(LARGEST_BLOCK_C, max(16, triton.next_power_of_2(columns)))
    sizes = {"BLOCK_R": ELEMENTS // block_c, "BLOCK_C": block_c, "num_warps": 4}
    return _tuned.choose(_tuned.Row("bias_act", kernel, f"{8 * element_size}-bit", block_c), device, sizes)


@triton.jit
def place(first, tile, rows, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows [BLOCK_R, 1] (int64) from `first` on, columns [1, BLOCK_C], and which pairs exist."""
    row = (tl.cast(first, tl.int64) + tl.arange(0, BLOCK_R))[:, None]
    column = (tile * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    return row, column, (row < rows) & (column < columns)


@triton.jit
def load_sum(x_pointer, x_stride, bias_pointer, row, column, columns, inside):
    """x + bias as float32."""
    z = tl.load(x_pointer + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if bias_pointer is not None:
        z += tl.load(bias_pointer + column, mask=column < columns, other=0.0).to(tl.float32)
    return z


@triton.jit
def drop(y, seed_pointer, first, tile, threshold, kept, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    if seed_pointer is not None:
        row = tl.cast(first, tl.int32)
        keep = keep_tile(tl.load(seed_pointer), row, tile * BLOCK_C, 0, threshold, BLOCK_R, BLOCK_C, False)
        y = tl.where(keep, y * kept, 0.0)
    return y


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    x_pointer,  # [rows, columns]
    bias_pointer,  # [columns], or None
    residual_pointer,  # [rows, columns], or None
    seed_pointer,  # [1], or None for no dropout
    y_pointer,  # [rows, columns], contiguous
    rows, columns, x_stride, residual_stride, threshold, kept,
    ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(columns, BLOCK_C)
    tile = tl.program_id(0) % tiles
    first = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_R
    row, column, inside = place(first, tile, rows, columns, BLOCK_R, BLOCK_C)
    z = load_sum(x_pointer, x_stride, bias_pointer, row, column, columns, inside)
    y = drop(activate(z, ACTIVATION), seed_pointer, first, tile, threshold, kept, BLOCK_R, BLOCK_C)
    if residual_pointer is not None:
        y += tl.load(residual_pointer + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_pointer + row * columns + column, y.to(y_pointer.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    dy_pointer,  # [rows, columns]
    x_pointer,  # [rows, columns]
    bias_pointer,  # [columns], or None
    seed_pointer,  # [1], or None for no dropout
    dx_pointer,  # [rows, columns], contiguous
    partial_pointer,  # [programs, columns] float32, or None
    rows, columns, chunk, dy_stride, x_stride, threshold, kept,
    ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(columns, BLOCK_C)
    tile = tl.program_id(0) % tiles
    program = (tl.program_id(0) // tiles).to(tl.int64)
    end = tl.minimum((program + 1) * chunk, rows)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for first in range(program * chunk, end, BLOCK_R):
        row, column, inside = place(first, tile, end, columns, BLOCK_R, BLOCK_C)
        z = load_sum(x_pointer, x_stride, bias_pointer, row, column, columns, inside)
        d = tl.load(dy_pointer + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
        d = drop(d, seed_pointer, first, tile, threshold, kept, BLOCK_R, BLOCK_C)
        d, _d_gate = activation_gradient(d, activate(z, ACTIVATION), z, z, ACTIVATION)
        tl.store(dx_pointer + row * columns + column, d.to(dx_pointer.dtype.element_ty), mask=inside)
        if partial_pointer is not None:
            total += tl.where(inside, d, 0.0)
    if partial_pointer is not None:
        column = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        tl.store(partial_pointer + program * columns + column, tl.sum(total, 0), mask=column < columns)
