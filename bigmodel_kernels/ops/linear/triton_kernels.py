"""PyTorch's product (cuBLAS, the bias in its epilogue) and the pointwise kernels of `bias_act` for what follows it."""

from __future__ import annotations

import torch.nn.functional as F

from bigmodel_kernels.ops.bias_act import triton_kernels as pointwise
from bigmodel_kernels.ops.conv.reference import LEAKY_SLOPE
from bigmodel_kernels.ops.linear import reference, torch_op


def supports(x, weight, bias, residual, activation, slope, save) -> str | None:
    if activation == "leaky_relu" and slope != LEAKY_SLOPE:
        return f"activation 'leaky_relu' has a slope of {slope}; the kernels have {LEAKY_SLOPE}"
    return pointwise.supports(x)


def fwd(x, weight, bias, residual, activation, slope, save):
    if activation == "none" and residual is None:
        return torch_op.fwd(x, weight, bias, residual, activation, slope, save)
    z = F.linear(x, weight, bias)
    keep = save and reference.saves_known(activation, residual)
    if not keep or activation in reference.KNOWN_FROM_Z:
        return pointwise.fwd(z, None, residual, None, activation, 0.0), z.contiguous() if keep else x.new_empty(0)
    before = pointwise.fwd(z, None, None, None, activation, 0.0)
    return before + residual, before


def bwd(dy, y, known, needs, x, weight, bias, residual, activation, slope, save):
    if activation in ("none", "tanh", "sigmoid"):  # the pointwise kernel takes derivatives from z, which was not kept
        return torch_op.bwd(dy, y, known, needs, x, weight, bias, residual, activation, slope, save)
    z = known if reference.saves_known(activation, residual) else y  # of a ReLU only the sign matters
    dz, dbias = pointwise.bwd(dy, bool(needs[2]), z, None, None, None, activation, 0.0)
    return *torch_op.products(dz, needs, x, weight), dbias
