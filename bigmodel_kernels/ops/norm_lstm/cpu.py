"""The C++ kernels of csrc/cpu/norm_lstm*."""

from __future__ import annotations

import torch

from bigmodel_kernels import _cpu


def supports(a, *rest) -> str | None:
    return _cpu.reason(a, "a")


def _contiguous(*tensors):
    return [None if t is None else t.contiguous() for t in tensors]


def fwd(*args):
    return torch.ops.bigmodel_native.norm_lstm_fwd(*_contiguous(*args[:7]), *args[7:])


def bwd(d_output, d_h_n, d_c_n, output, z, gates, cells, *args):
    *tensors, eps, eps_c, _ = args
    given = _contiguous(d_output, d_h_n, d_c_n, output)
    return torch.ops.bigmodel_native.norm_lstm_bwd(*given, z, gates, cells, *_contiguous(*tensors), eps, eps_c)
