"""An LSTM as one product with the input and one pass over the steps for every layer, forward and backward: what is the same
whoever runs the steps.

The products are PyTorch's (cuBLAS). Whoever runs the steps gives a function `layer`, which takes all directions of one layer.
Offsets of packed tokens come from batch_sizes on the CPU, so that nothing waits for the GPU and a CUDA graph can be captured.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from bigmodel_kernels._gpu import linear, product
from bigmodel_kernels.ops.lstm.op import saved_shapes
from bigmodel_kernels.ops.lstm.reference import split_weights


class Tokens:
    """Where the tokens of every step lie: dense, or packed by batch_sizes."""

    @staticmethod
    def of(x: Tensor, batch: int, batch_sizes: Tensor | None) -> Tokens:
        if batch_sizes is None:
            return _dense(x.shape[0], batch)
        return Tokens(batch_sizes.tolist(), x.shape[0], batch, packed=True)

    def __init__(self, sizes: list[int], count: int, batch: int, packed: bool):
        self.sizes, self.count, self.batch, self.packed = sizes, count, batch, packed
        self._tables: tuple[Tensor, Tensor] | None = None
        for size, previous in zip(self.sizes, [batch, *self.sizes]):
            if not 0 <= size <= previous:
                raise RuntimeError(
                    f"batch_sizes must not increase and stay within the batch of {batch}, got {size} after {previous}"
                )
        if sum(self.sizes) != self.count:
            raise RuntimeError(f"batch_sizes must add up to the {self.count} rows of x, got {sum(self.sizes)}")
        self.firsts = [0, *itertools.accumulate(self.sizes)][:-1]
        self.steps = list(zip(self.firsts, self.sizes))  # (first token, number of rows)

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Of packed ones: first token of every step and number of steps of every row, on the device."""
        if self._tables is None:
            self._tables = self._make_tables(device)
        return self._tables

    def _make_tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        rows = torch.arange(self.batch)
        shrinking = torch.tensor(self.sizes[::-1])
        lengths = len(self.sizes) - torch.searchsorted(shrinking, rows, right=True)
        found = torch.cat([torch.tensor(self.firsts), lengths]).to(device)
        return found[: len(self.sizes)], found[len(self.sizes) :]

    def states_before(self, y: Tensor, initial: Tensor, backwards: bool) -> Tensor:
        """What every token's step started from: y of the token before it in its sequence, or the initial state.

        A copy or three for every run of steps of the same size.
        """
        before = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        runs = [(size, len(list(run))) for size, run in itertools.groupby(self.sizes)]
        first = 0
        if runs and not backwards:
            before[: runs[0][0]] = initial[: runs[0][0]]
        for (size, steps), (next_size, _) in itertools.zip_longest(runs, runs[1:], fillvalue=(0, 0)):
            followed = (steps - 1) * size + next_size
            earlier, later = slice(first, first + followed), slice(first + size, first + size + followed)
            first += steps * size
            if backwards:
                before[earlier] = y[later]
                before[first - size + next_size : first] = initial[next_size:size]
            else:
                before[later] = y[earlier]
        return before


@functools.lru_cache(maxsize=1024)
def _dense(steps: int, batch: int) -> Tokens:
    return Tokens([batch] * steps, steps * batch, batch, packed=False)


def weight_gradients(d_gates: Tensor, x: Tensor, h: Tensor, biased: bool) -> list[Tensor]:
    """Of w_ih, w_hh and, where there are any, of both biases, from the gradient before activation [tokens, 4 H]."""
    found = [d_gates.t() @ x, d_gates.t() @ h]
    if biased:
        d_bias = d_gates.sum(0)
        found += [d_bias, d_bias.clone()]
    return found


def forward(
    layer: Callable, x, h0, c0, weights, batch_sizes, dropout_mask, num_layers, bidirectional, dropout, save
) -> tuple[Tensor, ...]:
    """The results of the op's forward; see `infer` for `layer`."""
    shapes = saved_shapes(x, h0, c0, num_layers, bidirectional, save)
    dtypes = (torch.float32, torch.float32, x.dtype)
    saved = tuple(torch.empty(shape, dtype=dtype, device=x.device) for shape, dtype in zip(shapes, dtypes))
    args = (x, h0, c0, weights, batch_sizes, dropout_mask, num_layers, bidirectional)
    return *infer(layer, *args, *(saved if save else ())), *saved


