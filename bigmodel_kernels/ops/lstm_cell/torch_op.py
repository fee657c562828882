"""PyTorch's own LSTM cell. `fwd` and `bwd` are for compiled graphs, whose backend is chosen only when they run; PyTorch has
no such pair on every device, so `bwd` runs its forward again."""

from __future__ import annotations

import torch
from torch import _VF

from bigmodel_kernels.ops.lstm.torch_op import supports as supports


def call(x, h, c, w_ih, w_hh, b_ih, b_hh, save):
    return *_VF.lstm_cell(x, (h, c), w_ih, w_hh, b_ih, b_hh), None, None


def fwd(x, h, c, *rest):
    from bigmodel_kernels.ops.lstm_cell.op import saved_dtype, saved_shapes

    h_new, c_new, *_ = call(x, h, c, *rest)
    # Nothing of what it saved can be seen: the outputs for the backward have their sizes only.
    saved = [x.new_zeros(shape, dtype=saved_dtype(x.dtype)) for shape in saved_shapes(x, h, rest[-1])]
    return h_new.contiguous(), c_new.contiguous(), *saved


def bwd(d_h, d_c, h_new, gates, cells, need_d_x, need_d_weights, *args):
    *tensors, save = args
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        used = [(y, g) for y, g in zip(call(*leaves, save), (d_h, d_c)) if g is not None]
        wanted = [t for t in (leaves if need_d_weights else leaves[:3]) if t is not None]
        d_x, d_h, d_c, *d_weights = (
            g.contiguous()
            for g in torch.autograd.grad([y for y, _ in used], wanted, [g for _, g in used], materialize_grads=True)
        )
    return d_x if need_d_x else d_x.new_empty(0), d_h, d_c, d_weights
