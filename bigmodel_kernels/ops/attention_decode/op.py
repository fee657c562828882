"""bmk.attention_decode: a few new queries against caches of keys and values, paged or not. What no kernel of its own takes, and
what wants a gradient, is composed from bmk.attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bigmodel_kernels import _registry
from bigmodel_kernels._arguments import flag, number
from bigmodel_kernels._library import ForwardOp, in_forward_mode, needs_grad
from bigmodel_kernels.ops.attention.op import checked_softcap, heads_inside, lse_dtype, slopes_2d, window_sides
from bigmodel_kernels.ops.attention_decode import cpu, torch_op

QUANTISED = (torch.int8, torch.float8_e4m3fn)  # dtypes of caches that have scales


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
            Lengths and blocks that the caches do not have raise, except by "cuda" and "triton" on a GPU, which would have to
            wait for it to look: there the nearest that is possible stands in their place, and no other memory is read.
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
    args = prepare(
        q, k_cache, v_cache, cache_seqlens, block_table=block_table, k_scale=k_scale, v_scale=v_scale,
        is_causal=is_causal, scale=scale, window=window, softcap=softcap, alibi_slopes=alibi_slopes,
        return_lse=return_lse,
    )  # fmt: skip
    if _has_kernel(backend, args):
        out, lse = OP(*args, backend=backend)
    else:
        out, lse = torch_op.call(*args, backend=backend)
    return (out, lse) if return_lse else out


def _has_kernel(backend: str, args: tuple) -> bool:
    """Whether a kernel of its own runs this call; without one "cuda" raises."""
    compiling = torch.compiler.is_compiling()
    asked = backend if compiling else _registry.wanted(backend)  # a compiled graph follows the argument alone
    if asked == "cuda" and needs_grad(*args[:3]):
        raise RuntimeError("attention_decode: backend 'cuda' cannot run this call: it has no backward")
    if asked in ("cuda", "torch"):
        return asked == "cuda"
    q = args[0]
    if needs_grad(*args[:3]) or in_forward_mode() or torch.is_autocast_enabled(q.device.type):
        return False
    if compiling and asked == "triton":
        return True  # whether it runs here is asked when the graph does
    if compiling:
        return asked in ("auto", "cpu") and q.is_cpu and cpu.AVAILABLE and cpu.supports(*args) is None
    if torch._C._are_functorch_transforms_active():
        return False
    names = prefer(*args) if asked == "auto" else (asked,)
    return any(name != "torch" and _registry.reason("attention_decode", name, args) is None for name in names)


def prepare(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    block_table: Tensor | None = None,
    k_scale: Tensor | float | None = None,
    v_scale: Tensor | float | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
) -> tuple:
    """Validates a call of `attention_decode`; returns the arguments of the op."""
    for name, t in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if t.dim() != 4:
            raise RuntimeError(f"{name} must have 4 dimensions, got shape {list(t.shape)}")
    is_causal, return_lse = flag("is_causal", is_causal), flag("return_lse", return_lse)
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
    heads, kv_heads = q.shape[1], k_cache.shape[1]
    if heads % kv_heads if kv_heads else heads:
        raise RuntimeError(f"q must have a multiple of the {kv_heads} heads of k_cache, got {heads} heads")
    if k_cache.shape[3] != q.shape[3]:
        raise RuntimeError(f"k_cache must have the head dimension of q, {q.shape[3]}, got {k_cache.shape[3]}")
    left, right = window_sides(window)
    softcap = checked_softcap(softcap)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[3]) if q.shape[3] else 1.0
    slopes = None if alibi_slopes is None else slopes_2d(alibi_slopes, batch, heads, q.device)
    return (
        q, k_cache, v_cache, k_scale, v_scale, cache_seqlens, block_table, slopes, number("scale", scale),
        softcap, left, 0 if is_causal else right, return_lse,
    )  # fmt: skip


def _scale_of(name: str, scale: Tensor | float | None, of: str, cache: Tensor) -> Tensor | None:
    """The scales of a cache as float32, with the cache's first three dimensions; None where it has none."""
    if cache.dtype not in QUANTISED:
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


def _check_indices(name: str, t: Tensor, dims: int, batch: int) -> None:
    if not isinstance(t, Tensor) or t.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {getattr(t, 'dtype', type(t).__name__)}")
    if t.dim() != dims or t.shape[0] != batch:
        raise RuntimeError(f"{name} must have {dims} dimensions and {batch} rows, got shape {list(t.shape)}")


def _fake(q, k_cache, v_cache, k_scale, v_scale, cache_seqlens, block_table, alibi_slopes, *rest):
    batch, heads, length, _ = q.shape
    return (
        heads_inside(q, batch, heads, length, v_cache.shape[3]),
        q.new_empty(batch, heads, length, dtype=lse_dtype(q)),
    )


def prefer(q, *rest) -> tuple[str, ...]:
    """By the table of docs/decisions.md: the C++ kernel is ahead of PyTorch for all it takes; those of GPUs are not measured."""
    return ("cpu", "torch")


OP = ForwardOp(
    "attention_decode",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? k_scale, Tensor? v_scale, Tensor cache_seqlens, Tensor? block_table, "
    "Tensor? alibi_slopes, float scale, float softcap, int window_left, int window_right, bool return_lse) -> "
    "(Tensor out, Tensor lse)",
    fake=_fake,
    prefer=prefer,
)
