"""What is left of a step of an LSTM with layer norm in Triton after its product z = W h', forward and backward.

    N(x) = (x - mean) rstd
    [i f g o] = a + gain N(z)     c = sigmoid(f) c' + sigmoid(i) tanh(g)     h = sigmoid(o) tanh(gain_c N(c) + bias_c)

Program: one row of the batch with all its units, so that both norms, their gradients and the cell are one launch. The products
are PyTorch's, in float32, as is all arithmetic here and the cell state. The gradients of gains and bias are summed up row by row
over the steps, always by the same program, and over the rows at the end: every run gives the same bits.
Saved for backward: z, activated gates, cell states, float32. Refuses more than LARGEST_HIDDEN units, which registers do not hold.
Floor: memory: 10 H floats read and 6 H written per row forward, 17 H and 15 H backward.
"""

import triton
import triton.language as tl

from bigmodel_kernels import _tuned
from bigmodel_kernels._triton import sigmoid, tanh
from bigmodel_kernels.ops.lstm_cell.triton_step import load_four, store_four

LARGEST_HIDDEN = 2048
UNITS_PER_WARP = 128


@triton.jit
def normed(x, inside, count, eps):
    """N(x) of one row, 0 where it has no number, and rstd."""
    difference = tl.where(inside, x - tl.sum(x, 0) / count, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(difference * difference, 0) / count + eps)
    return difference * rstd, rstd


@triton.jit
def normed_four(i, f, g, o, inside, count, eps):
    """normed of a row that is four parts."""
    mean = tl.sum(i + f + g + o, 0) / count
    i, f = tl.where(inside, i - mean, 0.0), tl.where(inside, f - mean, 0.0)
    g, o = tl.where(inside, g - mean, 0.0), tl.where(inside, o - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(i * i + f * f + g * g + o * o, 0) / count + eps)
    return i * rstd, f * rstd, g * rstd, o * rstd, rstd


