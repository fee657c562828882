"""PyTorch's own ops one after the other. `fwd` and `bwd` are for compiled graphs, whose backend is chosen when they run."""

from __future__ import annotations

import torch.nn.functional as F

from bigmodel_kernels.ops.bias_act import reference
from bigmodel_kernels.ops.conv.reference import LEAKY_SLOPE, activate


def supports(*args) -> str | None:
    return None


def call(x, bias, residual, seed, activation, dropout_p):
    y = activate(x if bias is None else x + bias, activation, LEAKY_SLOPE)
    y = F.dropout(y, dropout_p) if dropout_p > 0 else y
    return y if residual is None else y + residual


def fwd(*args):
    return reference.fwd(*args).contiguous()


def bwd(*args):
    d_x, d_bias = reference.bwd(*args)
    return d_x.contiguous(), d_bias
