"""The C++ kernel of csrc/cpu/attention_few_kernel.h for bmk.attention_decode: it reads each key and value once, where it
lies, in its page and as many as the sequence has, 8-bit caches too."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bigmodel_kernels import _cpu, _extension
from bigmodel_kernels._library import in_forward_mode, is_plain_eager, needs_grad
from bigmodel_kernels.ops.attention.cuda_decode import QUANTISED
from bigmodel_kernels.ops.attention.op import number, slopes_2d, window_sides

ROWS = 16  # query heads of a key head times queries, at most: kFewRows of the kernel
native = torch.ops.bigmodel_native


def takes(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
) -> bool:
    """Whether the kernel can run this call. What goes together wrongly is left to bmk.attention, which says so."""
    tensors = (q, k_cache, v_cache, k_scale, v_scale, cache_seqlens, block_table, alibi_slopes)
    if not is_plain_eager(range(len(tensors)), tensors) or any(t is not None and not t.is_cpu for t in tensors):
        return False
    heads, kv_heads = q.shape[1], k_cache.shape[1]
    if kv_heads == 0 or heads % kv_heads or heads // kv_heads * q.shape[2] > ROWS or k_cache.shape[3] != q.shape[3]:
        return False
    if q.dtype not in _cpu.DTYPES or not _extension.has_kernel("attention_decode_cpu", "CPU"):
        return False
    if k_cache.dtype != q.dtype and (k_cache.dtype not in QUANTISED or q.dtype == torch.float64):
        return False
    watched = needs_grad(q, k_cache, v_cache, alibi_slopes) or in_forward_mode() or torch.is_autocast_enabled("cpu")
    return k_cache.dtype == v_cache.dtype and not watched


def run(
    q: Tensor,  # [B, Hq, Sq, D]
    k_cache: Tensor,  # [B, Hkv, S, D]; [pages, Hkv, page_size, D] with block_table
    v_cache: Tensor,
    k_scale: Tensor | None,  # float32, the first three dimensions of k_cache
    v_scale: Tensor | None,
    cache_seqlens: Tensor,  # [B]
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    is_causal: bool,
    scale: float | None,
    window: int | tuple[int | None, int | None] | None,
    softcap: float,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    left, right = window_sides(window)
    if not 0 <= number("softcap", softcap) < math.inf:
        raise ValueError(f"softcap must be 0 (none) or positive, got {softcap}")
    if scale is None:
        scale = 1 / math.sqrt(q.shape[3]) if q.shape[3] else 1.0
    out, lse = native.attention_decode_cpu(
        q, k_cache, v_cache, k_scale, v_scale, cache_seqlens.long().contiguous(),
        None if block_table is None else block_table.long().contiguous(),
        None if alibi_slopes is None else slopes_2d(alibi_slopes, q.shape[0], q.shape[1], q.device),
        float(number("scale", scale)), float(softcap), left, 0 if is_causal else right,
    )  # fmt: skip
    return (out, lse) if return_lse else out
