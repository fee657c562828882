"""bmk.attention_varlen: sequences of different lengths laid end to end. Composed from bmk.attention, one call a sequence;
under torch.compile, where lengths are not known, one call on padded sequences with a mask."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from bigmodel_kernels._arguments import flag
from bigmodel_kernels.ops.attention.op import ALIGNMENTS, attention, lse_dtype, slopes_2d, window_sides


def attention_varlen(
    q: Tensor,  # [total_q, Hq, D]
    k: Tensor,  # [total_k, Hkv, D]
    v: Tensor,  # [total_k, Hkv, Dv]
    cu_seqlens_q: Tensor,  # [B + 1]
    cu_seqlens_k: Tensor,  # [B + 1]
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    is_causal: bool = False,
    alignment: str = "upper_left",
    scale: float | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,  # [Hq] or [B, Hq]
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within each of B sequences: tokens cu_seqlens[b] .. cu_seqlens[b + 1] of q, and of k and v.

    Args:
        cu_seqlens_q, cu_seqlens_k: int32 or int64, rising from 0 to the total.
        max_seqlen_q, max_seqlen_k: at least the longest sequence.
        The others: as bmk.attention.

    Returns:
        [total_q, Hq, Dv]; with return_lse also the log-sum-exp [Hq, total_q].

    Raises:
        RuntimeError, ValueError, TypeError: as bmk.attention, and for cu_seqlens that do not fit the tokens.
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if t.dim() != 3:
            raise RuntimeError(f"{name} must have 3 dimensions [tokens, heads, features], got shape {list(t.shape)}")
    for name, t in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(t, Tensor) or t.dtype not in (torch.int32, torch.int64) or t.dim() != 1 or t.numel() == 0:
            raise TypeError(
                f"{name} must be a one-dimensional int32 or int64 tensor with one element more than sequences"
            )
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise RuntimeError(
            f"cu_seqlens_k must have the length of cu_seqlens_q, {len(cu_seqlens_q)}, got {len(cu_seqlens_k)}"
        )
    if v.shape[0] != k.shape[0]:
        raise RuntimeError(f"v must have the {k.shape[0]} tokens of k, got {v.shape[0]}")
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if not hasattr(longest, "__index__"):
            raise TypeError(f"{name} must be an int, got {type(longest).__name__}")
    if alignment not in ALIGNMENTS:
        raise ValueError(f"alignment must be one of {', '.join(ALIGNMENTS)}; got {alignment!r}")
    is_causal, return_lse = flag("is_causal", is_causal), flag("return_lse", return_lse)
    options = {
        "scale": scale, "dropout_p": dropout_p, "enable_gqa": enable_gqa, "softcap": softcap, "return_lse": True,
        "deterministic": deterministic, "backend": backend,
    }  # fmt: skip
    batch = cu_seqlens_q.shape[0] - 1
    slopes = None
    if alibi_slopes is not None:
        slopes = slopes_2d(alibi_slopes, batch, q.shape[1], q.device).expand(batch, -1)
    run = _padded if torch.compiler.is_compiling() else _one_by_one
    limits = (is_causal, alignment, window)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out, lse = run(q, k, v, lengths, limits, slopes, options)
    return (out, lse) if return_lse else out


def _bounds(name: str, cu_seqlens: Tensor, total: int, longest: int) -> list[int]:
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != total or any(b < a for a, b in pairwise(ends)):
        raise RuntimeError(f"cu_seqlens_{name} must rise from 0 to the {total} tokens, got {ends}")
    if any(b - a > longest for a, b in pairwise(ends)):
        raise RuntimeError(f"max_seqlen_{name} must be at least the longest sequence, got {longest} with {ends}")
    return ends


def _one_by_one(q, k, v, lengths, limits, slopes, options):
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = lengths
    ends_q = _bounds("q", cu_seqlens_q, q.shape[0], max_seqlen_q)
    ends_k = _bounds("k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    is_causal, alignment, window = limits
    options = {**options, "is_causal": is_causal, "alignment": alignment, "window": window}
    sizes_q, sizes_k = ([b - a for a, b in pairwise(ends)] for ends in (ends_q, ends_k))
    parts = zip(q.split(sizes_q), k.split(sizes_k), v.split(sizes_k))
    results = [
        attention(
            *(t.transpose(0, 1)[None] for t in part),
            alibi_slopes=None if slopes is None else slopes[b : b + 1],
            **options,
        )
        for b, part in enumerate(parts)
    ]
    if not results:
        return q.new_zeros(0, q.shape[1], v.shape[2]), q.new_zeros(q.shape[1], 0)
    return torch.cat([out[0].transpose(0, 1) for out, _ in results]), torch.cat([lse[0] for _, lse in results], 1)


def _padded(q, k, v, lengths, limits, slopes, options):
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = lengths
    is_causal, alignment, window = limits
    rows_q, in_q = _rows(cu_seqlens_q, max_seqlen_q, q.shape[0])
    rows_k, in_k = _rows(cu_seqlens_k, max_seqlen_k, k.shape[0])
    offset = (cu_seqlens_k.diff() - cu_seqlens_q.diff())[:, None, None] if alignment == "lower_right" else 0
    mask = position_mask(q, in_q, in_k, offset, is_causal, window, slopes)
    padded = (t[rows].transpose(1, 2) for t, rows in ((q, rows_q), (k, rows_k), (v, rows_k)))
    out, lse = attention(*padded, attn_mask=mask, **options)
    # Where each token of q went.
    token = torch.arange(q.shape[0], device=q.device)
    sequence = torch.searchsorted(cu_seqlens_q[1:].contiguous(), token, right=True)
    place = token - cu_seqlens_q[sequence]
    return out.transpose(1, 2)[sequence, place], lse.transpose(1, 2)[sequence, place].T


def _rows(cu_seqlens: Tensor, longest: int, total: int) -> tuple[Tensor, Tensor]:
    """Which token stands at each place of the padded sequences, [B, longest], and whether one does."""
    place = torch.arange(longest, device=cu_seqlens.device)
    inside = place < cu_seqlens.diff()[:, None]
    return (cu_seqlens[:-1, None] + place).clamp(max=max(total - 1, 0)), inside


def position_mask(
    q: Tensor,
    in_q: Tensor,  # [B or 1, Sq], which places hold a query
    in_k: Tensor,  # [B, Sk], and which a key
    offset: Tensor | int,  # [B, 1, 1], position of query 0 among the keys
    is_causal: bool,
    window: int | tuple[int | None, int | None] | None,
    slopes: Tensor | None,  # [B, Hq]
) -> Tensor:
    """Causality, window and ALiBi of sequences of different lengths as attn_mask, [B, 1 or Hq, Sq, Sk]."""
    left, right = window_sides(window)
    right = 0 if is_causal else right
    i = torch.arange(in_q.shape[1], device=q.device)[:, None]
    distance = i + offset - torch.arange(in_k.shape[1], device=q.device)
    distance = distance if distance.dim() == 3 else distance[None]
    mask = in_q[:, :, None] & in_k[:, None, :]
    if left >= 0:
        mask = mask & (distance <= left)
    if right >= 0:
        mask = mask & (distance >= -right)
    mask = mask[:, None]
    if slopes is None:
        return mask
    bias = -slopes.to(lse_dtype(q))[:, :, None, None] * distance.abs()[:, None]
    return bias.masked_fill(~mask, -math.inf)
