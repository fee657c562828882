"""bmk.attention_decode: a few new queries against caches of keys and values, paged or not. Backend "cuda" is a kernel of its
own; all others are composed from bmk.attention, whose kernels split the keys among the threads where there are few queries."""

from __future__ import annotations

import torch
from torch import Tensor

from bigmodel_kernels import _registry
from bigmodel_kernels.ops.attention import cuda_decode
from bigmodel_kernels.ops.attention.op import attention, slopes_2d
from bigmodel_kernels.ops.attention.varlen import position_mask


def attention_decode(
    q: Tensor,  # [B, Hq, Sq, D]
    k_cache: Tensor,  # [B, Hkv, S, D]; [blocks, Hkv, block_size, D] with block_table
    v_cache: Tensor,  # [B, Hkv, S, Dv]; [blocks, Hkv, block_size, Dv] with block_table
    cache_seqlens: Tensor,  # [B]
    *,
    block_table: Tensor | None = None,  # [B, most blocks]
    is_causal: bool = False,
    scale: float | None = None,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,  # [Hq] or [B, Hq]
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the last Sq positions of each sequence to the first cache_seqlens[b] keys of its cache.

    Query i of sequence b stands at position cache_seqlens[b] - Sq + i. What the caches hold past cache_seqlens, and pages
    that no sequence uses, never reach a result. Query heads share key/value heads where there are fewer of those.

    Args:
        cache_seqlens: int32 or int64; how many keys of each cache are valid, those of the new queries included.
        block_table: int32 or int64; key j of sequence b is in block block_table[b, j // block_size]. Entries past the
            sequence may be anything.
        The others: as bmk.attention.

    Returns:
        [B, Hq, Sq, Dv]; with return_lse also the log-sum-exp [B, Hq, Sq].

    Raises:
        RuntimeError, ValueError, TypeError: as bmk.attention, and for lengths or tables that do not fit.
    """
    for name, t in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if t.dim() != 4:
            raise RuntimeError(f"{name} must have 4 dimensions, got shape {list(t.shape)}")
    batch = q.shape[0]
    _check_indices("cache_seqlens", cache_seqlens, 1, batch)
    if block_table is not None:
        _check_indices("block_table", block_table, 2, batch)
    # A compiled graph follows the argument alone: use_backend is no part of it.
    if (backend if torch.compiler.is_compiling() else _registry.wanted(backend)) == "cuda":
        why = cuda_decode.unavailable()
        if why is not None:
            raise NotImplementedError(f"attention_decode: backend 'cuda' has no kernel here: {why}")
        why = cuda_decode.supports(q, k_cache, v_cache, is_causal, window, alibi_slopes)
        if why is not None:
            raise RuntimeError(f"attention_decode: backend 'cuda' cannot run this call: {why}")
        return cuda_decode.run(q, k_cache, v_cache, cache_seqlens, block_table, scale, softcap, return_lse)
    if block_table is not None:
        used = block_table.clamp(0, max(k_cache.shape[0] - 1, 0))
        k_cache, v_cache = (t[used].transpose(1, 2).flatten(2, 3) for t in (k_cache, v_cache))
    length = k_cache.shape[2]
    slopes = None if alibi_slopes is None else slopes_2d(alibi_slopes, batch, q.shape[1], q.device).expand(batch, -1)
    options = {"scale": scale, "softcap": softcap, "enable_gqa": True, "return_lse": return_lse, "backend": backend}
    if not torch.compiler.is_compiling():
        lengths = cache_seqlens.tolist()
        if any(not 0 <= n <= length for n in lengths):
            raise RuntimeError(f"cache_seqlens must be within the {length} positions of k_cache, got {lengths}")
        length = max(lengths, default=0)
        k_cache, v_cache = k_cache[:, :, :length], v_cache[:, :, :length]
        if all(n == length for n in lengths):  # nothing to mask out
            return attention(
                q, k_cache, v_cache, is_causal=is_causal, alignment="lower_right", window=window,
                alibi_slopes=slopes, **options,
            )  # fmt: skip
    in_k = torch.arange(length, device=q.device) < cache_seqlens[:, None]
    in_q = torch.ones(1, q.shape[2], dtype=torch.bool, device=q.device)
    offset = (cache_seqlens - q.shape[2])[:, None, None]
    mask = position_mask(q, in_q, in_k, offset, is_causal, window, slopes)
    return attention(q, k_cache, v_cache, attn_mask=mask, **options)


def _check_indices(name: str, t: Tensor, dims: int, batch: int) -> None:
    if not isinstance(t, Tensor) or t.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {getattr(t, 'dtype', type(t).__name__)}")
    if t.dim() != dims or t.shape[0] != batch:
        raise RuntimeError(f"{name} must have {dims} dimensions and {batch} rows, got shape {list(t.shape)}")
