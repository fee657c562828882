"""Attention forward in Triton: out = softmax(softcap(scale q k^T) + bias) v, lse = log sum exp of the scores.

Program: BLOCK_M queries of one head, over all their keys, BLOCK_N at a time; the running maximum m, sum l and output stay in
registers (Milakov & Gimelshein 2018; Dao et al. 2022). Tiles that causality or window exclude are not visited; pairs are
tested only in the tiles on the edge, which have loops of their own. For causal attention the longest rows start first.
Saved for backward: lse [B, Hq, Sq], float32.
Infinities and NaNs: a weight of 0 would spread those of a masked value, since 0 * NaN is NaN. Only if a result holds any is
it computed again with them counted as 0, for the rows that attend to none: the usual case pays one reduction per program.
Sequences laid end to end (attention_varlen): q_len and k_len are their sums, the strides of the batch 0, `offset` is 1 for a
causality that ends in the lower right corner. A program finds its sequence and its tile on the device, and goes on as if
there were no other sequence: rows past its end count as 0 and are not stored.
Floor: 4 B Hq Sq Sk D operations (half of it causal) over the peak of the matrix units; q, k, v read and out written once.
"""

import triton
import triton.language as tl

from bigmodel_kernels.ops.attention.triton_tile import (
    LENGTHS,
    LN2,
    NO_MASK,
    all_finite,
    finish_scores,
    finite_part,
    from_token,
    head_of,
    head_pointer,
    keep_tile,
    load_rows,
    part_of_span,
    product,
    span,
    store_again,
    store_tile,
    tile_of_program,
    tile_of_sequence,
)


