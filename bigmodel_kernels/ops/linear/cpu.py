"""The C++ kernels of csrc/cpu/linear*.h."""

from __future__ import annotations

import torch
from torch import Tensor

from bigmodel_kernels.ops.linear import reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def supports(x, *rest) -> str | None:
    if not x.is_cpu:
        return f"x is on {x.device}, not on the CPU"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}; the kernels take float32, float64 and bfloat16"
    return None


def _matrix(t: Tensor) -> Tensor:
    """[.., C] as [rows, C], a view where its strides allow one."""
    return (
        t
        if t.dim() == 2
        else t.reshape(-1, t.shape[-1])
        if t.numel()
        else t.new_empty(t.shape[:-1].numel(), t.shape[-1])
    )


def _rows(t: Tensor) -> Tensor:
    """The same with adjacent columns."""
    t = _matrix(t)
    return t if t.stride(1) == 1 else t.contiguous()


def fwd(x, weight, bias, residual, activation, slope, save):
    bias = bias if bias is None else bias.contiguous()
    residual = residual if residual is None else _rows(residual)
    save = save and reference.saves_known(activation, residual)
    y, known = torch.ops.bigmodel_native.linear_fwd(_matrix(x), weight, bias, residual, activation, slope, save)
    shape = (*x.shape[:-1], weight.shape[0])
    return y if x.dim() == 2 else y.view(shape), known if x.dim() == 2 or not save else known.view(shape)


def bwd(dy, y, known, needs, x, weight, bias, residual, activation, slope, save):
    known = known if reference.saves_known(activation, residual) else y
    dx, dweight, dbias = torch.ops.bigmodel_native.linear_bwd(
        _rows(dy), _matrix(known), _matrix(x), weight, activation, slope, *map(bool, needs)
    )
    return dx.view(x.shape) if needs[0] else dx, dweight, dbias
