"""Sequences padded to the longest, and attention's formula on those: the oracle of the tests, and what gradients of gradients
go through."""

from __future__ import annotations

import torch
from torch import Tensor

from bigmodel_kernels.ops.attention import reference
from bigmodel_kernels.ops.attention.op import lse_dtype


class _Padding:
    """Between tokens laid end to end and sequences [B, longest]."""

    def __init__(self, cu_seqlens: Tensor, total: int):
        lengths = cu_seqlens.diff()
        longest = int(lengths.max()) if len(lengths) else 0
        place = torch.arange(longest, device=cu_seqlens.device)
        self.lengths, self.inside = lengths, place < lengths[:, None]
        self._rows = (cu_seqlens[:-1, None] + place).clamp(max=max(total - 1, 0))
        token = torch.arange(total, device=cu_seqlens.device)
        self._sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
        self._place = token - cu_seqlens[self._sequence]

    def add(self, t: Tensor) -> Tensor:
        """[tokens, H, D] as [B, H, longest, D], with 0 where no token is."""
        return t[self._rows].masked_fill(~self.inside[..., None, None], 0).transpose(1, 2)

    def drop(self, t: Tensor) -> Tensor:
        """[B, H, longest, ..] as [tokens, H, ..]."""
        return t.transpose(1, 2)[self._sequence, self._place]


def _padded(
    q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, seed, max_seqlen_q, max_seqlen_k, scale, dropout_p, softcap,
    window_left, window_right, lower_right, return_lse, deterministic, save,
) -> tuple[_Padding, _Padding, tuple]:  # fmt: skip
    """Of the queries, of the keys, and the arguments of attention's formula."""
    of_q, of_k = _Padding(cu_seqlens_q, q.shape[0]), _Padding(cu_seqlens_k, k.shape[0])
    offset = (of_k.lengths - of_q.lengths)[:, None, None] if lower_right else 0
    slopes = None if alibi_slopes is None else alibi_slopes.to(lse_dtype(q))
    mask = reference.mask_of_lengths(of_q.inside, of_k.inside, offset, window_left, window_right, slopes)
    padded = (of_q.add(q), of_k.add(k), of_k.add(v))
    return of_q, of_k, (*padded, mask, None, seed, scale, dropout_p, softcap, -1, -1, False)


def fwd(*args):
    """out [total_q, Hq, Dv] and lse [Hq, total_q]; arguments as in op.SCHEMA."""
    of_q, _, padded = _padded(*args)
    out, lse = reference.fwd(*padded)
    return of_q.drop(out), of_q.drop(lse).T


def bwd(grad_out, grad_lse, out, lse, *args):
    """dq [total_q, Hq, D], dk [total_k, Hkv, D] and dv [total_k, Hkv, Dv]."""
    of_q, of_k, padded = _padded(*args)
    grad_lse, lse = (None if t is None else of_q.add(t.T[..., None])[..., 0] for t in (grad_lse, lse))
    dq, dk, dv, _ = reference.bwd(of_q.add(grad_out), grad_lse, of_q.add(out), lse, False, *padded)
    return of_q.drop(dq), of_k.drop(dk), of_k.drop(dv)
