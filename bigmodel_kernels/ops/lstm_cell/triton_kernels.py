"""The cell op on the Triton kernels of triton_step.py; the products are PyTorch's."""

from __future__ import annotations

import torch

from bigmodel_kernels import _triton
from bigmodel_kernels._gpu import linear
from bigmodel_kernels.ops.lstm.by_layer import weight_gradients
from bigmodel_kernels.ops.lstm_cell.op import saved_shapes
from bigmodel_kernels.ops.lstm_cell.triton_step import backward_kernel, forward_kernel, programs


def supports(x, *rest) -> str | None:
    return _triton.reason(x)


def _step(
    x, h, c, w_ih, w_hh, b_ih, b_hh, save
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The new h and c, gates and cells; of the last two something is written only with `save`."""
    batch, hidden = h.shape
    gates, from_state = linear(x, w_ih), linear(h, w_hh)  # the kernel writes the gates over the product
    h_new, c_new = h.new_empty(batch, hidden), h.new_empty(batch, hidden)
    cells = gates.new_empty(1, batch, hidden) if save else None
    if b_ih is not None:
        b_ih, b_hh = b_ih.contiguous(), b_hh.contiguous()
    count, constants = programs(batch, hidden)
    _triton.launch(
        forward_kernel, count,
        gates, from_state, b_ih, b_hh, c.contiguous(), c_new, h_new, None, gates if save else None, cells,
        batch, 0, hidden, hidden, **constants,
    )  # fmt: skip
    return h_new, c_new, gates, cells


def infer(*args):
    return _step(*args)[:2]


def fwd(*args):
    h_new, c_new, gates, cells = _step(*args)
    if cells is None:
        return h_new, c_new, *(gates.new_empty(shape) for shape in saved_shapes(args[0], args[1], False))
    return h_new, c_new, gates.unsqueeze(0), cells


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
        d_h, None, d_c, gates.contiguous(), cells.contiguous(), c.contiguous(), d_gates,
        batch, 0, 0, 0, hidden, hidden, 4 * hidden, **constants,
    )  # fmt: skip
    d_x = d_gates @ w_ih if need_d_x else x.new_empty(0)
    d_weights = weight_gradients(d_gates, x, h, b_ih is not None) if need_d_weights else []
    return d_x, d_gates @ w_hh, d_c.to(c.dtype), d_weights
