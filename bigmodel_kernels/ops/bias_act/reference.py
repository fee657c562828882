"""What follows a linear layer, as its formula reads, and its gradient written out.

z = x + bias        y = keep activation(z) / (1 - p) + residual
dz = keep dy / (1 - p) activation'(z)        dx = dz, dbias = sum over rows of dz, dresidual = dy
"""

from __future__ import annotations

import torch
from torch import Tensor

from bigmodel_kernels.ops.attention.reference import arithmetic_dtype
from bigmodel_kernels.ops.attention.reference import dropout_keep as attention_keep
from bigmodel_kernels.ops.conv.reference import LEAKY_SLOPE, activate, activation_gradient


def dropout_keep(x: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    """Which elements of x [.., C] are kept: the numbers of attention's dropout, a row being a query and a column a key."""
    columns = x.shape[-1]
    rows = x.numel() // columns if columns else 0
    row, column = x.new_empty(1, 1, rows, 0), x.new_empty(1, 1, columns, 0)
    return attention_keep(row, column, seed, dropout_p).view(x.shape)


def kept_scale(dropout_p: float) -> float:
    """What elements that are kept are multiplied by."""
    return 1 / (1 - dropout_p) if dropout_p < 1 else 0.0


def _before(x: Tensor, bias: Tensor | None) -> Tensor:
    wide = arithmetic_dtype(x)
    return x.to(wide) if bias is None else x.to(wide) + bias.to(wide)


def fwd(
    x: Tensor,  # [.., C]
    bias: Tensor | None,  # [C]
    residual: Tensor | None,  # [.., C]
    seed: Tensor | None,  # [1]
    activation: str,
    dropout_p: float,
) -> Tensor:
    y = activate(_before(x, bias), activation, LEAKY_SLOPE)
    if dropout_p > 0:
        y = torch.where(dropout_keep(x, seed, dropout_p), y * kept_scale(dropout_p), 0)
    if residual is not None:
        y = y + residual.to(y.dtype)
    return y.to(x.dtype)


def bwd(
    dy: Tensor,
    need_bias: bool,
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """dx, and dbias (empty unless need_bias)."""
    z = _before(x, bias)
    d = dy.to(z.dtype)
    if dropout_p > 0:
        d = torch.where(dropout_keep(x, seed, dropout_p), d * kept_scale(dropout_p), 0)
    d = activation_gradient(d, activate(z, activation, LEAKY_SLOPE), z, activation, LEAKY_SLOPE)
    d_bias = d.sum_to_size(bias.shape).to(x.dtype) if need_bias else x.new_empty(0)
    return d.to(x.dtype), d_bias
