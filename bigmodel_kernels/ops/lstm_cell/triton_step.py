"""What is left of an LSTM step in Triton after its products, forward and backward.

    i, f, o = sigmoid(W x + U h' + b),  g = tanh(likewise)          c = f c' + i g        h = o tanh(c)
    dc = dc_after + dh o (1 - tanh(c)^2);  di = dc g i (1 - i), df = dc c' f (1 - f), dg = dc i (1 - g^2),
    do = dh tanh(c) o (1 - o);  dc' = dc f

Program: BLOCK_B rows of the batch by BLOCK_H units, all four gates of each. The products are PyTorch's (cuBLAS), in float32; so
is all arithmetic here, and the cell state from step to step, whatever the tensors' dtype.
Saved for backward: activated gates and cell states, float32.
Steps of a sequence are told apart by their first token, an argument that compiles nothing anew; pointers stay those of
whole tensors. Offsets are int64 from the row on.
Floor: memory: 9 H floats read and 2 to 7 H written per row forward; the products around it cost more from H = 32 or so.
"""

import functools

import triton
import triton.language as tl

from bigmodel_kernels._triton import sigmoid, tanh

ELEMENTS = 512  # of a program's tile, 4 per thread
WARPS = 4


@triton.jit
def step(i, f, g, o, c_before):
    """From the four sums before activation: i, f, g, o, c, h."""
    i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
    c = f * c_before + i * g
    return i, f, g, o, c, o * tanh(c)


@triton.jit
def step_gradient(i, f, g, o, c, c_before, d_h, d_c):
    """di, df, dg, do before activation, and the gradient of c_before; d_c is that of c from the steps after."""
    tanh_c = tanh(c)
    d_c += d_h * o * (1.0 - tanh_c * tanh_c)
    d_i = d_c * g * i * (1.0 - i)
    d_f = d_c * c_before * f * (1.0 - f)
    d_g = d_c * i * (1.0 - g * g)
    d_o = d_h * tanh_c * o * (1.0 - o)
    return d_i, d_f, d_g, d_o, d_c * f