def infer(
    layer: Callable, x, h0, c0, weights, batch_sizes, dropout_mask, num_layers, bidirectional,
    gates=None, cells=None, between=None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The op's results proper; what is saved for a backward is written into the last three. `layer` is called as

    layer(tokens, own, parameters, from_input, h0, c0, h_n, c_n, y, gates, cells), with D directions:
        own         # slice: the layer's D cells among all
        parameters  # of every direction, as split_weights gives them
        from_input  # [D, tokens, 4 H] float32: the product with w_ih; [tokens, 4 H] if D is 1
        h0, c0      # [cells, B, P], [cells, B, H]: initial states of all layers
        h_n, c_n    # likewise; final states, to be written
        y           # D P numbers for every token: to be written
        gates, cells  # [D, tokens, 4 H], [D, tokens, H] float32, to be written; None where nothing is saved. gates may be
                      # the memory of from_input.
    """
    directions, (cells_of_all, batch, hidden), state = 2 if bidirectional else 1, c0.shape, h0.shape[2]
    tokens = Tokens.of(x, batch, batch_sizes)
    parameters = split_weights(weights, num_layers * directions)
    h_n, c_n = x.new_empty(cells_of_all, batch, state), x.new_empty(cells_of_all, batch, hidden)
    width = directions * state
    y = x.reshape(tokens.count, x.shape[-1])
    gates_here = cells_here = None
    for number in range(num_layers):
        source = y if number == 0 or dropout_mask is None else y * dropout_mask[number - 1]
        if number == num_layers - 1:
            y = x.new_empty(*x.shape[:-1], width)
        else:
            y = x.new_empty(tokens.count, width) if between is None else between[number]
        own = slice(number * directions, (number + 1) * directions)
        of_layer = parameters[own]
        if gates is not None:
            from_input = gates_here = gates[own]
            cells_here = cells[own]
        elif directions == 2:
            from_input = torch.empty(2, tokens.count, 4 * hidden, dtype=torch.float32, device=x.device)
        else:
            from_input = linear(source, of_layer[0][0])
        if gates is not None or directions == 2:
            for w, out in zip(of_layer, from_input):
                product(source, w[0].t(), out)
        layer(tokens, own, of_layer, from_input, h0, c0, h_n, c_n, y, gates_here, cells_here)
    return y, h_n, c_n


def float_state(given: Tensor) -> Tensor:
    return given.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def gradient_of_state(given: Tensor | None, like: Tensor) -> Tensor:
    if given is None:
        return torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    return float_state(given)


def _gradient_of_source(d_gates: Tensor, w_ih: list[Tensor]) -> Tensor:
    """The sum over directions of d_gates W, rounded once. (As one product, sums twice as long round off more.)"""
    if len(w_ih) == 1:
        return d_gates[:, 0] @ w_ih[0]
    found = torch.empty(2, d_gates.shape[0], w_ih[0].shape[1], dtype=torch.float32, device=d_gates.device)
    for d in range(2):
        product(d_gates[:, d], w_ih[d], found[d])
    return found.sum(0).to(d_gates.dtype)


def backward(
    layer: Callable, d_output, d_h_n, d_c_n, output, gates, cells, hidden, need_d_x, need_d_weights,
    x, h0, c0, weights, batch_sizes, dropout_mask, num_layers, bidirectional, dropout, save,
) -> tuple:  # fmt: skip
    """The results of the op's backward. `layer` is called as

    layer(tokens, parameters, d_y, d_h, d_c, gates, cells, c0, d_gates, d_projected), with D directions:
        d_y           # [tokens, D P]
        d_h, d_c      # [D, B, P], [D, B, H] float32: gradients of the final states, to be replaced by those of the initial ones
        gates, cells  # as saved
        c0            # [D, B, H]
        d_gates       # [tokens, D, 4 H]: to be written, before activation
        d_projected   # [D, tokens, P] with projections: to be written, the gradient of h; else None for every direction
    """
    directions, (_, batch, units) = 2 if bidirectional else 1, c0.shape
    width = output.shape[-1]
    tokens = Tokens.of(x, batch, batch_sizes)
    parameters = split_weights(weights, num_layers * directions)
    projected = parameters[0][4] is not None
    gates, cells, c0 = gates.contiguous(), cells.contiguous(), c0.contiguous()
    d_h, d_c = gradient_of_state(d_h_n, h0), gradient_of_state(d_c_n, c0)
    d_y = output.new_zeros(tokens.count, width) if d_output is None else d_output.reshape(tokens.count, width)
    d_y = d_y.contiguous()
    d_gates = torch.empty(tokens.count, directions, 4 * units, dtype=x.dtype, device=x.device)
    d_projected = x.new_empty(directions, tokens.count, h0.shape[2]) if projected else [None, None]
    outputs = [x.reshape(tokens.count, x.shape[-1]), *hidden, output.reshape(tokens.count, width)]
    d_weights: list[list[Tensor]] = [[] for _ in parameters]

    for number in reversed(range(num_layers)):
        own = slice(number * directions, (number + 1) * directions)
        layer(tokens, parameters[own], d_y, d_h[own], d_c[own], gates[own], cells[own], c0[own], d_gates, d_projected)
        mask = dropout_mask[number - 1] if number and dropout_mask is not None else None
        if need_d_weights:
            source = outputs[number] if mask is None else outputs[number] * mask
            d_w_ih = d_gates.flatten(1).t() @ source
            d_bias = d_gates.sum(0)
            for d, cell in enumerate(range(own.start, own.stop)):
                before = tokens.states_before(outputs[number + 1].chunk(directions, 1)[d], h0[cell], d == 1)
                d_weights[cell] = [d_w_ih.chunk(directions)[d], d_gates[:, d].t() @ before]
                if parameters[cell][2] is not None:
                    d_weights[cell] += [d_bias[d], d_bias[d].clone()]
                if projected:
                    u = gates[cell, :, 3 * units :].float() * cells[cell].float().tanh()
                    d_weights[cell].append(d_projected[d].t() @ u.to(x.dtype))
        if number or need_d_x:
            d_y = _gradient_of_source(d_gates, [w[0] for w in parameters[own]])
            d_y = d_y if mask is None else d_y * mask
    d_x = d_y.view(x.shape) if need_d_x else x.new_empty(0)
    return d_x, d_h.to(h0.dtype), d_c.to(c0.dtype), [w for group in d_weights for w in group]
