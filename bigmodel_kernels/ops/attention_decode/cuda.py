"""The CUDA C++ kernel of csrc/cuda/attention_decode.cuh: bmk.attention_decode in one launch, without waiting for the lengths.

"auto" does not choose it: it has not been measured on a GPU.
"""

from __future__ import annotations

import torch

from bigmodel_kernels import _gpu

DTYPES = (torch.float16, torch.bfloat16)
NATIVE_OP = "attention_decode"
LARGEST_HEAD_DIM = 128
ROWS = 16  # of a tile
SHORTEST_SPLIT = 128  # keys: two runs of 16 for each of the 4 warps
BLOCKS_PER_MULTIPROCESSOR = 2
native = torch.ops.bigmodel_native


def supports(
    q, k_cache, v_cache, k_scale, v_scale, cache_seqlens, block_table, alibi_slopes, scale, softcap, window_left,
    window_right, return_lse,
) -> str | None:  # fmt: skip
    if (why := _gpu.reason(q, DTYPES)) is not None:
        return why
    if window_left >= 0 or window_right > 0 or (window_right == 0 and q.shape[2] > 1) or alibi_slopes is not None:
        return "it takes no mask between several queries, no window and no slopes"
    if q.shape[3] % 8 or not 0 < q.shape[3] <= LARGEST_HEAD_DIM or v_cache.shape[3] != q.shape[3]:
        return f"it takes multiples of 8 up to {LARGEST_HEAD_DIM} as head dimensions, got {q.shape[3]} and {v_cache.shape[3]}"
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache)):
        chunk = 16 // t.element_size()
        if t.dtype != q.dtype and k_scale is None:
            return f"{name} is {t.dtype}, q is {q.dtype}"
        steps = [t.shape[3], t.storage_offset(), *(s for s, n in zip(t.stride(), t.shape[:3]) if n != 1)]
        if t.stride(3) != 1 or any(step % chunk for step in steps):
            return f"{name} has rows that are not aligned to 16 bytes"
    return None


def splits_for(rows_of_blocks: int, capacity: int, multiprocessors: int) -> int:
    """How many blocks share the keys of a sequence: enough to fill the GPU, none with fewer keys than its warps need."""
    wanted = -(-BLOCKS_PER_MULTIPROCESSOR * multiprocessors // max(rows_of_blocks, 1))
    return max(1, min(wanted, -(-capacity // SHORTEST_SPLIT)))


def fwd(
    q, k_cache, v_cache, k_scale, v_scale, cache_seqlens, block_table, alibi_slopes, scale, softcap, window_left,
    window_right, return_lse,
):  # fmt: skip
    batch, heads, q_len, head_dim = q.shape
    kv_heads, page_size = k_cache.shape[1:3]
    tiles = kv_heads * -(-(heads // max(kv_heads, 1)) * q_len // ROWS)
    capacity = page_size * (1 if block_table is None else block_table.shape[1])
    splits = splits_for(batch * tiles, capacity, _gpu.properties(q.device.index).multiprocessors)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    padded = 64 if head_dim <= 64 else LARGEST_HEAD_DIM
    count = batch * tiles * splits * ROWS * (padded + 2) if splits > 1 else 0
    partial = torch.empty(count, dtype=torch.float32, device=q.device)
    native.attention_decode(
        q if q.stride(3) == 1 else q.contiguous(), k_cache, v_cache, k_scale, v_scale,
        cache_seqlens.to(torch.int32).contiguous(),
        None if block_table is None else block_table.to(torch.int32).contiguous(),
        scale, softcap, splits, out, lse if return_lse else None, partial,
        _gpu.tickets(q, batch * tiles),
    )  # fmt: skip
    return out, lse
