"""The cell op on the Triton kernels of triton_step.py; the products are PyTorch's."""

from __future__ import annotations

import torch

from bigmodel_kernels import _triton
from bigmodel_kernels._gpu import product
from bigmodel_kernels.ops.lstm.by_layer import bias_of, weight_gradients
from bigmodel_kernels.ops.lstm_cell.op import saved_shapes
from bigmodel_kernels.ops.lstm_cell.triton_step import backward_kernel, forward_kernel, programs


def supports(x, *rest) -> str | None:
    return _triton.reason(x)


def fwd(x, h, c, w_ih, w_hh, b_ih, b_hh, save):
    (batch, hidden), device = h.shape, x.device
    from_input, from_state = torch.empty(2, batch, 4 * hidden, dtype=torch.float32, device=device)
    product(x, w_ih.t(), from_input)
    product(h, w_hh.t(), from_state)
    h_new, c_new = torch.empty(2, batch, hidden, dtype=x.dtype, device=device)
    gates, cells = (torch.empty(shape, dtype=torch.float32, device=device) for shape in saved_shapes(x, h, save))
    count, constants = programs(batch, hidden)
    _triton.launch(
        forward_kernel, count,
        from_input, from_state, bias_of(w_hh, b_ih, b_hh), c.contiguous(), c_new, h_new, h_new, gates, cells,
        batch, 0, hidden, hidden, OUTPUT=False, SAVE=save, **constants,
    )  # fmt: skip
    return h_new, c_new, gates, cells


def bwd(d_h_new, d_c_new, h_new, gates, cells, need_d_x, need_d_weights, x, h, c, w_ih, w_hh, b_ih, b_hh, save):
    batch, hidden = h.shape
    d_h, d_c = (
        torch.zeros(h.shape, dtype=torch.float32, device=h.device)
        if d is None
        else d.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        for d in (d_h_new, d_c_new)
    )
    d_gates = torch.empty(batch, 4 * hidden, dtype=x.dtype, device=x.device)
    count, constants = programs(batch, hidden)
    _triton.launch(
        backward_kernel, count,
        d_h, d_h, d_c, gates.contiguous(), cells.contiguous(), c.contiguous(), d_gates,
        batch, 0, 0, 0, hidden, hidden, 4 * hidden, OUTPUT=False, **constants,
    )  # fmt: skip
    d_x = d_gates @ w_ih if need_d_x else x.new_empty(0)
    d_weights = weight_gradients(d_gates, x, h, b_ih is not None) if need_d_weights else []
    return d_x, d_gates @ w_hh, d_c.to(c.dtype), d_weights
