"""The CUDA C++ kernels of csrc/cuda/lstm_cell.cuh: all that is left of a step after its products, which are PyTorch's."""

from __future__ import annotations

import torch

from bigmodel_kernels import _gpu
from bigmodel_kernels._gpu import product
from bigmodel_kernels.ops.lstm.by_layer import weight_gradients

NATIVE_OP = "lstm_cell_step_fwd"
native = torch.ops.bigmodel_native


def supports(x, *rest) -> str | None:
    return _gpu.reason(x)


def _contiguous(*tensors):
    return [None if t is None else t.contiguous() for t in tensors]


def fwd(x, h, c, w_ih, w_hh, b_ih, b_hh, save):
    shape = (h.shape[0], 4 * h.shape[1])
    from_input, from_state = torch.empty(2, *shape, dtype=torch.float32, device=x.device)
    product(x, w_ih.t(), from_input)
    product(h, w_hh.t(), from_state)
    return native.lstm_cell_step_fwd(from_input, from_state, *_contiguous(c, b_ih, b_hh), save)


def bwd(d_h, d_c, h_new, gates, cells, need_d_x, need_d_weights, x, h, c, w_ih, w_hh, b_ih, b_hh, save):
    d_gates, d_c = native.lstm_cell_step_bwd(*_contiguous(d_h, d_c, gates, cells, c))
    d_x = d_gates @ w_ih if need_d_x else x.new_empty(0)
    return d_x, d_gates @ w_hh, d_c, weight_gradients(d_gates, x, h, b_ih is not None) if need_d_weights else []
