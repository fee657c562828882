"""The C++ kernels of csrc/cpu/norm_lstm*."""

from __future__ import annotations

import torch

from bigmodel_kernels.ops.lstm.cpu import DTYPES


def supports(a, *rest) -> str | None:
    if not a.is_cpu:
        return f"a is on {a.device}, not on the CPU"
    if a.dtype not in DTYPES:
        return f"a is {a.dtype}; the kernels take float32, float64 and bfloat16"
    return None


def _contiguous(*tensors):
    return [None if t is None else t.contiguous() for t in tensors]


def fwd(*args):
    return torch.ops.bigmodel_native.norm_lstm_fwd(*_contiguous(*args[:7]), *args[7:])


def bwd(d_output, d_h_n, d_c_n, output, z, gates, cells, *args):
    *tensors, eps, eps_c, _ = args
    given = _contiguous(d_output, d_h_n, d_c_n, output)
    return torch.ops.bigmodel_native.norm_lstm_bwd(*given, z, gates, cells, *_contiguous(*tensors), eps, eps_c)
