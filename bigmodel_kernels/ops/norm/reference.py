"""Layer normalisation as its formula reads, and its gradient written out.

    h = x + residual        xhat = (h - mean) rstd        y = weight xhat + bias
    rstd = 1 / sqrt(mean of (h - mean)^2 + eps);  RMS normalisation: the same with mean = 0 (Zhang & Sennrich 2019)
With g = dy weight:  dh = rstd (g - mean of g - xhat mean of (g xhat)) + what comes to h itself;  without the mean of g for RMS.
"""

from __future__ import annotations

from torch import Tensor

from bigmodel_kernels.ops.attention.reference import arithmetic_dtype


def fwd(
    x: Tensor,  # [.., C]
    residual: Tensor | None,  # [.., C]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    eps: float,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, h (empty without a residual), mean and rstd of every row."""
    dtype, wide = x.dtype, arithmetic_dtype(x)
    h = x.to(wide) if residual is None else x.to(wide) + residual.to(wide)
    mean = h.mean(-1, keepdim=True) if center else h.new_zeros(*h.shape[:-1], 1)
    rstd = ((h - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    y = (h - mean) * rstd
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    sum_ = x.new_empty(0) if residual is None else h.to(dtype)
    return y.to(dtype), sum_, mean.flatten(), rstd.flatten()


def bwd(
    dy: Tensor | None,
    dh: Tensor | None,
    h: Tensor,
    mean: Tensor,
    rstd: Tensor,
    need_parameters: bool,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of h, which is that of x and of residual; of weight and bias (empty unless need_parameters)."""
    wide = arithmetic_dtype(x)
    shape = (*h.shape[:-1], 1)
    d_h = h.new_zeros(h.shape, dtype=wide) if dh is None else dh.to(wide)
    dy = h.new_zeros(h.shape, dtype=wide) if dy is None else dy.to(wide)
    rstd = rstd.view(shape)
    normal = (h.to(wide) - mean.view(shape)) * rstd
    g = dy if weight is None else dy * weight
    d = g - normal * (g * normal).mean(-1, keepdim=True)
    if center:
        d = d - g.mean(-1, keepdim=True)
    d_h = (d_h + rstd * d).to(x.dtype)
    d_weight, d_bias = x.new_empty(0), x.new_empty(0)
    if need_parameters and weight is not None:
        d_weight = (dy * normal).sum_to_size(weight.shape).to(weight.dtype)
    if need_parameters and bias is not None:
        d_bias = dy.sum_to_size(bias.shape).to(bias.dtype)
    return d_h, d_weight, d_bias
