"""The launcher of the Triton kernel of triton_split.py: one launch, without waiting for the lengths. An interpreted kernel need
not wait for them, and those that do not fit are refused, as on the CPU.

"auto" does not choose it: it has not been measured on a GPU.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from bigmodel_kernels import _gpu, _triton, _tuned
from bigmodel_kernels.ops.attention.op import heads_inside
from bigmodel_kernels.ops.attention.triton_kernels import LARGEST_HEAD_DIM, block_of
from bigmodel_kernels.ops.attention_decode.cuda import splits_for
from bigmodel_kernels.ops.attention_decode.torch_op import check_contents
from bigmodel_kernels.ops.attention_decode.triton_configs import config
from bigmodel_kernels.ops.attention_decode.triton_split import AS_QUERIES, E4M3, E4M3_BITS, INT8, decode_kernel

FURTHEST = 2**30  # that a window reaches: further than any cache


def supports(
    q, k_cache, v_cache, k_scale, v_scale, cache_seqlens, block_table, alibi_slopes, scale, softcap, window_left,
    window_right, return_lse,
) -> str | None:  # fmt: skip
    if (why := _triton.reason(q)) is not None:
        return why
    if k_scale is None and (k_cache.dtype != q.dtype or v_cache.dtype != q.dtype):
        return f"k_cache and v_cache are {k_cache.dtype} and {v_cache.dtype}, q is {q.dtype}"
    if not scale > 0:
        return f"the kernel takes a positive scale, got {scale}"
    return _reason_of_sizes(q.shape, k_cache.shape, v_cache.shape[3])


@functools.lru_cache(maxsize=4096)
def _reason_of_sizes(q: tuple, k: tuple, value_dim: int) -> str | None:
    if 0 in q[1:] or 0 in k or value_dim == 0:
        return f"q has shape {list(q)} and k_cache {list(k)}: there is nothing to sum over"
    if max(q[3], value_dim) > LARGEST_HEAD_DIM:
        return f"the kernel takes head dimensions up to {LARGEST_HEAD_DIM}, got {q[3]} and {value_dim}"
    return None


def _kind(gpu: str, dtype: torch.dtype) -> int:
    """How the kernel reads caches of 8 bits; "sm_86" may have no instruction for e4m3."""
    if dtype == torch.int8:
        return INT8.value
    return E4M3.value if gpu == "sm_90" else E4M3_BITS.value


class _Plan(NamedTuple):
    """All of a launch that does not depend on the tensors' addresses."""

    programs: int
    tasks: int  # programs of a split
    partial: int  # numbers
    of_sizes: tuple
    of_pages: tuple
    constants: dict[str, Any]


@_tuned.cached
def _plan(
    gpu: str, device: int | None, element_size: int, precision: str, cache: torch.dtype | None, q: tuple, k: tuple,
    value_dim: int, table_width: int | None, softcap: bool, left: bool, right: bool,
) -> _Plan:  # fmt: skip
    batch, heads, q_len, head_dim = q
    pages, kv_heads, page_size, _ = k
    group = heads // kv_heads
    sizes = config(gpu, device, element_size, cache is not None, max(head_dim, value_dim), group * q_len)
    rows, padded = sizes["BLOCK_M"], block_of(value_dim)
    tiles = -(-group * q_len // rows)
    tasks = batch * kv_heads * tiles
    capacity = page_size * (1 if table_width is None else table_width)
    splits = splits_for(tasks, capacity, _triton.PROGRAMS[gpu] // 2)
    constants = {
        "CACHE": AS_QUERIES.value if cache is None else _kind(gpu, cache), "D": head_dim,
        "DV": value_dim, "BLOCK_D": block_of(head_dim), "BLOCK_DV": padded, "SOFTCAP": softcap,
        "LEFT": left, "RIGHT": right, "SEVERAL": q_len > 1, "PRECISION": precision, **sizes,
    }  # fmt: skip
    partial = tasks * splits * rows * (padded + 2) if splits > 1 else 0
    return _Plan(
        tasks * splits, tasks, partial, (heads, group, q_len, tiles, splits, capacity), (page_size, table_width or 0, pages),
        constants,
    )  # fmt: skip


def fwd(
    q, k_cache, v_cache, k_scale, v_scale, cache_seqlens, block_table, alibi_slopes, scale, softcap, window_left,
    window_right, return_lse,
):  # fmt: skip
    if _triton.INTERPRETED:
        check_contents(k_cache, cache_seqlens, block_table)
    device = q.device
    plan = _plan(
        _triton.gpu(device.index), device.index, q.element_size(), _triton.precision(q.dtype),
        None if k_scale is None else k_cache.dtype, q.shape, k_cache.shape, v_cache.shape[3],
        None if block_table is None else block_table.shape[1], softcap > 0, window_left >= 0, window_right >= 0,
    )  # fmt: skip
    batch, heads, q_len, _ = q.shape
    out = heads_inside(q, batch, heads, q_len, v_cache.shape[3])
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=device)
    partial = tickets = None
    if plan.partial:
        partial = torch.empty(plan.partial, dtype=torch.float32, device=device)
        tickets = _gpu.tickets(q, plan.tasks)
    k_scale_strides = v_scale_strides = (0, 0, 0)
    if k_scale is not None:
        k_scale_strides, v_scale_strides = k_scale.stride(), v_scale.stride()
        if plan.constants["CACHE"] == E4M3_BITS.value:
            k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    _triton.launch(
        decode_kernel, plan.programs, q, k_cache, v_cache, k_scale, v_scale, cache_seqlens.contiguous(),
        None if block_table is None else block_table.contiguous(), alibi_slopes, out, lse, partial, tickets,
        q.stride(), k_cache.stride(), v_cache.stride(), k_scale_strides, v_scale_strides, out.stride(),
        0 if alibi_slopes is None or alibi_slopes.shape[0] == 1 else heads,
        *plan.of_sizes, *plan.of_pages, min(window_left, FURTHEST), min(window_right, FURTHEST), scale, softcap,
        **plan.constants,
    )  # fmt: skip
    return out, lse
