"""The LSTM on the Triton kernels of triton_sequence.py (a layer at once) or of lstm_cell/triton_step.py (step by step).

A layer goes at once where its recurrent weights stay on chip (triton_configs.py), h is not projected, and it would not need a
table of packed tokens while a CUDA graph is captured. Step by step, a step is PyTorch's product of the state and one
pointwise kernel; offsets come from batch_sizes on the CPU, so that nothing waits for the GPU and a graph can be captured.
Both ways save the same, and either's backward takes it.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from bigmodel_kernels import _triton
from bigmodel_kernels.ops.lstm import triton_sequence
from bigmodel_kernels.ops.lstm.op import saved_shapes
from bigmodel_kernels.ops.lstm.reference import split_weights
from bigmodel_kernels.ops.lstm.triton_configs import config
from bigmodel_kernels.ops.lstm_cell import triton_step
from bigmodel_kernels.ops.lstm_cell.triton_kernels import bias_of
from bigmodel_kernels.ops.lstm_cell.triton_kernels import supports as supports


class _Tokens:
    """Where the tokens of every step lie: dense, or packed by batch_sizes."""

    def __init__(self, x: Tensor, batch: int, batch_sizes: Tensor | None):
        self.batch, self.device = batch, x.device
        self.packed = batch_sizes is not None
        self.sizes = batch_sizes.tolist() if self.packed else [batch] * x.shape[0]
        self.count = x.shape[0] if self.packed else x.shape[0] * batch
        for size, previous in zip(self.sizes, [batch, *self.sizes]):
            if not 0 <= size <= previous:
                raise RuntimeError(
                    f"batch_sizes must not increase and stay within the batch of {batch}, got {size} after {previous}"
                )
        if sum(self.sizes) != self.count:
            raise RuntimeError(f"batch_sizes must add up to the {self.count} rows of x, got {sum(self.sizes)}")
        self.firsts = [0, *itertools.accumulate(self.sizes)][:-1]
        self.steps = list(zip(self.firsts, self.sizes))  # (first token, number of rows)

    def tables(self) -> tuple[Tensor, Tensor]:
        """First token of every step and number of steps of every row, on the device."""
        rows = torch.arange(self.batch)
        shrinking = torch.tensor(self.sizes[::-1])
        lengths = len(self.sizes) - torch.searchsorted(shrinking, rows, right=True)
        found = torch.cat([torch.tensor(self.firsts), lengths]).to(self.device)
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


def _launch_constants(x: Tensor, hidden: int, projected: bool, tokens: _Tokens) -> dict | None:
    """Of the sequence kernels; None where this call goes step by step."""
    if projected or (tokens.packed and x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    precision = _triton.precision(x.dtype)
    sizes = config(_triton.gpu(x.device.index), x.dtype, precision, hidden)
    return sizes and {"H": hidden, "PRECISION": precision, "PACKED": tokens.packed, **sizes}


def _at_once(kernel, tensors: tuple, strides: tuple, tokens: _Tokens, directions: int, constants: dict) -> None:
    firsts, lengths = tokens.tables() if tokens.packed else (tensors[0], tensors[0])
    _triton.launch(
        kernel, directions * -(-tokens.batch // constants["BLOCK_B"]),
        *tensors, firsts, lengths, len(tokens.sizes), tokens.batch, tokens.count, *strides, **constants,
    )  # fmt: skip


def _forward_by_step(from_input, w_hh, w_hr, bias, h, c, output, gates, cells, steps, save) -> None:
    """One direction; h and c hold the initial states, on return the final ones."""
    batch, hidden = c.shape
    from_state = torch.empty(batch, 4 * hidden, dtype=torch.float32, device=c.device)
    u = h if w_hr is None else torch.empty(batch, hidden, dtype=h.dtype, device=h.device)
    for first, rows in steps:
        _triton.product(h[:rows], w_hh.t(), from_state[:rows])
        count, constants = triton_step.programs(rows, hidden)
        _triton.launch(
            triton_step.forward_kernel, count,
            from_input, from_state, bias, c, c, u, output, gates, cells, rows, first, hidden, output.stride(0),
            OUTPUT=w_hr is None, SAVE=save, **constants,
        )  # fmt: skip
        if w_hr is not None:
            torch.mm(u[:rows], w_hr.t(), out=h[:rows])
            output[first : first + rows] = h[:rows]


def fwd(x, h0, c0, weights, batch_sizes, dropout_mask, num_layers, bidirectional, dropout, save):
    directions, (_, batch, hidden) = 2 if bidirectional else 1, c0.shape
    tokens = _Tokens(x, batch, batch_sizes)
    parameters = split_weights(weights, num_layers * directions)
    constants = _launch_constants(x, hidden, parameters[0][4] is not None, tokens)
    shapes = saved_shapes(x, h0, c0, num_layers, bidirectional, save)
    gates, cells, between = (
        torch.empty(shape, dtype=dtype, device=x.device)
        for shape, dtype in zip(shapes, (torch.float32, torch.float32, x.dtype))
    )
    h = h0.clone(memory_format=torch.contiguous_format)
    c = c0.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    scratch = None if save else torch.empty(directions, tokens.count, 4 * hidden, dtype=torch.float32, device=x.device)

    y = x.reshape(tokens.count, x.shape[-1])
    for layer in range(num_layers):
        source = y if layer == 0 or dropout_mask is None else y * dropout_mask[layer - 1]
        last = layer == num_layers - 1
        y = between[layer] if save and not last else x.new_empty(tokens.count, directions * h0.shape[2])
        own = range(layer * directions, (layer + 1) * directions)
        # The products with x lie where the gates will.
        layer_gates, layer_cells = (t[own.start : own.stop] if save else scratch for t in (gates, cells))
        for d, cell in enumerate(own):
            _triton.product(source, parameters[cell][0].t(), layer_gates[d])
        bias = torch.stack([bias_of(*parameters[cell][1:4]) for cell in own])
        if constants is not None:
            w_hh = torch.stack([parameters[cell][1].t() for cell in own])
            tensors = (layer_gates, w_hh, bias, h[own.start :], c[own.start :], y, layer_gates, layer_cells)
            options = {"SAVE": save, **constants}
            _at_once(triton_sequence.forward_kernel, tensors, (y.stride(0),), tokens, directions, options)
        else:
            for d, cell in enumerate(own):
                _, w_hh, _, _, w_hr = parameters[cell]
                part = y.chunk(directions, 1)[d]
                steps = tokens.steps[::-1] if d else tokens.steps
                _forward_by_step(
                    layer_gates[d],
                    w_hh,
                    w_hr,
                    bias[d],
                    h[cell],
                    c[cell],
                    part,
                    layer_gates[d],
                    layer_cells[d],
                    steps,
                    save,
                )
    return y.view(*x.shape[:-1], y.shape[1]), h, c.to(x.dtype), gates, cells, between


def _backward_by_step(d_y, d_h, d_c, gates, cells, c0, w_hh, w_hr, d_gates, d_projected, steps) -> None:
    """One direction; d_h and d_c hold the gradients of the final states, on return of the initial ones."""
    batch, hidden = c0.shape
    d_u = d_h if w_hr is None else torch.empty(batch, hidden, dtype=torch.float32, device=d_h.device)
    for (first, rows), (before, rows_before) in zip(steps[::-1], [*steps[-2::-1], (0, 0)]):
        here = slice(first, first + rows)
        if w_hr is not None:
            torch.add(d_h[:rows], d_y[here], out=d_projected[here])
            _triton.product(d_projected[here], w_hr, d_u[:rows])
        count, constants = triton_step.programs(rows, hidden)
        _triton.launch(
            triton_step.backward_kernel, count,
            d_u, d_y, d_c, gates, cells, c0, d_gates,
            rows, first, before, min(rows, rows_before), hidden, d_y.stride(0), d_gates.stride(0),
            OUTPUT=w_hr is None, **constants,
        )  # fmt: skip
        _triton.product(d_gates[here], w_hh, d_h[:rows])


def _float_state(given: Tensor | None, like: Tensor) -> Tensor:
    if given is None:
        return torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    return given.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _gradient_of_source(d_gates: Tensor, w_ih: list[Tensor]) -> Tensor:
    """The sum over directions of d_gates W, rounded once. (As one product, sums twice as long round off more.)"""
    if len(w_ih) == 1:
        return d_gates[:, 0] @ w_ih[0]
    found = torch.empty(2, d_gates.shape[0], w_ih[0].shape[1], dtype=torch.float32, device=d_gates.device)
    for d in range(2):
        _triton.product(d_gates[:, d], w_ih[d], found[d])
    return found.sum(0).to(d_gates.dtype)


def bwd(
    d_output, d_h_n, d_c_n, output, gates, cells, hidden, need_d_x, need_d_weights,
    x, h0, c0, weights, batch_sizes, dropout_mask, num_layers, bidirectional, dropout, save,
):  # fmt: skip
    directions, (_, batch, units) = 2 if bidirectional else 1, c0.shape
    width = output.shape[-1]
    tokens = _Tokens(x, batch, batch_sizes)
    parameters = split_weights(weights, num_layers * directions)
    projected = parameters[0][4] is not None
    constants = _launch_constants(x, units, projected, tokens)
    gates, cells, c0 = gates.contiguous(), cells.contiguous(), c0.contiguous()
    d_h, d_c = _float_state(d_h_n, h0), _float_state(d_c_n, c0)
    d_y = output.new_zeros(tokens.count, width) if d_output is None else d_output.reshape(tokens.count, width)
    d_y = d_y.contiguous()
    d_gates = torch.empty(tokens.count, directions, 4 * units, dtype=x.dtype, device=x.device)
    d_projected = x.new_empty(directions, tokens.count, h0.shape[2]) if projected else [None, None]
    outputs = [x.reshape(tokens.count, x.shape[-1]), *hidden, output.reshape(tokens.count, width)]
    d_weights: list[list[Tensor]] = [[] for _ in parameters]

    for layer in reversed(range(num_layers)):
        own = range(layer * directions, (layer + 1) * directions)
        layer_gates, layer_cells = gates[own.start : own.stop], cells[own.start : own.stop]
        if constants is not None:
            w_hh = torch.stack([parameters[cell][1] for cell in own])
            tensors = (
                d_y,
                d_h[own.start :],
                d_c[own.start :],
                layer_gates,
                layer_cells,
                c0[own.start :],
                w_hh,
                d_gates,
            )
            strides = (d_y.stride(0), d_gates.stride(0))
            _at_once(triton_sequence.backward_kernel, tensors, strides, tokens, directions, constants)
        else:
            for d, cell in enumerate(own):
                _, w_hh, _, _, w_hr = parameters[cell]
                part = d_y.chunk(directions, 1)[d]
                steps = tokens.steps[::-1] if d else tokens.steps
                _backward_by_step(
                    part, d_h[cell], d_c[cell], layer_gates[d], layer_cells[d], c0[cell], w_hh, w_hr,
                    d_gates[:, d], d_projected[d], steps,
                )  # fmt: skip
        mask = dropout_mask[layer - 1] if layer and dropout_mask is not None else None
        if need_d_weights:
            source = outputs[layer] if mask is None else outputs[layer] * mask
            d_w_ih = d_gates.flatten(1).t() @ source
            d_bias = d_gates.sum(0)
            for d, cell in enumerate(own):
                before = tokens.states_before(outputs[layer + 1].chunk(directions, 1)[d], h0[cell], d == 1)
                d_weights[cell] = [d_w_ih.chunk(directions)[d], d_gates[:, d].t() @ before]
                if parameters[cell][2] is not None:
                    d_weights[cell] += [d_bias[d], d_bias[d].clone()]
                if projected:
                    u = layer_gates[d, :, 3 * units :].float() * layer_cells[d].float().tanh()
                    d_weights[cell].append(d_projected[d].t() @ u.to(x.dtype))
        if layer or need_d_x:
            d_y = _gradient_of_source(d_gates, [parameters[cell][0] for cell in own])
            d_y = d_y if mask is None else d_y * mask
    d_x = d_y.view(x.shape) if need_d_x else x.new_empty(0)
    return d_x, d_h.to(h0.dtype), d_c.to(c0.dtype), [w for group in d_weights for w in group]
