"""Layer and RMS normalisation in Triton, forward and backward, with the addition before it.

    h = x + residual        xhat = (h - mean) rstd        y = weight xhat + bias
    g = dy weight           dh = rstd (g - mean of g - xhat mean of (g xhat)) + what comes to h itself
    dweight = sum over rows of dy xhat                    dbias = sum over rows of dy
RMS normalisation is the same with 0 for both means, that of h and that of g.

Program: forward, BLOCK_R whole rows in registers, so that a row is read once and its variance is that of differences from the
mean. Backward, one block of rows after the other, `chunk` rows in all; its sums for weight and bias are a row of `partial`,
added up afterwards in a fixed order: every run gives the same bits.
Saved for backward: h (x itself without a residual), mean and rstd of every row in float32.
Arithmetic is float32; offsets are int64 from the row on. Refused: rows past LARGEST_ROW, which would not fit in registers.
Floor: memory: x, residual read, y, h written; backward h, dy read, dh written.
"""

import triton
import triton.language as tl

from bigmodel_kernels import _tuned

LARGEST_ROW = 8192
SIZES = ["rows", "chunk"]
ELEMENTS = 2048  # of a program's tile at least, unless there is but one row
LARGEST_PER_THREAD = 16


@_tuned.cached
def blocks(device: int | None, kernel: str, element_size: int, columns: int) -> dict[str, int]:
    """The launch constants of a kernel, forward or backward, for rows of so many columns."""
    block_c = max(16, triton.next_power_of_2(columns))
    block_r = max(1, ELEMENTS // block_c)
    warps = min(16, max(4, block_r * block_c // (32 * LARGEST_PER_THREAD)))
    sizes = {"BLOCK_R": block_r, "BLOCK_C": block_c, "num_warps": warps}
    return _tuned.choose(_tuned.Row("norm", kernel, f"{8 * element_size}-bit", block_c), device, sizes)


@triton.jit
def load_rows(pointer, stride, row, column, inside):
    return tl.load(pointer + row * stride + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_columns(pointer, column, columns, without: tl.constexpr):
    """A parameter as a row; `without` where there is none."""
    if pointer is None:
        return without
    return tl.load(pointer + column, mask=column < columns, other=0.0).to(tl.float32)


@triton.jit
def place(first, rows, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows [BLOCK_R, 1] (int64) from `first` on, columns [1, BLOCK_C], and which pairs exist."""
    row = (tl.cast(first, tl.int64) + tl.arange(0, BLOCK_R))[:, None]
    column = tl.arange(0, BLOCK_C)[None, :]
    return row, column, (row < rows) & (column < columns)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    x_pointer,  # [rows, columns]
    residual_pointer,  # [rows, columns], or None
    weight_pointer, bias_pointer,  # [columns], or None
    y_pointer,  # [rows, columns], contiguous
    h_pointer,  # [rows, columns], contiguous, or None
    mean_pointer, rstd_pointer,  # [rows] float32
    rows, columns, x_stride, residual_stride, eps,
    CENTER: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, column, inside = place(tl.program_id(0).to(tl.int64) * BLOCK_R, rows, columns, BLOCK_R, BLOCK_C)
    h = load_rows(x_pointer, x_stride, row, column, inside)
    if residual_pointer is not None:
        h += load_rows(residual_pointer, residual_stride, row, column, inside)
        tl.store(h_pointer + row * columns + column, h.to(h_pointer.dtype.element_ty), mask=inside)
    mean = tl.zeros([BLOCK_R, 1], tl.float32)
    if CENTER:
        mean = tl.sum(h, 1, keep_dims=True) / columns
    d = tl.where(inside, h - mean, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(d * d, 1, keep_dims=True) / columns + eps)
    y = d * rstd * load_columns(weight_pointer, column, columns, 1.0) + load_columns(bias_pointer, column, columns, 0.0)
    tl.store(y_pointer + row * columns + column, y.to(y_pointer.dtype.element_ty), mask=inside)
    tl.store(mean_pointer + row, mean, mask=row < rows)
    tl.store(rstd_pointer + row, rstd, mask=row < rows)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    dy_pointer,  # [rows, columns]
    dh_pointer,  # [rows, columns], or None
    h_pointer,  # [rows, columns]
    weight_pointer,  # [columns], or None
    mean_pointer, rstd_pointer,  # [rows] float32
    dx_pointer,  # [rows, columns], contiguous
    partial_pointer,  # [2, programs, columns] float32: sums for weight and bias, or None
    rows, columns, chunk, dy_stride, dh_stride, h_stride,
    CENTER: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    end = tl.minimum((program + 1) * chunk, rows)
    d_weight = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    d_bias = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for first in range(program * chunk, end, BLOCK_R):
        row, column, inside = place(first, end, columns, BLOCK_R, BLOCK_C)
        h = load_rows(h_pointer, h_stride, row, column, inside)
        dy = load_rows(dy_pointer, dy_stride, row, column, inside)
        mean = tl.load(mean_pointer + row, mask=row < end, other=0.0)
        rstd = tl.load(rstd_pointer + row, mask=row < end, other=0.0)
        normal = tl.where(inside, (h - mean) * rstd, 0.0)
        g = dy * load_columns(weight_pointer, column, columns, 1.0)
        d = g - normal * (tl.sum(g * normal, 1, keep_dims=True) / columns)
        if CENTER:
            d -= tl.sum(g, 1, keep_dims=True) / columns
        d *= rstd
        if dh_pointer is not None:
            d += load_rows(dh_pointer, dh_stride, row, column, inside)
        tl.store(dx_pointer + row * columns + column, d.to(dx_pointer.dtype.element_ty), mask=inside)
        if partial_pointer is not None:
            d_weight += dy * normal
            d_bias += dy
    if partial_pointer is not None:
        column = tl.arange(0, BLOCK_C)
        own = partial_pointer + program * columns + column
        tl.store(own, tl.sum(d_weight, 0), mask=column < columns)
        tl.store(own + tl.num_programs(0).to(tl.int64) * columns, tl.sum(d_bias, 0), mask=column < columns)