@triton.jit
def load_four(pointer, distance, mask):
    """Four values `distance` apart at each place, as float32: one of every gate."""
    i = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
    f = tl.load(pointer + distance, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(pointer + 2 * distance, mask=mask, other=0.0).to(tl.float32)
    o = tl.load(pointer + 3 * distance, mask=mask, other=0.0).to(tl.float32)
    return i, f, g, o


@triton.jit
def load_bias(b_ih_pointer, b_hh_pointer, unit, hidden, mask):
    """The sums of both biases, float32; 0 where there are none."""
    if b_ih_pointer is None:
        i = tl.zeros(unit.shape, dtype=tl.float32)
        f, g, o = i, i, i
    else:
        i, f, g, o = load_four(b_ih_pointer + unit, hidden, mask)
        hi, hf, hg, ho = load_four(b_hh_pointer + unit, hidden, mask)
        i, f, g, o = i + hi, f + hf, g + hg, o + ho
    return i, f, g, o


@triton.jit
def store_four(pointer, distance, i, f, g, o, mask):
    dtype = pointer.dtype.element_ty
    tl.store(pointer, i.to(dtype), mask=mask)
    tl.store(pointer + distance, f.to(dtype), mask=mask)
    tl.store(pointer + 2 * distance, g.to(dtype), mask=mask)
    tl.store(pointer + 3 * distance, o.to(dtype), mask=mask)


@triton.jit
def place(rows, hidden, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    """Rows [BLOCK_B, 1] (int64) and units [1, BLOCK_H] of this program, and which pairs exist."""
    program = tl.program_id(0)
    tiles = tl.cdiv(hidden, BLOCK_H)
    row = ((program // tiles).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B))[:, None]
    unit = (program % tiles * BLOCK_H + tl.arange(0, BLOCK_H))[None, :]
    return row, unit, (row < rows) & (unit < hidden)


@triton.jit(do_not_specialize=["rows", "first"])
def forward_kernel(
    from_input_pointer,  # [tokens, 4 H] float32: W x; may be gates
    from_state_pointer,  # [B, 4 H] float32: U h'
    b_ih_pointer,  # [4 H], or None
    b_hh_pointer,  # likewise
    c_before_pointer,  # [B, H]
    c_pointer,  # [B, H]; may be c_before
    h_pointer,  # [B, H]
    output_pointer,  # [tokens, >= H]: h once more; or None
    gates_pointer,  # [tokens, 4 H] float32; None where nothing is saved
    cells_pointer,  # [tokens, H] float32; likewise
    rows, first, hidden, output_stride,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    row, unit, inside = place(rows, hidden, BLOCK_B, BLOCK_H)
    token = row + first
    i, f, g, o = load_four(from_input_pointer + token * 4 * hidden + unit, hidden, inside)
    ui, uf, ug, uo = load_four(from_state_pointer + row * 4 * hidden + unit, hidden, inside)
    bi, bf, bg, bo = load_bias(b_ih_pointer, b_hh_pointer, unit, hidden, unit < hidden)
    c_before = tl.load(c_before_pointer + row * hidden + unit, mask=inside, other=0.0).to(tl.float32)
    i, f, g, o, c, h = step(i + ui + bi, f + uf + bf, g + ug + bg, o + uo + bo, c_before)
    tl.store(c_pointer + row * hidden + unit, c.to(c_pointer.dtype.element_ty), mask=inside)
    tl.store(h_pointer + row * hidden + unit, h.to(h_pointer.dtype.element_ty), mask=inside)
    if output_pointer is not None:
        tl.store(output_pointer + token * output_stride + unit, h.to(output_pointer.dtype.element_ty), mask=inside)
    if gates_pointer is not None:
        store_four(gates_pointer + token * 4 * hidden + unit, hidden, i, f, g, o, inside)
        tl.store(cells_pointer + token * hidden + unit, c.to(cells_pointer.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "first", "before", "rows_before"])
def backward_kernel(
    d_h_pointer,  # [B, H] float32: the gradient of h from the steps after
    d_output_pointer,  # [tokens, >= H]: added to it; or None
    d_c_pointer,  # [B, H] float32: the gradient of c from the steps after; on return that of c'
    gates_pointer,  # [tokens, 4 H] float32
    cells_pointer,  # [tokens, H] float32
    c0_pointer,  # [B, H]: c' of the rows from rows_before on; those below have theirs in cells, from the token before on
    d_gates_pointer,  # [tokens, >= 4 H]
    rows, first, before, rows_before, hidden, d_output_stride, d_gates_stride,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    row, unit, inside = place(rows, hidden, BLOCK_B, BLOCK_H)
    token = row + first
    i, f, g, o = load_four(gates_pointer + token * 4 * hidden + unit, hidden, inside)
    c = tl.load(cells_pointer + token * hidden + unit, mask=inside, other=0.0).to(tl.float32)
    goes_on = row < rows_before
    c_earlier = tl.load(cells_pointer + (row + before) * hidden + unit, mask=inside & goes_on, other=0.0).to(tl.float32)
    c_initial = tl.load(c0_pointer + row * hidden + unit, mask=inside & (row >= rows_before), other=0.0).to(tl.float32)
    d_h = tl.load(d_h_pointer + row * hidden + unit, mask=inside, other=0.0)
    if d_output_pointer is not None:
        d_h += tl.load(d_output_pointer + token * d_output_stride + unit, mask=inside, other=0.0).to(tl.float32)
    d_c = tl.load(d_c_pointer + row * hidden + unit, mask=inside, other=0.0)
    c_before = tl.where(goes_on, c_earlier, c_initial)
    d_i, d_f, d_g, d_o, d_c = step_gradient(i, f, g, o, c, c_before, d_h, d_c)
    store_four(d_gates_pointer + token * d_gates_stride + unit, hidden, d_i, d_f, d_g, d_o, inside)
    tl.store(d_c_pointer + row * hidden + unit, d_c, mask=inside)


@functools.lru_cache(maxsize=4096)
def programs(rows: int, hidden: int) -> tuple[int, dict[str, int]]:
    """How many programs take `rows` rows, and their launch constants."""
    block_h = min(ELEMENTS, triton.next_power_of_2(max(hidden, 1)))
    block_b = ELEMENTS // block_h
    count = triton.cdiv(rows, block_b) * triton.cdiv(hidden, block_h)
    return count, {"BLOCK_B": block_b, "BLOCK_H": block_h, "num_warps": WARPS}
