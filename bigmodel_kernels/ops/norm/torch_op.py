"""PyTorch's own normalisations. The pair for compiled graphs is native_layer_norm and its backward; PyTorch has none for RMS."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bigmodel_kernels.ops.norm import reference


def supports(*args) -> str | None:
    return None


def call(x, residual, weight, bias, eps, center):
    h = x if residual is None else x + residual
    shape = x.shape[-1:]
    y = F.layer_norm(h, shape, weight, bias, eps) if center else F.rms_norm(h, shape, weight, eps)
    return y, None if residual is None else h, None, None


def plan(x, residual, weight, bias, eps, center):
    """The results of `call` for arguments of these shapes as a function of the four tensors, by the function beneath
    torch.nn.functional's, which asks half a microsecond of questions first."""
    shape = x.shape[-1:]
    if residual is not None:

        def added(x, residual, weight, bias):
            h = x + residual
            return torch.layer_norm(h, shape, weight, bias, eps) if center else torch.rms_norm(h, shape, weight, eps), h

        return added
    if center:
        return lambda x, residual, weight, bias: torch.layer_norm(x, shape, weight, bias, eps)
    return lambda x, residual, weight, bias: torch.rms_norm(x, shape, weight, eps)


def fwd(x, residual, weight, bias, eps, center):
    if not center:
        y, h, *rows = reference.fwd(x, residual, weight, bias, eps, center)
        return y.contiguous(), h.contiguous(), *rows
    h = (x if residual is None else x + residual).contiguous()
    y, mean, rstd = torch.native_layer_norm(h, h.shape[-1:], weight, bias, eps)
    wide = reference.arithmetic_dtype(x)
    return y, x.new_empty(0) if residual is None else h, mean.flatten().to(wide), rstd.flatten().to(wide)


def bwd(dy, dh, h, mean, rstd, need_parameters, *args):
    d_x, d_weight, d_bias = reference.bwd(dy, dh, h, mean, rstd, need_parameters, *args)
    return d_x.contiguous(), d_weight, d_bias
