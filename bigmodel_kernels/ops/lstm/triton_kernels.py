"""The LSTM on the Triton kernels of triton_sequence.py (a layer at once) or of lstm_cell/triton_step.py (step by step).

A layer goes at once where its recurrent weights stay on chip (triton_configs.py), h is not projected, and it would not need a
table of packed tokens while a CUDA graph is captured. Step by step, a step is PyTorch's product of the state and one
pointwise kernel; offsets come from batch_sizes on the CPU, so that nothing waits for the GPU and a graph can be captured.
Both ways save the same, and either's backward takes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bigmodel_kernels import _triton, _tuned
from bigmodel_kernels._gpu import product
from bigmodel_kernels.ops.lstm import by_layer, triton_sequence
from bigmodel_kernels.ops.lstm.by_layer import Tokens
from bigmodel_kernels.ops.lstm.triton_configs import config
from bigmodel_kernels.ops.lstm_cell import triton_step
from bigmodel_kernels.ops.lstm_cell.triton_kernels import supports as supports

# Its products before and after are PyTorch's, under the switch of products; an LSTM has one of its own as well.
SWITCHES = (torch.backends.cuda.matmul, torch.backends.cudnn.rnn)


@_tuned.cached
def _constants(gpu, device, kernel: str, dtype, precision: str, hidden: int, packed: bool) -> dict | None:
    """Of a sequence kernel; None where the weights do not stay on chip."""
    sizes = config(gpu, device, kernel, dtype, precision, hidden)
    if sizes is None:
        return None
    constants = {"H": hidden, "PRECISION": precision, "PACKED": packed, **sizes}
    if kernel == "forward":
        # A product without matrix units reads its weights by columns, which then have to be next to each other.
        constants["TRANSPOSED"] = dtype == torch.float32
    return constants


def _launch_constants(kernel: str, x: Tensor, hidden: int, projected: bool, tokens: Tokens) -> dict | None:
    """Of a sequence kernel; None where this call goes step by step."""
    if projected or (tokens.packed and x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    precision = _triton.precision(x.dtype, *SWITCHES)
    device = x.device.index
    return _constants(_triton.gpu(device), device, kernel, x.dtype, precision, hidden, tokens.packed)


def _at_once(kernel, tensors: tuple, numbers: tuple, tokens: Tokens, directions: int, constants: dict) -> None:
    tables = tokens.tables(tensors[0].device) if tokens.packed else (None, None)
    _triton.launch(
        kernel, directions * -(-tokens.batch // constants["BLOCK_B"]),
        *tensors, *tables, len(tokens.sizes), tokens.batch, tokens.count, *numbers, **constants,
    )  # fmt: skip


def _forward_by_step(from_input, parameters, h, c, output, gates, cells, steps) -> None:
    """One direction; h and c hold the initial states, on return the final ones."""
    _, w_hh, b_ih, b_hh, w_hr = parameters
    batch, hidden = c.shape
    from_state = torch.empty(batch, 4 * hidden, dtype=torch.float32, device=c.device)
    u = h if w_hr is None else torch.empty(batch, hidden, dtype=h.dtype, device=h.device)
    w_hh, b_ih, b_hh, stride = w_hh.t(), *_contiguous(b_ih, b_hh), output.stride(0)
    kept = output if w_hr is None else None
    last = -1
    for first, rows in steps:
        if rows != last:  # of dense sequences all steps have the same
            h_here, state_here, u_here, last = h[:rows], from_state[:rows], u[:rows], rows
            count, constants = triton_step.programs(rows, hidden)
        product(h_here, w_hh, state_here)
        _triton.launch(
            triton_step.forward_kernel, count,
            from_input, from_state, b_ih, b_hh, c, c, u, kept, gates, cells, rows, first, hidden, stride, **constants,
        )  # fmt: skip
        if w_hr is not None:
            torch.mm(u_here, w_hr.t(), out=h_here)
            output[first : first + rows] = h_here


def _contiguous(*tensors):
    return [None if t is None else t.contiguous() for t in tensors]


def _recurrent(parameters: tuple, transposed: bool) -> list[Tensor | None]:
    """w_hh and both biases as the sequence kernel takes them."""
    _, w_hh, b_ih, b_hh, _ = parameters
    return _contiguous(w_hh.t() if transposed else w_hh, b_ih, b_hh)


def _layer_forward(tokens, own, parameters, from_input, h0, c0, h_n, c_n, y, gates, cells) -> None:
    directions, hidden = len(parameters), c0.shape[2]
    constants = _launch_constants("forward", y, hidden, parameters[0][4] is not None, tokens)
    if constants is not None:
        w_hh, b_ih, b_hh = _recurrent(parameters[0], constants["TRANSPOSED"])
        w_hh_reverse, b_ih_reverse, b_hh_reverse = w_hh, b_ih, b_hh
        if directions == 2:
            w_hh_reverse, b_ih_reverse, b_hh_reverse = _recurrent(parameters[1], constants["TRANSPOSED"])
        tensors = (
            from_input, w_hh, w_hh_reverse, b_ih, b_hh, b_ih_reverse, b_hh_reverse, h0.contiguous(), c0.contiguous(),
            h_n, c_n, y, gates, cells,
        )  # fmt: skip
        numbers = (own.start, directions * hidden)
        _at_once(triton_sequence.forward_kernel, tensors, numbers, tokens, directions, constants)
        return
    h, c = h0[own].clone(memory_format=torch.contiguous_format), by_layer.float_state(c0[own])
    outputs = y.flatten(0, -2).chunk(directions, 1)
    from_input = from_input.view(directions, tokens.count, 4 * hidden)
    for d, of_direction in enumerate(parameters):
        steps = tokens.steps[::-1] if d else tokens.steps
        saved = (None, None) if gates is None else (gates[d], cells[d])
        _forward_by_step(from_input[d], of_direction, h[d], c[d], outputs[d], *saved, steps)
    h_n[own], c_n[own] = h, c


def fwd(*args):
    return by_layer.forward(_layer_forward, *args)


def infer(*args):
    return by_layer.infer(_layer_forward, *args[:8])


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
            d_u, d_y if w_hr is None else None, d_c, gates, cells, c0, d_gates,
            rows, first, before, min(rows, rows_before), hidden, d_y.stride(0), d_gates.stride(0),
            **constants,
        )  # fmt: skip
        product(d_gates[here], w_hh, d_h[:rows])


def _layer_backward(tokens, parameters, d_y, d_h, d_c, gates, cells, c0, d_gates, d_projected) -> None:
    directions = len(parameters)
    constants = _launch_constants("backward", d_y, c0.shape[2], parameters[0][4] is not None, tokens)
    if constants is not None:
        w_hh, w_hh_reverse = parameters[0][1].contiguous(), parameters[-1][1].contiguous()
        tensors = (d_y, d_h, d_c, gates, cells, c0, w_hh, w_hh_reverse, d_gates)
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
