"""Softmax cross-entropy in Triton, forward and backward.

    m = max z        l = log sum exp(z - m)        loss = l + (1 - s) (m - z[target]) + s (m - mean z)
    dz = (exp(z - m - l) - (1 - s) [target] - s / C) dloss

Program: forward, one row, BLOCK classes at a time with a running maximum and sum (Milakov & Gimelshein 2018); backward, BLOCK
classes of one row. Saved for backward: m and l of each row, apart, because their sum would lose the digits of l.
The probabilities are never stored.
A target that is no class gives NaN. Arithmetic is float32; offsets are int64 from the row on.
Floor: memory: the logits read once in the forward; read once and their gradient written in the backward.
"""

import triton
import triton.language as tl

from bigmodel_kernels import _tuned
from bigmodel_kernels._triton import LOG2E, exp_of_negative

LARGEST_BLOCK = 4096
SIZES = ["rows", "ignore_index"]


@_tuned.cached
def blocks(device: int | None, kernel: str, element_size: int, classes: int) -> dict[str, int]:
    """The launch constants of a kernel, forward or backward, for so many classes."""
    block = min(LARGEST_BLOCK, max(64, triton.next_power_of_2(classes)))
    sizes = {"BLOCK": block, "num_warps": min(8, max(1, block // 512))}
    return _tuned.choose(_tuned.Row("cross_entropy", kernel, f"{8 * element_size}-bit", block), device, sizes)


@triton.jit
def load_logits(row_pointer, class_stride, start, classes, BLOCK: tl.constexpr):
    """(logits as float32, which exist); -inf past the last class."""
    at = start + tl.arange(0, BLOCK)
    inside = at < classes
    z = tl.load(row_pointer + at.to(tl.int64) * class_stride, mask=inside, other=float("-inf")).to(tl.float32)
    return z, at, inside


@triton.jit(do_not_specialize=["ignore_index"])
def forward_kernel(
    logits_pointer,  # [N, C]
    target_pointer,  # [N]
    losses_pointer,  # [N] float32
    rows_pointer,  # [2, N] float32: m, l
    classes, stride, class_stride, ignore_index, smoothing,
    SMOOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_pointer = logits_pointer + row * stride
    m = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    mean = tl.full([], 0.0, tl.float32)
    for start in range(0, classes, BLOCK):
        z, _at, inside = load_logits(row_pointer, class_stride, start, classes, BLOCK)
        new_m = tl.maximum(m, tl.max(z, 0))
        shift = tl.where(new_m == float("-inf"), 0.0, new_m)
        total = total * tl.exp2((m - shift) * LOG2E) + tl.sum(tl.exp2((z - shift) * LOG2E), 0)
        m = new_m
        if SMOOTH:
            mean += tl.sum(tl.where(inside, z, 0.0), 0) / classes
    log_sum = tl.log(total)
    target = tl.load(target_pointer + row)
    known = (target >= 0) & (target < classes)
    chosen = tl.load(row_pointer + target * class_stride, mask=known, other=float("nan")).to(tl.float32)
    loss = (m - chosen) + log_sum
    if SMOOTH:
        loss = (1.0 - smoothing) * (m - chosen) + smoothing * (m - mean) + log_sum
    tl.store(losses_pointer + row, tl.where(target == ignore_index, 0.0, loss))
    tl.store(rows_pointer + row, m)
    tl.store(rows_pointer + tl.num_programs(0).to(tl.int64) + row, log_sum)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    logits_pointer,  # [N, C]
    target_pointer,  # [N]
    rows_pointer,  # [2, N] float32: m, l
    d_rows_pointer,  # [N] float32: dloss of every row, 0 where the target is ignored
    d_logits_pointer,  # [N, C], contiguous
    rows, classes, stride, class_stride, ignore_index, smoothing,
    BLOCK: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(classes, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    z, at, inside = load_logits(
        logits_pointer + row * stride, class_stride, tl.program_id(0) % tiles * BLOCK, classes, BLOCK
    )
    target = tl.load(target_pointer + row)
    p = exp_of_negative(z - tl.load(rows_pointer + row) - tl.load(rows_pointer + rows + row))
    d = tl.where(z == float("-inf"), 0.0, p) - smoothing / classes
    d = tl.where(at == target, d - (1.0 - smoothing), d) * tl.load(d_rows_pointer + row)
    d = tl.where(target == ignore_index, 0.0, d)
    tl.store(d_logits_pointer + row * classes + at, d.to(d_logits_pointer.dtype.element_ty), mask=inside)
