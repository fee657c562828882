"""A linear layer and what follows it, as its formula reads, and its gradient written out.

z = x w^T + bias        y = activation(z) + residual
dz = dy activation'(z)  dx = dz w,  dw = dz^T x,  dbias = sum over rows of dz,  dresidual = dy
"""

from __future__ import annotations

from torch import Tensor

from bigmodel_kernels.ops.attention.reference import arithmetic_dtype
from bigmodel_kernels.ops.conv.reference import activate, activation_gradient

KNOWN_FROM_Z = ("gelu", "silu")


def saves_known(activation: str, residual: Tensor | None) -> bool:
    """Whether the backward needs more than y: these derivatives are known from z alone, and a residual hides the others'."""
    return activation in KNOWN_FROM_Z or (activation != "none" and residual is not None)


def fwd(
    x: Tensor,  # [.., I]
    weight: Tensor,  # [O, I]
    bias: Tensor | None,  # [O]
    residual: Tensor | None,  # [.., O]
    activation: str,
    slope: float,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """y [.., O], and what the derivative is known from, likewise: z, or y before the residual (empty where it is y itself)."""
    wide = arithmetic_dtype(x)
    z = x.to(wide) @ weight.to(wide).t()
    if bias is not None:
        z = z + bias.to(wide)
    before = activate(z, activation, slope)
    y = before if residual is None else before + residual.to(wide)
    if not (save and saves_known(activation, residual)):
        return y.to(x.dtype), x.new_empty(0)
    return y.to(x.dtype), (z if activation in KNOWN_FROM_Z else before).to(x.dtype)


def bwd(
    dy: Tensor,
    y: Tensor,
    known: Tensor,
    needs: list[int],  # x, weight, bias
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    slope: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dbias; those that are not wanted are empty."""
    wide = arithmetic_dtype(x)
    inputs, outputs = weight.shape[1], weight.shape[0]
    dz = dy.to(wide)
    if activation != "none":
        known = (known if saves_known(activation, residual) else y).to(wide)
        dz = activation_gradient(dz, known, known, activation, slope)
    rows = dz.reshape(-1, outputs)
    found = (
        (dz @ weight.to(wide)).to(x.dtype) if needs[0] else x.new_empty(0),
        (rows.t() @ x.to(wide).reshape(-1, inputs)).to(x.dtype) if needs[1] else x.new_empty(0),
        rows.sum(0).to(x.dtype) if needs[2] else x.new_empty(0),
    )
    return tuple(t.contiguous() for t in found)
