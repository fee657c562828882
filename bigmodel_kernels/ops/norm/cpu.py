"""The C++ kernels of csrc/cpu/norm*.h."""

from __future__ import annotations

import torch
from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack

from bigmodel_kernels import _cpu
from bigmodel_kernels._library import Call, in_forward_mode
from bigmodel_kernels._rows import rows_of
from bigmodel_kernels.ops.norm.op import OP

_MOST_DIMS = 8  # kMostDims of csrc/cpu/new_tensor.h


def supports(x, *rest) -> str | None:
    return _cpu.reason(x)


def _as_taken(*tensors):
    """All contiguous, or all matrices with adjacent columns."""
    for t in tensors:
        if t is not None and not (t.is_contiguous() and t.dim() <= _MOST_DIMS):
            return [rows_of(t) for t in tensors]
    return tensors


def _vector(t):
    return t if t is None else t.contiguous()


def fwd(x, residual, weight, bias, eps, center):
    rows, added = _as_taken(x, residual)
    y, h, mean, rstd = torch.ops.bigmodel_native.norm_fwd.default(
        rows, added, _vector(weight), _vector(bias), eps, center
    )
    if y.dim() != x.dim():
        y, h = y.view(x.shape), h if residual is None else h.view(x.shape)
    return y, h, mean, rstd


def plan(x, residual, weight, bias, eps, center):
    """The op's results for arguments of these shapes as a function of the four tensors. Few calls of functions: right after a
    kernel each takes longer than it does in a loop."""
    native = torch.ops.bigmodel_native.norm_fwd.default
    recorded = Call(OP, "cpu", (None, None, None, None, eps, center))
    dims = x.dim()

    def general(*tensors):
        y, h, *_ = OP(*tensors, eps, center, backend="auto")
        return y if tensors[1] is None else (y, h)

    def run(x, residual, weight, bias):
        tensors = (x, residual, weight, bias)
        save = False
        if torch.is_grad_enabled():
            for t in tensors:
                if t is not None and t.requires_grad:
                    save = True
                    break
        if _len_torch_dispatch_stack() or _are_functorch_transforms_active() or in_forward_mode():
            return general(*tensors)
        if save:
            for t in tensors:
                if t is not None and t.is_inference():  # autograd saves no such tensor
                    return general(*tensors)
            y, h = recorded(tensors)
            return y if residual is None else (y, h)
        if weight is not None and not weight.is_contiguous():
            weight = weight.contiguous()
        if bias is not None and not bias.is_contiguous():
            bias = bias.contiguous()
        rows, added = (
            (x, None) if residual is None and x.is_contiguous() and dims <= _MOST_DIMS else _as_taken(x, residual)
        )
        y, h, _, _ = native(rows, added, weight, bias, eps, center)
        if y.dim() != dims:
            y, h = y.view(x.shape), h if residual is None else h.view(x.shape)
        return y if residual is None else (y, h)

    return run


def bwd(dy, dh, h, mean, rstd, need_parameters, x, residual, weight, bias, eps, center):
    if dy is None:  # only h was used
        nothing = (torch.zeros_like(t) if need_parameters and t is not None else x.new_empty(0) for t in (weight, bias))
        return dh.clone(memory_format=torch.contiguous_format), *nothing
    needs = (need_parameters and t is not None for t in (weight, bias))
    dy, dh, h = _as_taken(dy, dh, h)
    native = torch.ops.bigmodel_native.norm_bwd.default
    d_h, d_weight, d_bias = native(dy, dh, h, mean, rstd, _vector(weight), center, *needs)
    return d_h if d_h.dim() == x.dim() else d_h.view(x.shape), d_weight, d_bias
