"""Tensors of any number of dimensions as the rows that kernels take."""

from __future__ import annotations

from torch import Tensor


def matrix_of(t: Tensor) -> Tensor:
    """[.., C] as [rows, C]: a view where its strides allow one."""
    if t.dim() == 2:
        return t
    if t.numel():
        return t.reshape(-1, t.shape[-1])
    return t.new_empty(t.shape[:-1].numel(), t.shape[-1])


def rows_of(t: Tensor | None) -> Tensor | None:
    """The same with adjacent columns."""
    if t is None:
        return None
    t = matrix_of(t)
    return t if t.stride(1) == 1 else t.contiguous()