@triton.jit(do_not_specialize=["first"])
def forward_kernel(
    z_pointer,  # [B, 4 H] float32: of this step
    a_pointer,  # [T B, 4 H]
    gain_pointer,  # [4 H]
    gain_c_pointer,  # [H]
    bias_c_pointer,  # [H]
    c_pointer,  # [B, H] float32: c'; on return c
    output_pointer,  # [T B, H]
    gates_pointer,  # [T B, 4 H] float32; None where nothing is saved
    cells_pointer,  # [T B, H] float32; likewise
    first, hidden, eps, eps_c,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    unit = tl.arange(0, BLOCK_H)
    inside, token = unit < hidden, first + row
    i, f, g, o = load_four(z_pointer + row * 4 * hidden + unit, hidden, inside)
    i, f, g, o, _rstd = normed_four(i, f, g, o, inside, 4 * hidden, eps)
    gain_i, gain_f, gain_g, gain_o = load_four(gain_pointer + unit, hidden, inside)
    ai, af, ag, ao = load_four(a_pointer + token * 4 * hidden + unit, hidden, inside)
    i, f = sigmoid(ai + gain_i * i), sigmoid(af + gain_f * f)
    g, o = tanh(ag + gain_g * g), sigmoid(ao + gain_o * o)
    c = f * tl.load(c_pointer + row * hidden + unit, mask=inside, other=0.0) + i * g
    of_c, _rstd_c = normed(tl.where(inside, c, 0.0), inside, hidden, eps_c)
    gain_c = tl.load(gain_c_pointer + unit, mask=inside, other=0.0).to(tl.float32)
    bias_c = tl.load(bias_c_pointer + unit, mask=inside, other=0.0).to(tl.float32)
    h = o * tanh(gain_c * of_c + bias_c)
    tl.store(c_pointer + row * hidden + unit, c, mask=inside)
    tl.store(output_pointer + token * hidden + unit, h.to(output_pointer.dtype.element_ty), mask=inside)
    if gates_pointer is not None:
        store_four(gates_pointer + token * 4 * hidden + unit, hidden, i, f, g, o, inside)
        tl.store(cells_pointer + token * hidden + unit, c, mask=inside)


@triton.jit(do_not_specialize=["first", "batch"])
def backward_kernel(
    d_h_pointer,  # [B, H] float32: the gradient of h from the steps after
    d_output_pointer,  # [T B, H]: added to it; or None
    d_c_pointer,  # [B, H] float32: the gradient of c from the steps after; on return that of c'
    z_pointer,  # [T B, 4 H] float32
    gates_pointer,  # [T B, 4 H] float32
    cells_pointer,  # [T B, H] float32
    c0_pointer,  # [B, H]
    gain_pointer,  # [4 H]
    gain_c_pointer,  # [H]
    bias_c_pointer,  # [H]
    d_a_pointer,  # [T B, 4 H]
    d_z_pointer,  # [T B, 4 H]
    sums_pointer,  # [B, 6 H] float32: gradients of gain, gain_c and bias_c, added to
    first, batch, hidden, eps, eps_c,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    unit = tl.arange(0, BLOCK_H)
    inside, token = unit < hidden, first + row
    i, f, g, o = load_four(gates_pointer + token * 4 * hidden + unit, hidden, inside)
    c = tl.load(cells_pointer + token * hidden + unit, mask=inside, other=0.0)
    c_before = tl.load(cells_pointer + (token - batch) * hidden + unit, mask=inside & (first > 0), other=0.0)
    c_initial = tl.load(c0_pointer + row * hidden + unit, mask=inside & (first == 0), other=0.0)
    c_before = tl.where(first > 0, c_before, c_initial.to(tl.float32))
    d_h = tl.load(d_h_pointer + row * hidden + unit, mask=inside, other=0.0)
    if d_output_pointer is not None:
        d_h += tl.load(d_output_pointer + token * hidden + unit, mask=inside, other=0.0).to(tl.float32)

    of_c, rstd_c = normed(c, inside, hidden, eps_c)
    gain_c = tl.load(gain_c_pointer + unit, mask=inside, other=0.0).to(tl.float32)
    bias_c = tl.load(bias_c_pointer + unit, mask=inside, other=0.0).to(tl.float32)
    tanh_u = tanh(gain_c * of_c + bias_c)
    d_u = d_h * o * (1.0 - tanh_u * tanh_u)
    sums = sums_pointer + row * 6 * hidden + unit
    tl.store(sums + 4 * hidden, tl.load(sums + 4 * hidden, mask=inside, other=0.0) + d_u * of_c, mask=inside)
    tl.store(sums + 5 * hidden, tl.load(sums + 5 * hidden, mask=inside, other=0.0) + d_u, mask=inside)
    d_u *= gain_c
    d_c = tl.load(d_c_pointer + row * hidden + unit, mask=inside, other=0.0)
    d_c += rstd_c * (d_u - tl.sum(d_u, 0) / hidden - of_c * (tl.sum(d_u * of_c, 0) / hidden))
    tl.store(d_c_pointer + row * hidden + unit, d_c * f, mask=inside)
    d_i, d_f = d_c * g * i * (1.0 - i), d_c * c_before * f * (1.0 - f)
    d_g, d_o = d_c * i * (1.0 - g * g), d_h * tanh_u * o * (1.0 - o)
    store_four(d_a_pointer + token * 4 * hidden + unit, hidden, d_i, d_f, d_g, d_o, inside)

    zi, zf, zg, zo = load_four(z_pointer + token * 4 * hidden + unit, hidden, inside)
    zi, zf, zg, zo, rstd = normed_four(zi, zf, zg, zo, inside, 4 * hidden, eps)
    si, sf, sg, so = load_four(sums, hidden, inside)
    store_four(sums, hidden, si + d_i * zi, sf + d_f * zf, sg + d_g * zg, so + d_o * zo, inside)
    gain_i, gain_f, gain_g, gain_o = load_four(gain_pointer + unit, hidden, inside)
    d_i, d_f, d_g, d_o = d_i * gain_i, d_f * gain_f, d_g * gain_g, d_o * gain_o
    mean = tl.sum(tl.where(inside, d_i + d_f + d_g + d_o, 0.0), 0) / (4 * hidden)
    along = tl.sum(d_i * zi + d_f * zf + d_g * zg + d_o * zo, 0) / (4 * hidden)
    store_four(
        d_z_pointer + token * 4 * hidden + unit, hidden,
        rstd * (d_i - mean - zi * along), rstd * (d_f - mean - zf * along),
        rstd * (d_g - mean - zg * along), rstd * (d_o - mean - zo * along), inside,
    )  # fmt: skip


@_tuned.cached
def constants(device: int | None, kernel: str, hidden: int) -> dict[str, int]:
    """Of a launch of the forward's or the backward's kernel, which has as many programs as the batch has rows.

    The warps are those that hold a row without spills; they have not been timed on a GPU.
    """
    block_h = triton.next_power_of_2(hidden)
    sizes = {"BLOCK_H": block_h, "num_warps": min(16, max(1, block_h // UNITS_PER_WARP))}
    return _tuned.choose(_tuned.Row("norm_lstm", kernel, "float32", block_h), device, sizes)
