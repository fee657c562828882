"""The C++ kernels of csrc/cpu/linear*.h."""

from __future__ import annotations

import torch

from bigmodel_kernels import _cpu, _extension
from bigmodel_kernels._rows import matrix_of, rows_of
from bigmodel_kernels.ops.linear import reference


def supports(x, *rest) -> str | None:
    return _cpu.reason(x)


def fwd(x, weight, bias, residual, activation, slope, save):
    bias = bias if bias is None else bias.contiguous()
    residual = rows_of(residual)
    save = save and reference.saves_known(activation, residual)
    y, known = torch.ops.bigmodel_native.linear_fwd(matrix_of(x), weight, bias, residual, activation, slope, save)
    shape = (*x.shape[:-1], weight.shape[0])
    return y if x.dim() == 2 else y.view(shape), known if x.dim() == 2 or not save else known.view(shape)


def plan(x, weight, bias, residual, activation, slope, save):
    """`fwd` for arguments of these shapes and options as a function of the four tensors; None where a backward follows."""
    if save:
        return None
    native = torch.ops.bigmodel_native.linear_fwd.default
    flat, shape = x.dim() == 2, (*x.shape[:-1], weight.shape[0])

    def run(x, weight, bias, residual):
        bias = bias if bias is None else bias.contiguous()
        tensors = (matrix_of(x), weight, bias, rows_of(residual))
        try:
            y = native(*tensors, activation, slope, False)[0]
        except RuntimeError as error:
            if (lack := _extension.lack_of_memory(error, "linear", tensors)) is None:
                raise
            raise lack from error
        return y if flat else y.view(shape)

    return run


def bwd(dy, y, known, needs, x, weight, bias, residual, activation, slope, save):
    known = known if reference.saves_known(activation, residual) else y
    dx, dweight, dbias = torch.ops.bigmodel_native.linear_bwd(
        rows_of(dy), matrix_of(known), matrix_of(x), weight, activation, slope, *map(bool, needs)
    )
    return dx.view(x.shape) if needs[0] else dx, dweight, dbias
