"""Decoding composed from bmk.attention: pages gathered, 8-bit caches multiplied out, what is past the lengths masked."""

from __future__ import annotations

import torch
from torch import Tensor

from bigmodel_kernels import _registry
from bigmodel_kernels.ops.attention.op import attention, lse_dtype
from bigmodel_kernels.ops.attention.reference import mask_of_lengths


def supports(*args) -> str | None:
    return None


def fwd(*args):
    return call(*args, backend="torch")


def call(
    q,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    cache_seqlens,
    block_table,
    alibi_slopes,
    scale,
    softcap,
    window_left,
    window_right,
    return_lse,
    *,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(out, lse), differentiable in q and caches of its dtype; `backend` is that of the attention."""
    batch = q.shape[0]
    window = tuple(None if side < 0 else side for side in (window_left, window_right))
    if block_table is not None:
        if not torch.compiler.is_compiling():
            _check_blocks(block_table, cache_seqlens, k_cache.shape[0], k_cache.shape[2])
        used = block_table.clamp(0, max(k_cache.shape[0] - 1, 0))
        k_cache, v_cache, k_scale, v_scale = (
            t if t is None else t[used].transpose(1, 2).flatten(2, 3) for t in (k_cache, v_cache, k_scale, v_scale)
        )
    if k_scale is not None and v_scale is not None:
        k_cache, v_cache = (_multiplied(*pair, q.dtype) for pair in ((k_cache, k_scale), (v_cache, v_scale)))
    length = k_cache.shape[2]
    slopes = None if alibi_slopes is None else alibi_slopes.expand(batch, -1)
    options = {"scale": scale, "softcap": softcap, "enable_gqa": True, "return_lse": True, "backend": backend}
    if not torch.compiler.is_compiling():
        lengths = _check_lengths(cache_seqlens, length)
        length = max(lengths, default=0)
        k_cache, v_cache = k_cache[:, :, :length], v_cache[:, :, :length]
        if all(n == length for n in lengths):  # nothing to mask out
            return attention(
                q, k_cache, v_cache, alignment="lower_right", window=window, alibi_slopes=slopes, **options
            )
    in_k = torch.arange(length, device=q.device) < cache_seqlens[:, None]
    asked = backend if torch.compiler.is_compiling() else _registry.wanted(backend)
    if asked == "torch" or (asked == "auto" and q.device.type != "cpu"):
        # PyTorch multiplies what a mask leaves out by zero, and lets NaNs through; "auto" gives masks to "cpu" where that is.
        k_cache, v_cache = (t.masked_fill(~in_k[:, None, :, None], 0) for t in (k_cache, v_cache))
    in_q = torch.ones(1, q.shape[2], dtype=torch.bool, device=q.device)
    offset = (cache_seqlens - q.shape[2])[:, None, None]
    slopes = None if slopes is None else slopes.to(lse_dtype(q))
    mask = mask_of_lengths(in_q, in_k, offset, window_left, window_right, slopes)
    return attention(q, k_cache, v_cache, attn_mask=mask, **options)


def _multiplied(cache: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    exact = torch.promote_types(dtype, torch.float32)
    return (cache.to(exact) * scale.to(exact)[..., None]).to(dtype)


def check_contents(k_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None) -> None:
    """Raises RuntimeError for lengths that the caches do not hold and for blocks that they do not have; waits for a GPU."""
    page_size, width = k_cache.shape[2], 1
    if block_table is not None:
        width = block_table.shape[1]
        _check_blocks(block_table, cache_seqlens, k_cache.shape[0], page_size)
    _check_lengths(cache_seqlens, width * page_size)


def _check_lengths(cache_seqlens: Tensor, capacity: int) -> list[int]:
    lengths = cache_seqlens.tolist()
    for b, n in enumerate(lengths):
        if not 0 <= n <= capacity:
            raise RuntimeError(f"cache_seqlens must be within the {capacity} positions of k_cache, got {n} at [{b}]")
    return lengths


def _check_blocks(block_table: Tensor, cache_seqlens: Tensor, blocks: int, block_size: int) -> None:
    """That each block with keys of a sequence is one of the cache's; entries past the sequence may be anything."""
    first = torch.arange(block_table.shape[1], device=block_table.device) * block_size
    wrong = (first < cache_seqlens[:, None]) & ((block_table < 0) | (block_table >= blocks))
    if bool(wrong.any()):
        b, i = wrong.nonzero()[0].tolist()
        raise RuntimeError(
            f"block_table must name blocks from 0 to {blocks - 1} of k_cache, got {int(block_table[b, i])} at [{b}, {i}]"
        )
