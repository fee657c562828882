"""bmk.attention_decode: a few new queries against caches of keys and values, paged or not. Backends "cuda" and "cpu" have kernels
of their own; what those do not take, and all others, is composed from bmk.attention."""

from __future__ import annotations

import torch
from torch import Tensor

from bigmodel_kernels import _registry
from bigmodel_kernels.ops.attention import cpu_decode, cuda_decode
from bigmodel_kernels.ops.attention.op import attention, slopes_2d
from bigmodel_kernels.ops.attention.varlen import position_mask


def attention_decode(
    q: Tensor,  # [B, Hq, Sq, D]
    k_cache: Tensor,  # [B, Hkv, S, D]; [blocks, Hkv, block_size, D] with block_table
    v_cache: Tensor,  # [B, Hkv, S, Dv]; [blocks, Hkv, block_size, Dv] with block_table
    cache_seqlens: Tensor,  # [B]
    *,
    block_table: Tensor | None = None,  # [B, most blocks]
    k_scale: Tensor
    | float
    | None = None,  # of an 8-bit cache: one number, [Hkv], or as k_cache without its last dimension
    v_scale: Tensor | float | None = None,
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
        k_cache, v_cache: of q's dtype; or both int8 or both float8_e4m3fn, and then k_cache * k_scale and v_cache * v_scale
            are the keys and values.
        k_scale, v_scale: for the whole cache, for every key head, or for every key of every head. 1 by default for
            float8_e4m3fn; int8 needs them. They go with the pages where the cache has pages. No gradient reaches them.
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
    if v_cache.shape[:3] != k_cache.shape[:3]:
        raise RuntimeError(
            f"v_cache must have the first three sizes of k_cache, {list(k_cache.shape[:3])}, got {list(v_cache.shape[:3])}"
        )
    if block_table is None and k_cache.shape[0] != batch:
        raise RuntimeError(f"k_cache must hold {batch} sequences as q does, got {k_cache.shape[0]}")
    _check_indices("cache_seqlens", cache_seqlens, 1, batch)
    if block_table is not None:
        _check_indices("block_table", block_table, 2, batch)
    k_scale = _scale_of("k_scale", k_scale, "k_cache", k_cache)
    v_scale = _scale_of("v_scale", v_scale, "v_cache", v_cache)
    if k_cache.dtype != v_cache.dtype and (k_scale is not None or v_scale is not None):
        raise RuntimeError(f"v_cache must be {k_cache.dtype} as k_cache is, got {v_cache.dtype}")
    # A compiled graph follows the argument alone: use_backend is no part of it.
    if (backend if torch.compiler.is_compiling() else _registry.wanted(backend)) == "cuda":
        why = cuda_decode.unavailable()
        if why is not None:
            raise NotImplementedError(f"attention_decode: backend 'cuda' has no kernel here: {why}")
        why = cuda_decode.supports(q, k_cache, v_cache, is_causal, window, alibi_slopes)
        if why is not None:
            raise RuntimeError(f"attention_decode: backend 'cuda' cannot run this call: {why}")
        return cuda_decode.run(
            q, k_cache, v_cache, k_scale, v_scale, cache_seqlens, block_table, scale, softcap, return_lse
        )
    if not torch.compiler.is_compiling() and _registry.wanted(backend) in ("auto", "cpu"):
        call = (q, k_cache, v_cache, k_scale, v_scale, cache_seqlens, block_table, alibi_slopes)
        if cpu_decode.takes(*call):
            return cpu_decode.run(*call, is_causal, scale, window, softcap, return_lse)
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
    asked = backend if torch.compiler.is_compiling() else _registry.wanted(backend)
    if asked == "torch" or (asked == "auto" and q.device.type != "cpu"):
        # PyTorch multiplies what a mask leaves out by zero, and lets NaNs through; "auto" gives masks to "cpu" where that is.
        k_cache, v_cache = (t.masked_fill(~in_k[:, None, :, None], 0) for t in (k_cache, v_cache))
    in_q = torch.ones(1, q.shape[2], dtype=torch.bool, device=q.device)
    offset = (cache_seqlens - q.shape[2])[:, None, None]
    mask = position_mask(q, in_q, in_k, offset, is_causal, window, slopes)
    return attention(q, k_cache, v_cache, attn_mask=mask, **options)


def _scale_of(name: str, scale: Tensor | float | None, of: str, cache: Tensor) -> Tensor | None:
    """The scales of a cache as float32, with the cache's first three dimensions; None where it has none."""
    if cache.dtype not in cuda_decode.QUANTISED:
        if scale is not None:
            raise RuntimeError(f"{name} is for caches of int8 or float8_e4m3fn, {of} is {cache.dtype}")
        return None
    if scale is None:
        if cache.dtype == torch.int8:
            raise RuntimeError(f"{name} must be given for {of} of int8")
        scale = 1.0
    if not isinstance(scale, Tensor):
        if not isinstance(scale, (int, float)):
            raise TypeError(f"{name} must be a tensor or a number, got {type(scale).__name__}")
        scale = torch.full((), scale, dtype=torch.float32, device=cache.device)
    if not scale.dtype.is_floating_point or scale.device != cache.device:
        raise RuntimeError(f"{name} must hold real numbers on {cache.device}, got {scale.dtype} on {scale.device}")
    shape, heads = cache.shape[:3], cache.shape[1]
    if scale.dim() == 1 and scale.shape[0] == heads:
        scale = scale.view(1, -1, 1)
    elif scale.dim() != 0 and scale.shape != shape:
        raise RuntimeError(
            f"{name} must be one number or have shape {[heads]} or {list(shape)}, got {list(scale.shape)}"
        )
    return scale.detach().float().expand(shape)


def _multiplied(cache: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    exact = torch.promote_types(dtype, torch.float32)
    return (cache.to(exact) * scale.to(exact)[..., None]).to(dtype)


def _check_blocks(block_table: Tensor, cache_seqlens: Tensor, blocks: int, block_size: int) -> None:
    """That each block with keys of a sequence is one of the cache's; entries past the sequence may be anything."""
    first = torch.arange(block_table.shape[1], device=block_table.device) * block_size
    wrong = (first < cache_seqlens[:, None]) & ((block_table < 0) | (block_table >= blocks))
    if bool(wrong.any()):
        b, i = wrong.nonzero()[0].tolist()
        raise RuntimeError(
            f"block_table must name blocks from 0 to {blocks - 1} of k_cache, got {int(block_table[b, i])} at [{b}, {i}]"
        )


def _check_indices(name: str, t: Tensor, dims: int, batch: int) -> None:
    if not isinstance(t, Tensor) or t.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {getattr(t, 'dtype', type(t).__name__)}")
    if t.dim() != dims or t.shape[0] != batch:
        raise RuntimeError(f"{name} must have {dims} dimensions and {batch} rows, got shape {list(t.shape)}")
