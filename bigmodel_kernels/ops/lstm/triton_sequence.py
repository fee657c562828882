"""A whole LSTM layer in one Triton kernel per direction of the gradient, for hidden sizes whose weights fit on chip.

    i, f, o = sigmoid(W x_t + U h_(t-1) + b),  g = tanh(likewise)     c_t = f c_(t-1) + i g     h_t = o tanh(c_t)
    backward: d(i, f, g, o) as in triton_step.py from dh_t and dc_t;  dh_(t-1) = d(i, f, g, o) U

Program: BLOCK_B rows of the batch of one direction, over all their steps. The four H x H blocks of U are loaded once and stay
on chip as the right operand of the step's products; h and c (backward: dh and dc) stay in registers, so that programs never
wait for each other. What a step reads from memory does not depend on the step before it, and is loaded one step ahead.
W x comes from one product over all tokens before, the gradients of x and of the weights from one product each after.
Packed sequences are sorted, longest first: a program stops after the steps of its first row, and a row past its end keeps its
state. The gates' sums and the state are float32; h is rounded to the tensors' dtype, as the caller sees it.
Saved for backward: gates and cell states, as by triton_step.py, in which all of the arithmetic is.
Refuses hidden sizes past those of triton_configs.py, and projections: those go step by step.
Floor: T times the latency of a step (a product of BLOCK_B x H x 4 H on one multiprocessor, and an exchange of h between its
warps), not memory: 9 H floats per row and step.
"""

import triton
import triton.language as tl

from bigmodel_kernels.ops.lstm_cell.triton_step import load_bias, load_four, step, step_gradient, store_four


