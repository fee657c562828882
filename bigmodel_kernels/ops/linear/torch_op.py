"""PyTorch's own linear layer and what a user writes after it: `call` with its own autograd; `fwd` and `bwd` are for compiled
graphs, whose backend is chosen when they run."""

from __future__ import annotations

import torch.nn.functional as F

from bigmodel_kernels.ops.conv.reference import activate, activation_gradient
from bigmodel_kernels.ops.linear import reference


def supports(*args) -> str | None:
    return None


def call(x, weight, bias, residual, activation, slope, save):
    y = activate(F.linear(x, weight, bias), activation, slope)
    return y if residual is None else y + residual, None


def plan(x, weight, bias, residual, activation, slope, save):
    """`call` for arguments of these shapes and options as a function of the four tensors."""
    if residual is not None or activation not in ("none", "relu"):
        return lambda *tensors: call(*tensors, activation, slope, save)[0]
    if activation == "none":
        return lambda x, weight, bias, residual: F.linear(x, weight, bias)
    return lambda x, weight, bias, residual: F.linear(x, weight, bias).relu_()


def fwd(x, weight, bias, residual, activation, slope, save):
    z = F.linear(x, weight, bias)
    before = activate(z, activation, slope)
    y = before if residual is None else before + residual
    known = x.new_empty(0)
    if save and reference.saves_known(activation, residual):
        known = z if activation in reference.KNOWN_FROM_Z else before
    # No two results may share memory, nor one with an argument.
    return y.contiguous(), known.contiguous()


def bwd(dy, y, known, needs, x, weight, bias, residual, activation, slope, save):
    known = known if reference.saves_known(activation, residual) else y
    dz = dy if activation == "none" else activation_gradient(dy, known, known, activation, slope)
    dbias = dz.reshape(-1, weight.shape[0]).sum(0) if needs[2] else x.new_empty(0)
    return *products(dz, needs, x, weight), dbias


def products(dz, needs, x, weight):
    """dx = dz w and dweight = dz^T x; those that are not wanted are empty."""
    dx = dz @ weight if needs[0] else x.new_empty(0)
    dweight = x.new_empty(0)
    if needs[1]:
        dweight = dz.reshape(-1, weight.shape[0]).t() @ x.reshape(-1, weight.shape[1])
    return dx.contiguous(), dweight.contiguous()
