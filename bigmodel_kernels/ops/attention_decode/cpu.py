"""The C++ kernel of csrc/cpu/attention_few_kernel.h: it reads each key and value once, where it lies, in its page and as many as
the sequence has, 8-bit caches too."""

from __future__ import annotations

import torch

from bigmodel_kernels import _cpu, _extension

ROWS = 16  # query heads of a key head times queries, at most: kFewRows of the kernel
AVAILABLE = _extension.has_kernel("attention_decode_fwd", "CPU")


def supports(q, k_cache, v_cache, k_scale, v_scale, cache_seqlens, block_table, *rest) -> str | None:
    if (why := _cpu.reason(q, "q")) is not None:
        return why
    rows = q.shape[1] // max(k_cache.shape[1], 1) * q.shape[2]
    if rows > ROWS:
        return f"q has {rows} rows for each head of k_cache; the kernel takes up to {ROWS}"
    if k_cache.dtype != v_cache.dtype or (k_cache.dtype != q.dtype and k_scale is None):
        return f"k_cache and v_cache are {k_cache.dtype} and {v_cache.dtype}, q is {q.dtype}"
    if k_scale is not None and q.dtype == torch.float64:
        return "q is float64; the kernel takes 8-bit caches for float32 and bfloat16"
    return None


def fwd(
    q, k_cache, v_cache, k_scale, v_scale, cache_seqlens, block_table, alibi_slopes, scale, softcap, window_left,
    window_right, return_lse,
):  # fmt: skip
    return torch.ops.bigmodel_native.attention_decode_fwd(
        q, k_cache, v_cache, k_scale, v_scale, cache_seqlens.long().contiguous(),
        None if block_table is None else block_table.long().contiguous(), alibi_slopes, scale, softcap, window_left,
        window_right,
    )  # fmt: skip