@triton.jit
def rows_of_program(
    lengths_pointer, batch, steps, H: tl.constexpr, PACKED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr
):
    """Direction, rows [BLOCK_B, 1], their lengths (0 past the batch), steps of the longest, units [1, BLOCK_H], which exist."""
    tiles = tl.cdiv(batch, BLOCK_B)
    direction = (tl.program_id(0) // tiles).to(tl.int64)
    first_row = tl.program_id(0) % tiles * BLOCK_B
    row = (first_row + tl.arange(0, BLOCK_B))[:, None]
    longest = steps
    if PACKED:
        length = tl.load(lengths_pointer + row, mask=row < batch, other=0).to(tl.int32)
        longest = tl.load(lengths_pointer + first_row).to(tl.int32)
    else:
        length = tl.where(row < batch, steps, 0)
    unit = tl.arange(0, BLOCK_H)[None, :]
    return direction, row.to(tl.int64), length, longest, unit, unit < H


@triton.jit
def step_number(k, longest, backwards):
    """The k-th step in the order of a direction."""
    return tl.where(backwards, longest - 1 - k, k)


@triton.jit
def first_token(firsts_pointer, t, batch, PACKED: tl.constexpr):
    if PACKED:
        first = tl.load(firsts_pointer + t)
    else:
        first = t.to(tl.int64) * batch
    return first


@triton.jit
def load_weights(pointer, distance, row_stride, column_stride, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """The blocks of four gates, `distance` apart; 0 past H. Their columns are those of the product."""
    row, column = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_H)[None, :]
    pointer += row * row_stride + column * column_stride
    inside = (row < H) & (column < H)
    i = tl.load(pointer, mask=inside, other=0.0)
    f = tl.load(pointer + distance, mask=inside, other=0.0)
    g = tl.load(pointer + 2 * distance, mask=inside, other=0.0)
    o = tl.load(pointer + 3 * distance, mask=inside, other=0.0)
    return i, f, g, o


@triton.jit
def of_direction(direction, first, second):
    """The pointer of a direction's parameter; None where there is none."""
    if first is None:
        return None
    return tl.where(direction == 0, first, second)


@triton.jit(do_not_specialize=["steps", "batch", "tokens", "cell"])
def forward_kernel(
    from_input_pointer,  # [D, tokens, 4 H] float32: W x; may be gates
    w_pointer,  # [4 H, H]: U; [H, 4 H] if TRANSPOSED
    w_reverse_pointer,  # that of the other direction, if there is one
    b_ih_pointer,  # [4 H], or None
    b_hh_pointer,
    b_ih_reverse_pointer,
    b_hh_reverse_pointer,
    h0_pointer,  # [cells, B, H]: initial states
    c0_pointer,  # [cells, B, H]
    h_pointer,  # [cells, B, H]: final states
    c_pointer,  # [cells, B, H]
    output_pointer,  # [tokens, D H]
    gates_pointer,  # [D, tokens, 4 H]; None where nothing is saved
    cells_pointer,  # [D, tokens, H]; likewise
    firsts_pointer,  # [T] int64: first token of every step, if PACKED
    lengths_pointer,  # [B] int64: steps of every row, if PACKED
    steps, batch, tokens, cell, output_stride,
    H: tl.constexpr, PACKED: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    direction, row, length, longest, unit, inside = rows_of_program(
        lengths_pointer, batch, steps, H, PACKED, BLOCK_B, BLOCK_H
    )
    backwards = direction == 1
    w_pointer = of_direction(direction, w_pointer, w_reverse_pointer)
    if TRANSPOSED:
        wi, wf, wg, wo = load_weights(w_pointer, H, 4 * H, 1, H, BLOCK_H)
    else:
        wi, wf, wg, wo = load_weights(w_pointer, H * H, 1, H, H, BLOCK_H)
    b_ih_pointer = of_direction(direction, b_ih_pointer, b_ih_reverse_pointer)
    b_hh_pointer = of_direction(direction, b_hh_pointer, b_hh_reverse_pointer)
    bi, bf, bg, bo = load_bias(b_ih_pointer, b_hh_pointer, unit, H, inside)
    states = ((cell + direction) * batch + row) * H + unit  # cell: the first of the layer
    exists = (row < batch) & inside
    h = tl.load(h0_pointer + states, mask=exists, other=0.0)
    c = tl.load(c0_pointer + states, mask=exists, other=0.0).to(tl.float32)
    plane = direction * tokens  # tokens of the directions before

    t = step_number(0, longest, backwards)
    token = plane + first_token(firsts_pointer, t, batch, PACKED) + row
    next_i, next_f, next_g, next_o = load_four(from_input_pointer + token * 4 * H + unit, H, (t < length) & inside)
    for k in range(0, longest):
        here, active = token, (t < length) & inside
        xi, xf, xg, xo = next_i, next_f, next_g, next_o
        t = step_number(tl.minimum(k + 1, longest - 1), longest, backwards)
        token = plane + first_token(firsts_pointer, t, batch, PACKED) + row
        next_i, next_f, next_g, next_o = load_four(
            from_input_pointer + token * 4 * H + unit, H, (t < length) & inside & (k + 1 < longest)
        )
        xi = tl.dot(h, wi, xi + bi, input_precision=PRECISION)
        xf = tl.dot(h, wf, xf + bf, input_precision=PRECISION)
        xg = tl.dot(h, wg, xg + bg, input_precision=PRECISION)
        xo = tl.dot(h, wo, xo + bo, input_precision=PRECISION)
        i, f, g, o, c_new, h_new = step(xi, xf, xg, xo, c)
        c = tl.where(active, c_new, c)
        h = tl.where(active, h_new.to(h.dtype), h)
        tl.store(output_pointer + (here - plane) * output_stride + direction * H + unit, h, mask=active)
        if gates_pointer is not None:
            store_four(gates_pointer + here * 4 * H + unit, H, i, f, g, o, active)
            tl.store(cells_pointer + here * H + unit, c.to(cells_pointer.dtype.element_ty), mask=active)
    tl.store(h_pointer + states, h, mask=exists)
    tl.store(c_pointer + states, c.to(c_pointer.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["steps", "batch", "tokens"])
def backward_kernel(
    d_output_pointer,  # [tokens, D H]
    d_h_pointer,  # [D, B, H] float32: gradients of the final states; on return of the initial ones
    d_c_pointer,  # [D, B, H] float32: likewise
    gates_pointer,  # [D, tokens, 4 H]
    cells_pointer,  # [D, tokens, H]
    c0_pointer,  # [D, B, H]: initial states
    w_pointer,  # [4 H, H]: U
    w_reverse_pointer,  # that of the other direction, if there is one
    d_gates_pointer,  # [tokens, D, 4 H]
    firsts_pointer,  # [T] int64: first token of every step, if PACKED
    lengths_pointer,  # [B] int64: steps of every row, if PACKED
    steps, batch, tokens, d_output_stride, d_gates_stride,
    H: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    direction, row, length, longest, unit, inside = rows_of_program(
        lengths_pointer, batch, steps, H, PACKED, BLOCK_B, BLOCK_H
    )
    forwards = direction == 1  # through time: the opposite of the direction's own order
    w_pointer = of_direction(direction, w_pointer, w_reverse_pointer)
    wi, wf, wg, wo = load_weights(w_pointer, H * H, H, 1, H, BLOCK_H)
    states = (direction * batch + row) * H + unit
    exists = (row < batch) & inside
    d_h = tl.load(d_h_pointer + states, mask=exists, other=0.0)
    d_c = tl.load(d_c_pointer + states, mask=exists, other=0.0)
    c0 = tl.load(c0_pointer + states, mask=exists, other=0.0).to(tl.float32)
    plane = direction * tokens

    t = step_number(0, longest, not forwards)
    token = plane + first_token(firsts_pointer, t, batch, PACKED) + row
    active = (t < length) & inside
    next_i, next_f, next_g, next_o = load_four(gates_pointer + token * 4 * H + unit, H, active)
    next_c = tl.load(cells_pointer + token * H + unit, mask=active, other=0.0).to(tl.float32)
    next_y = tl.load(
        d_output_pointer + (token - plane) * d_output_stride + direction * H + unit, mask=active, other=0.0
    ).to(tl.float32)
    for k in range(0, longest):
        here, active = token, (t < length) & inside
        i, f, g, o, c, d_y = next_i, next_f, next_g, next_o, next_c, next_y
        t = step_number(tl.minimum(k + 1, longest - 1), longest, not forwards)
        token = plane + first_token(firsts_pointer, t, batch, PACKED) + row
        earlier = (t < length) & inside & (k + 1 < longest)
        next_i, next_f, next_g, next_o = load_four(gates_pointer + token * 4 * H + unit, H, earlier)
        next_c = tl.load(cells_pointer + token * H + unit, mask=earlier, other=0.0).to(tl.float32)
        next_y = tl.load(
            d_output_pointer + (token - plane) * d_output_stride + direction * H + unit, mask=earlier, other=0.0
        ).to(tl.float32)
        c_before = tl.where(earlier, next_c, c0)
        d_i, d_f, d_g, d_o, d_c_new = step_gradient(i, f, g, o, c, c_before, d_h + d_y, d_c)
        d_c = tl.where(active, d_c_new, d_c)
        dtype = d_gates_pointer.dtype.element_ty
        d_i, d_f, d_g, d_o = d_i.to(dtype), d_f.to(dtype), d_g.to(dtype), d_o.to(dtype)
        store_four(
            d_gates_pointer + (here - plane) * d_gates_stride + direction * 4 * H + unit, H, d_i, d_f, d_g, d_o, active
        )
        d_h_new = tl.dot(d_i, wi, input_precision=PRECISION)
        d_h_new = tl.dot(d_f, wf, d_h_new, input_precision=PRECISION)
        d_h_new = tl.dot(d_g, wg, d_h_new, input_precision=PRECISION)
        d_h_new = tl.dot(d_o, wo, d_h_new, input_precision=PRECISION)
        d_h = tl.where(active, d_h_new, d_h)
    tl.store(d_h_pointer + states, d_h, mask=exists)
    tl.store(d_c_pointer + states, d_c, mask=exists)
