"""Attention as a formula, with its backward written out: the oracle of the tests, and what gradients of gradients go through.

It holds the Sq x Sk scores in memory. Every step is a differentiable torch op that is safe where a query attends to nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def positions(q: Tensor, k: Tensor, lower_right: bool) -> Tensor:
    """Position of each query less that of each key, [Sq, Sk]."""
    offset = k.shape[2] - q.shape[2] if lower_right else 0
    i = torch.arange(q.shape[2], device=q.device)[:, None] + offset
    return i - torch.arange(k.shape[2], device=q.device)


def allowed(q: Tensor, k: Tensor, window_left: int, window_right: int, lower_right: bool) -> Tensor | None:
    """Which keys causality and window let each query attend to, bool [Sq, Sk]; None for all."""
    if window_left < 0 and window_right < 0:
        return None
    distance = positions(q, k, lower_right)
    inside = torch.ones_like(distance, dtype=torch.bool)
    if window_left >= 0:
        inside = inside & (distance <= window_left)
    if window_right >= 0:
        inside = inside & (distance >= -window_right)
    return inside


def mask_of_lengths(
    in_q: Tensor,  # [B or 1, Sq], which places hold a query
    in_k: Tensor,  # [B, Sk], and which a key
    offset: Tensor | int,  # [B, 1, 1], position of query 0 among the keys
    window_left: int,
    window_right: int,
    slopes: Tensor | None,  # [B or 1, Hq], in the dtype of the result
) -> Tensor:
    """Causality, window and ALiBi of sequences of different lengths as attn_mask, [B, 1 or Hq, Sq, Sk]."""
    i = torch.arange(in_q.shape[1], device=in_q.device)[:, None]
    distance = i + offset - torch.arange(in_k.shape[1], device=in_q.device)
    distance = distance if distance.dim() == 3 else distance[None]
    mask = in_q[:, :, None] & in_k[:, None, :]
    if window_left >= 0:
        mask = mask & (distance <= window_left)
    if window_right >= 0:
        mask = mask & (distance >= -window_right)
    mask = mask[:, None]
    if slopes is None:
        return mask
    return (-slopes[:, :, None, None] * distance.abs()[:, None]).masked_fill(~mask, -math.inf)


def alibi(q: Tensor, k: Tensor, alibi_slopes: Tensor, lower_right: bool) -> Tensor:
    """What ALiBi adds to the scores, [B or 1, Hq, Sq, Sk], in the dtype of alibi_slopes."""
    return -alibi_slopes[:, :, None, None] * positions(q, k, lower_right).abs()


def dropout_keep(q: Tensor, k: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    """Which weights dropout keeps, bool [B, Hq, Sq, Sk]: Philox 4x32-10 (Salmon et al., SC 2011), counted by position.

    The counter of key j of query i in head h of batch entry b is (j // 64 * 16 + j % 16, i, b Hq + h, 0), the key is the seed,
    and word j % 64 // 16 of the result is compared with dropout_p * 2^32.
    """
    batch, heads, q_len, _ = q.shape
    j = torch.arange(k.shape[2], device=q.device)
    i = torch.arange(q_len, device=q.device)[:, None]
    head = torch.arange(batch * heads, device=q.device)[:, None, None]
    shape = (batch * heads, q_len, k.shape[2])
    c = [(j // 64 * 16 + j % 16).expand(shape), i.expand(shape), head.expand(shape), torch.zeros_like(j).expand(shape)]
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57  # 64 bits, wrapped: both halves are right
        c = [((p1 >> 32) & _WORD) ^ c[1] ^ key0, p1 & _WORD, ((p0 >> 32) & _WORD) ^ c[3] ^ key1, p0 & _WORD]
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    word = (j % 64 // 16).expand(shape)[None]
    drawn = torch.stack(c).gather(0, word)[0]
    return (drawn >= min(int(dropout_p * 2**32), _WORD)).view(batch, heads, q_len, k.shape[2])


def expand_heads(t: Tensor, heads: int) -> Tensor:
    """[B, Hkv, S, D] with each head repeated, [B, Hq, S, D]."""
    return t if t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], 1)


def _sum_heads(t: Tensor, kv_heads: int) -> Tensor:
    return t if t.shape[1] == kv_heads else t.unflatten(1, (kv_heads, -1)).sum(2)


def _scores(q, k, attn_mask, alibi_slopes, scale, softcap, window_left, window_right, lower_right):
    """Scores with -inf where a key is excluded, and the derivative of softcap (None without)."""
    s = scale * (q @ expand_heads(k, q.shape[1]).mT)
    slope = None
    if softcap > 0:
        t = torch.tanh(s / softcap)
        s, slope = softcap * t, 1 - t * t
    if alibi_slopes is not None:
        s = s + alibi(q, k, alibi_slopes.to(s.dtype), lower_right)
    excluded = allowed(q, k, window_left, window_right, lower_right)
    excluded = None if excluded is None else ~excluded
    if attn_mask is not None:
        out = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask == -math.inf
        excluded = out if excluded is None else excluded | out
        if attn_mask.dtype != torch.bool:
            s = s + attn_mask.to(s.dtype)
    return (s if excluded is None else s.masked_fill(excluded, -math.inf)), slope


def _softmax(s: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and log-sum-exp; 0 and -inf where all is excluded."""
    if s.shape[-1] == 0:
        return s, s.new_full(s.shape[:-1], -math.inf)
    largest = s.detach().amax(-1, keepdim=True)
    largest = largest.masked_fill(largest == -math.inf, 0.0)
    weights = torch.exp(s - largest)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    return weights / total, (torch.log(total) + largest).masked_fill(empty, -math.inf).squeeze(-1)


def probabilities(
    q: Tensor,  # [B, Hq, Sq, D]
    k: Tensor,  # [B, Hkv, Sk, D]
    attn_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    window_left: int = -1,
    window_right: int = -1,
    lower_right: bool = False,
) -> tuple[Tensor, Tensor]:
    """The attention weights [B, Hq, Sq, Sk] themselves and lse [B, Hq, Sq]; 0 and -inf where a query attends to nothing."""
    s, _ = _scores(q, k, attn_mask, alibi_slopes, scale, softcap, window_left, window_right, lower_right)
    return _softmax(s)


def arithmetic_dtype(q: Tensor) -> torch.dtype:
    """What attention on q is computed in."""
    return torch.float32 if q.dtype in (torch.float16, torch.bfloat16) else q.dtype


def fwd(
    q, k, v, attn_mask, alibi_slopes, seed, scale, dropout_p, softcap, window_left, window_right, lower_right,
    return_lse=True, deterministic=False, save=False,
):  # fmt: skip
    """out [B, Hq, Sq, Dv] and lse [B, Hq, Sq]."""
    dtype, q, k, v = q.dtype, *(t.to(arithmetic_dtype(t)) for t in (q, k, v))
    p, lse = probabilities(q, k, attn_mask, alibi_slopes, scale, softcap, window_left, window_right, lower_right)
    if dropout_p > 0:
        kept = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
        p = p * dropout_keep(q, k, seed, dropout_p) * kept
    return (p @ expand_heads(v, q.shape[1])).to(dtype), lse


def bwd(
    grad_out, grad_lse, out, lse, mask_grad,
    q, k, v, attn_mask, alibi_slopes, seed, scale, dropout_p, softcap, window_left, window_right, lower_right,
    return_lse=True, deterministic=False, save=False,
):  # fmt: skip
    """dq, dk, dv and dmask (empty unless mask_grad).

    p = exp(s - lse); dv = p^T do; dp = do v^T; ds = p (dp - sum_d do o + dlse); dq = scale ds k; dk = scale ds^T q
    """
    dtype, mask_dtype = q.dtype, attn_mask.dtype if attn_mask is not None else None
    q, k, v, grad_out, out = (t.to(arithmetic_dtype(t)) for t in (q, k, v, grad_out, out))
    s, slope = _scores(q, k, attn_mask, alibi_slopes, scale, softcap, window_left, window_right, lower_right)
    p = torch.exp(s - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    heads, kv_heads = q.shape[1], k.shape[1]
    dp = grad_out @ expand_heads(v, heads).mT
    weights = p
    if dropout_p > 0:
        keep = dropout_keep(q, k, seed, dropout_p)
        kept = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
        weights, dp = p * keep * kept, dp * keep * kept
    delta = (grad_out * out).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse[..., None]
    ds = p * (dp - delta)
    dmask = ds.sum_to_size(attn_mask.shape).to(mask_dtype) if mask_grad else q.new_empty(0, dtype=dtype)
    if slope is not None:
        ds = ds * slope
    dq = scale * (ds @ expand_heads(k, heads))
    dk = scale * _sum_heads(ds.mT @ q, kv_heads)
    dv = _sum_heads(weights.mT @ grad_out, kv_heads)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype), dmask
