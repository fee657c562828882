"""The C++ kernels of csrc/cpu/norm*.h."""

from __future__ import annotations

import torch

from bigmodel_kernels import _cpu
from bigmodel_kernels._rows import rows_of


def supports(x, *rest) -> str | None:
    return _cpu.reason(x)


def _vector(t):
    return t if t is None else t.contiguous()


def fwd(x, residual, weight, bias, eps, center):
    y, h, mean, rstd = torch.ops.bigmodel_native.norm_fwd(
        rows_of(x), rows_of(residual), _vector(weight), _vector(bias), eps, center
    )
    return y.view(x.shape), h if residual is None else h.view(x.shape), mean, rstd


def bwd(dy, dh, h, mean, rstd, need_parameters, x, residual, weight, bias, eps, center):
    if dy is None:  # only h was used
        nothing = (torch.zeros_like(t) if need_parameters and t is not None else x.new_empty(0) for t in (weight, bias))
        return dh.clone(memory_format=torch.contiguous_format), *nothing
    needs = (need_parameters and t is not None for t in (weight, bias))
    d_h, d_weight, d_bias = torch.ops.bigmodel_native.norm_bwd(
        rows_of(dy), rows_of(dh), rows_of(h), mean, rstd, _vector(weight), center, *needs
    )
    return d_h.view(x.shape), d_weight, d_bias
