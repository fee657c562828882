"""The C++ kernels of csrc/cpu/lstm*.h, on one step."""

from __future__ import annotations

import functools

import torch

from bigmodel_kernels.ops.lstm.cpu import supports as supports


def _contiguous(*tensors):
    return [None if t is None else t.contiguous() for t in tensors]


@functools.cache
def native():
    """The operator of a step that keeps nothing for a backward; it takes contiguous tensors."""
    return torch.ops.bigmodel_native.lstm_cell_infer.default


def infer(*args):
    return native()(*_contiguous(*args[:-1]))


def fwd(*args):
    *tensors, save = args
    return torch.ops.bigmodel_native.lstm_cell_fwd(*_contiguous(*tensors), save)


def bwd(d_h, d_c, h_new, gates, cells, need_d_x, need_d_weights, *args):
    saved = (*_contiguous(d_h, d_c, h_new), gates, cells)
    return torch.ops.bigmodel_native.lstm_cell_bwd(*saved, need_d_x, need_d_weights, *_contiguous(*args[:-1]))
