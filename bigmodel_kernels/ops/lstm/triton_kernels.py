"""The LSTM on the Triton kernels of triton_sequence.py (a layer at once) or of lstm_cell/triton_step.py (step by step).

A layer goes at once where its recurrent weights stay on chip (triton_configs.py), h is not projected, and it would not need a
table of packed tokens while a CUDA graph is captured. Step by step, a step is PyTorch's product of the state and one
pointwise kernel; offsets come from batch_sizes on the CPU, so that nothing waits for the GPU and a graph can be captured.
Both ways save the same, and either's backward takes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bigmodel_kernels import _triton
from bigmodel_kernels._gpu import product
from bigmodel_kernels.ops.lstm import by_layer, triton_sequence
from bigmodel_kernels.ops.lstm.by_layer import Tokens
from bigmodel_kernels.ops.lstm.triton_configs import config
from bigmodel_kernels.ops.lstm_cell import triton_step
from bigmodel_kernels.ops.lstm_cell.triton_kernels import supports as supports


def _launch_constants(kernel: str, x: Tensor, hidden: int, projected: bool, tokens: Tokens) -> dict | None:
    """Of a sequence kernel; None where this call goes step by step."""
    if projected or (tokens.packed and x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    # Its products before and after are PyTorch's, under the switch of products; an LSTM has one of its own as well.
    precision = _triton.precision(x.dtype, torch.backends.cuda.matmul, torch.backends.cudnn.rnn)
    device = x.device.index
    sizes = config(_triton.gpu(device), device, kernel, x.dtype, precision, hidden)
    return sizes and {"H": hidden, "PRECISION": precision, "PACKED": tokens.packed, **sizes}


def _at_once(kernel, tensors: tuple, strides: tuple, tokens: Tokens, directions: int, constants: dict) -> None:
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
        product(h[:rows], w_hh.t(), from_state[:rows])
        count, constants = triton_step.programs(rows, hidden)
        _triton.launch(
            triton_step.forward_kernel, count,
            from_input, from_state, bias, c, c, u, output, gates, cells, rows, first, hidden, output.stride(0),
            OUTPUT=w_hr is None, SAVE=save, **constants,
        )  # fmt: skip
        if w_hr is not None:
            torch.mm(u[:rows], w_hr.t(), out=h[:rows])
            output[first : first + rows] = h[:rows]


def _layer_forward(tokens, parameters, from_input, bias, h, c, y, gates, cells) -> None:
    directions, save = len(parameters), gates is not None
    gates, cells = (gates, cells) if save else (from_input, from_input)
    constants = _launch_constants("forward", y, c.shape[2], parameters[0][4] is not None, tokens)
    if constants is not None:
        w_hh = torch.stack([w[1].t() for w in parameters])
        tensors = (from_input, w_hh, bias, h, c, y, gates, cells)
        options = {"SAVE": save, **constants}
        _at_once(triton_sequence.forward_kernel, tensors, (y.stride(0),), tokens, directions, options)
        return
    for d, (_, w_hh, _, _, w_hr) in enumerate(parameters):
        part, steps = y.chunk(directions, 1)[d], tokens.steps[::-1] if d else tokens.steps
        _forward_by_step(from_input[d], w_hh, w_hr, bias[d], h[d], c[d], part, gates[d], cells[d], steps, save)


def fwd(*args):
    return by_layer.forward(_layer_forward, *args)


def _backward_by_step(d_y, d_h, d_c, gates, cells, c0, w_hh, w_hr, d_gates, d_projected, steps) -> None:
    """One direction; d_h and d_c hold the gradients of the final states, on return of the initial ones."""
    batch, hidden = c0.shape
    d_u = d_h if w_hr is None else torch.empty(batch, hidden, dtype=torch.float32, device=d_h.device)
    for (first, rows), (before, rows_before) in zip(steps[::-1], [*steps[-2::-1], (0, 0)]):
        here = slice(first, first + rows)
        if w_hr is not None:
            torch.add(d_h[:rows], d_y[here], out=d_projected[here])
            product(d_projected[here], w_hr, d_u[:rows])
        count, constants = triton_step.programs(rows, hidden)
        _triton.launch(
            triton_step.backward_kernel, count,
            d_u, d_y, d_c, gates, cells, c0, d_gates,
            rows, first, before, min(rows, rows_before), hidden, d_y.stride(0), d_gates.stride(0),
            OUTPUT=w_hr is None, **constants,
        )  # fmt: skip
        product(d_gates[here], w_hh, d_h[:rows])


def _layer_backward(tokens, parameters, d_y, d_h, d_c, gates, cells, c0, d_gates, d_projected) -> None:
    directions = len(parameters)
    constants = _launch_constants("backward", d_y, c0.shape[2], parameters[0][4] is not None, tokens)
    if constants is not None:
        w_hh = torch.stack([w[1] for w in parameters])
        tensors = (d_y, d_h, d_c, gates, cells, c0, w_hh, d_gates)
        strides = (d_y.stride(0), d_gates.stride(0))
        _at_once(triton_sequence.backward_kernel, tensors, strides, tokens, directions, constants)
        return
    for d, (_, w_hh, _, _, w_hr) in enumerate(parameters):
        part, steps = d_y.chunk(directions, 1)[d], tokens.steps[::-1] if d else tokens.steps
        _backward_by_step(
            part, d_h[d], d_c[d], gates[d], cells[d], c0[d], w_hh, w_hr, d_gates[:, d], d_projected[d], steps
        )


def bwd(*args):
    return by_layer.backward(_layer_backward, *args)