@triton.jit
def attend(
    q_pointer, k_pointer, v_pointer, mask_pointer, slopes_pointer, seed_pointer,
    q_strides, k_strides, v_strides, mask_strides, slopes_stride,
    start_m, batch_head, heads, group, q_len, k_len, offset, window_left, window_right,
    scale, softcap, threshold, kept,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASK: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, CAREFUL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out and lse of BLOCK_M queries; CAREFUL: values that are not finite count as 0, and the rows attending to any are told."""
    batch, head = batch_head // heads, batch_head % heads
    q_head = head_of(q_pointer, q_strides, batch, head, DESCRIPTORS)
    kv_head = head // group
    k_head = head_of(k_pointer, k_strides, batch, kv_head, DESCRIPTORS)
    v_head = head_of(v_pointer, v_strides, batch, kv_head, DESCRIPTORS)
    mask_head, slope, seed = mask_pointer, 0.0, 0
    if MASK != NO_MASK:
        mask_head = head_pointer(mask_pointer, mask_strides, batch, head)
    if ALIBI:
        slope = tl.load(slopes_pointer + batch * slopes_stride + head)
    if DROPOUT:
        seed = tl.load(seed_pointer)
    q = load_rows(q_head, batch, head, start_m, q_strides, q_len, D, BLOCK_M, BLOCK_D, True, DESCRIPTORS)
    i = (start_m + tl.arange(0, BLOCK_M))[:, None]

    first = start_m + offset
    last = tl.minimum(start_m + BLOCK_M, q_len) - 1 + offset
    lo, a, b, hi = span(first, last, window_left, window_right, k_len, LEFT, RIGHT, BLOCK_N)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    poisoned = tl.zeros([BLOCK_M], tl.int32)
    for part in tl.static_range(3):
        if part == 2 or (not CAREFUL and (part == 1 or LEFT)):
            begin, end = part_of_span(part, lo, a, b, hi, CAREFUL)
            for start_n in range(begin, end, BLOCK_N):
                j = (start_n + tl.arange(0, BLOCK_N))[None, :]
                k = load_rows(
                    k_head, batch, kv_head, start_n, k_strides, k_len, D, BLOCK_N, BLOCK_D, part != 1, DESCRIPTORS
                )
                s = product(q, k, PRECISION)
                s, unit, _capped = finish_scores(
                    s, i, j, mask_head, mask_strides, slope, scale, softcap, window_left, window_right, offset, q_len, k_len,
                    part != 1, MASK, ALIBI, SOFTCAP, LEFT, RIGHT,
                )  # fmt: skip
                new_m = tl.maximum(m, tl.max(s, 1) * unit)
                shift = new_m
                if part != 1 or MASK != NO_MASK:
                    shift = tl.where(new_m == float("-inf"), 0.0, new_m)
                p = tl.exp2(s * unit - shift[:, None])
                shrink = tl.exp2(m - shift)
                total = total * shrink + tl.sum(p, 1)
                if DROPOUT:
                    keep = keep_tile(seed, start_m, start_n, batch_head, threshold, BLOCK_M, BLOCK_N, False)
                    p = tl.where(keep, p, 0.0)
                v = load_rows(
                    v_head, batch, kv_head, start_n, v_strides, k_len, DV, BLOCK_N, BLOCK_DV, part != 1, DESCRIPTORS
                )
                if CAREFUL:
                    v, bad = finite_part(v)
                    poisoned = tl.maximum(poisoned, tl.max((bad[None, :] & (p != 0.0)).to(tl.int32), 1))
                out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
                m = new_m
    empty = total == 0.0
    out = out * (kept / tl.where(empty, 1.0, total))[:, None]
    lse = tl.where(empty, float("-inf"), (m + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    return out, lse, poisoned


@triton.jit(do_not_specialize=LENGTHS)
def forward_kernel(
    q_pointer,  # [B, Hq, Sq, D]
    k_pointer,  # [B, Hkv, Sk, D]
    v_pointer,  # [B, Hkv, Sk, Dv]
    mask_pointer,  # [B, Hq, Sq, Sk], strides 0 where it is broadcast
    slopes_pointer,  # [B, Hq]
    seed_pointer,  # [1]
    out_pointer,  # [B, Hq, Sq, Dv]
    lse_pointer,  # [B, Hq, Sq], contiguous
    cu_q_pointer,  # [B + 1], where sequences lie end to end, else None: see "Sequences" above
    cu_k_pointer,
    q_strides, k_strides, v_strides, mask_strides, slopes_stride, out_strides,
    heads, group, batch_heads, together, q_len, k_len, offset, window_left, window_right,
    scale, softcap, threshold, kept,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASK: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr = 0,
):  # fmt: skip
    lse_stride = q_len  # from one head to the next
    if cu_q_pointer is None:
        tile, batch_head = tile_of_program(tl.cdiv(q_len, BLOCK_M), batch_heads, together)
        lse_head = batch_head
    else:
        batch, lse_head, tile, q_start, q_len, k_start, k_len = tile_of_sequence(
            cu_q_pointer, cu_k_pointer, q_len, k_len, heads, batch_heads // heads, together, STEPS, BLOCK_M
        )
        if tile < 0:
            return
        batch_head = batch * heads + lse_head
        offset *= k_len - q_len
        q_pointer, out_pointer = (
            from_token(q_pointer, q_start, q_strides),
            from_token(out_pointer, q_start, out_strides),
        )
        k_pointer, v_pointer = from_token(k_pointer, k_start, k_strides), from_token(v_pointer, k_start, v_strides)
        lse_pointer += q_start
    start_m = (tl.cdiv(q_len, BLOCK_M) - 1 - tile) * BLOCK_M
    out, lse, _none_told = attend(
        q_pointer, k_pointer, v_pointer, mask_pointer, slopes_pointer, seed_pointer,
        q_strides, k_strides, v_strides, mask_strides, slopes_stride,
        start_m, batch_head, heads, group, q_len, k_len, offset, window_left, window_right, scale, softcap, threshold, kept,
        D, DV, BLOCK_D, BLOCK_DV, MASK, ALIBI, SOFTCAP, DROPOUT, LEFT, RIGHT, PRECISION, DESCRIPTORS, False,
        BLOCK_M, BLOCK_N,
    )  # fmt: skip
    i = start_m + tl.arange(0, BLOCK_M)
    out_head = head_pointer(out_pointer, out_strides, batch_head // heads, batch_head % heads)
    store_tile(out_head, out, start_m, out_strides, q_len, DV, BLOCK_M, BLOCK_DV)
    tl.store(lse_pointer + tl.cast(lse_head, tl.int64) * lse_stride + i, lse, mask=i < q_len)

    if LEFT or RIGHT or MASK != NO_MASK:  # noqa: SIM102 (decided by the compiler)
        if all_finite(out) == 0:
            careful, _same_lse, poisoned = attend(
                q_pointer, k_pointer, v_pointer, mask_pointer, slopes_pointer, seed_pointer,
                q_strides, k_strides, v_strides, mask_strides, slopes_stride,
                start_m, batch_head, heads, group, q_len, k_len, offset, window_left, window_right,
                scale, softcap, threshold, kept,
                D, DV, BLOCK_D, BLOCK_DV, MASK, ALIBI, SOFTCAP, DROPOUT, LEFT, RIGHT, PRECISION, DESCRIPTORS, True,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip
            rows = poisoned == 0
            store_again(out_head, careful, rows, start_m, out_strides, q_len, DV, BLOCK_M, BLOCK_DV)
