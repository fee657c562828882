"""Attention backward in Triton: three kernels, each of which owns what it writes, so that every run gives the same bits.

p = exp(s - lse); dp = do v^T; delta = sum_d do out - dlse; ds = p (dp - delta) (softcap's slope)
dq = scale ds k; dk = scale ds^T q; dv = p^T do; dmask = p (dp - delta)

query_kernel: a program owns BLOCK_M rows of dq, goes over the keys, and leaves delta for the other two.
key_kernel: a program owns BLOCK_N rows of dk and dv, goes over the query heads of its key head and over their queries; its
tiles are transposed, so that p and ds are left operands straight from registers.
mask_kernel (only if the mask's gradient is asked for): a program owns a tile of it, and goes over everything the mask is
broadcast along.
Tiles off causality or window are not visited, pairs are tested only on the edge, and what is not finite is computed again
with infinities and NaNs counted as 0, as in the forward. (A row of q or k that has any also makes its scores NaN, and
through them all that it takes part in; only a row of do has to be told from those that may count as 0.)
Floor: 7 products instead of the 5 of a kernel that adds up dq atomically: 3.5 times the operations of the forward.
"""

import triton
import triton.language as tl

from bigmodel_kernels._triton import LOG2E
from bigmodel_kernels.ops.attention.triton_tile import (
    LENGTHS,
    NO_MASK,
    all_finite,
    finish_scores,
    finite_part,
    from_token,
    head_of,
    head_pointer,
    keep_tile,
    load_rows,
    load_tile,
    part_of_span,
    product,
    span,
    store_again,
    store_tile,
    tile_of_program,
    tile_of_sequence,
)


@triton.jit
def load_row(pointer, head, stride, start, q_len, past_end, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """Entries start .. start + BLOCK of one head's [S], which begin `stride` after those of the head before."""
    i = start + tl.arange(0, BLOCK)
    pointers = pointer + tl.cast(head, tl.int64) * stride + i
    if EDGE:
        row = tl.load(pointers, mask=i < q_len, other=past_end)
    else:
        row = tl.load(pointers)
    return row


@triton.jit
def load_lse(pointer, head, stride, start, q_len, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """lse of a tile's queries in units of log2; +inf, so that 2^(s - lse) is 0, where there is none."""
    lse = load_row(pointer, head, stride, start, q_len, float("-inf"), BLOCK, EDGE)
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def score_gradient(p, dp, delta, EXCLUDES: tl.constexpr):
    """p (dp - delta), 0 where p is, whatever dp is there."""
    ds = p * (dp - delta)
    if EXCLUDES:
        ds = tl.where(p == 0.0, 0.0, ds)
    return ds


@triton.jit
def query_gradient(
    q_pointer, k_pointer, v_pointer, mask_pointer, slopes_pointer, seed_pointer, grad_out_pointer, lse_pointer, delta,
    q_strides, k_strides, v_strides, mask_strides, slopes_stride, grad_out_strides,
    start_m, batch_head, lse_stride, heads, group, q_len, k_len, offset, window_left, window_right,
    scale, softcap, threshold, kept,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASK: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, VARLEN: tl.constexpr,
    CAREFUL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries, with delta [BLOCK_M]; CAREFUL: keys that are not finite count as 0."""
    batch, head = batch_head // heads, batch_head % heads
    q_head = head_of(q_pointer, q_strides, batch, head, DESCRIPTORS)
    kv_head = head // group
    k_head = head_of(k_pointer, k_strides, batch, kv_head, DESCRIPTORS)
    v_head = head_of(v_pointer, v_strides, batch, kv_head, DESCRIPTORS)
    grad_out_head = head_of(grad_out_pointer, grad_out_strides, batch, head, DESCRIPTORS)
    mask_head, slope, seed = mask_pointer, 0.0, 0
    if MASK != NO_MASK:
        mask_head = head_pointer(mask_pointer, mask_strides, batch, head)
    if ALIBI:
        slope = tl.load(slopes_pointer + batch * slopes_stride + head)
    if DROPOUT:
        seed = tl.load(seed_pointer)
    q = load_rows(q_head, batch, head, start_m, q_strides, q_len, D, BLOCK_M, BLOCK_D, True, DESCRIPTORS)
    do = load_rows(
        grad_out_head, batch, head, start_m, grad_out_strides, q_len, DV, BLOCK_M, BLOCK_DV, True, DESCRIPTORS
    )
    i = start_m + tl.arange(0, BLOCK_M)
    lse = load_lse(lse_pointer, head if VARLEN else batch_head, lse_stride, start_m, q_len, BLOCK_M, True)

    first = start_m + offset
    last = tl.minimum(start_m + BLOCK_M, q_len) - 1 + offset
    lo, a, b, hi = span(first, last, window_left, window_right, k_len, LEFT, RIGHT, BLOCK_N)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for part in tl.static_range(3):
        if part == 2 or (not CAREFUL and (part == 1 or LEFT)):
            begin, end = part_of_span(part, lo, a, b, hi, CAREFUL)
            for start_n in range(begin, end, BLOCK_N):
                j = start_n + tl.arange(0, BLOCK_N)
                k = load_rows(
                    k_head, batch, kv_head, start_n, k_strides, k_len, D, BLOCK_N, BLOCK_D, part != 1, DESCRIPTORS
                )
                s = product(q, k, PRECISION)
                s, unit, capped = finish_scores(
                    s, i[:, None], j[None, :],
                    mask_head, mask_strides, slope, scale, softcap, window_left, window_right, offset, q_len, k_len,
                    part != 1, MASK, ALIBI, SOFTCAP, LEFT, RIGHT,
                )  # fmt: skip
                p = tl.exp2(s * unit - lse[:, None])
                v = load_rows(
                    v_head, batch, kv_head, start_n, v_strides, k_len, DV, BLOCK_N, BLOCK_DV, part != 1, DESCRIPTORS
                )
                dp = product(do, v, PRECISION)
                if DROPOUT:
                    keep = keep_tile(seed, start_m, start_n, batch_head, threshold, BLOCK_M, BLOCK_N, False)
                    dp = tl.where(keep, dp * kept, 0.0)
                ds = score_gradient(p, dp, delta[:, None], part != 1 or MASK != NO_MASK)
                if SOFTCAP:
                    ds = ds * capped
                if CAREFUL:
                    k, _bad_k = finite_part(k)
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq * scale


@triton.jit(do_not_specialize=LENGTHS)
def query_kernel(
    q_pointer,  # [B, Hq, Sq, D]
    k_pointer,  # [B, Hkv, Sk, D]
    v_pointer,  # [B, Hkv, Sk, Dv]
    mask_pointer,  # [B, Hq, Sq, Sk], strides 0 where it is broadcast
    slopes_pointer,  # [B, Hq]
    seed_pointer,  # [1]
    out_pointer,  # [B, Hq, Sq, Dv]
    grad_out_pointer,  # [B, Hq, Sq, Dv]
    lse_pointer,  # [B, Hq, Sq], contiguous, as are the two below
    grad_lse_pointer,  # [B, Hq, Sq]
    delta_pointer,  # [B, Hq, Sq]
    dq_pointer,  # [B, Hq, Sq, D]
    cu_q_pointer,  # [B + 1] or None, see triton_forward.py
    cu_k_pointer,
    q_strides, k_strides, v_strides, mask_strides, slopes_stride, out_strides, grad_out_strides, dq_strides,
    heads, group, batch_heads, together, q_len, k_len, offset, window_left, window_right,
    scale, softcap, threshold, kept,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASK: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, GRAD_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr = 0,
):  # fmt: skip
    VARLEN: tl.constexpr = cu_q_pointer is not None
    lse_stride = q_len
    if not VARLEN:
        tile, batch_head = tile_of_program(tl.cdiv(q_len, BLOCK_M), batch_heads, together)
        batch, head = batch_head // heads, batch_head % heads
    else:
        batch, head, tile, q_start, q_len, k_start, k_len = tile_of_sequence(
            cu_q_pointer, cu_k_pointer, q_len, k_len, heads, batch_heads // heads, together, STEPS, BLOCK_M
        )
        if tile < 0:
            return
        batch_head = batch * heads + head
        offset *= k_len - q_len
        q_pointer, dq_pointer = from_token(q_pointer, q_start, q_strides), from_token(dq_pointer, q_start, dq_strides)
        k_pointer, v_pointer = from_token(k_pointer, k_start, k_strides), from_token(v_pointer, k_start, v_strides)
        out_pointer = from_token(out_pointer, q_start, out_strides)
        grad_out_pointer = from_token(grad_out_pointer, q_start, grad_out_strides)
        lse_pointer += q_start
        grad_lse_pointer += q_start
        delta_pointer += q_start
    start_m = (tl.cdiv(q_len, BLOCK_M) - 1 - tile) * BLOCK_M
    i = start_m + tl.arange(0, BLOCK_M)
    rows = tl.cast(head if VARLEN else batch_head, tl.int64) * lse_stride + i
    out_head = head_pointer(out_pointer, out_strides, batch, head)
    grad_out_head = head_of(grad_out_pointer, grad_out_strides, batch, head, DESCRIPTORS)
    out = load_tile(out_head, start_m, out_strides, q_len, DV, BLOCK_M, BLOCK_DV, True)
    do = load_rows(
        grad_out_head, batch, head, start_m, grad_out_strides, q_len, DV, BLOCK_M, BLOCK_DV, True, DESCRIPTORS
    )
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    if GRAD_LSE:
        delta -= tl.load(grad_lse_pointer + rows, mask=i < q_len, other=0.0)
    tl.store(delta_pointer + rows, delta, mask=i < q_len)

    dq = query_gradient(
        q_pointer, k_pointer, v_pointer, mask_pointer, slopes_pointer, seed_pointer, grad_out_pointer, lse_pointer, delta,
        q_strides, k_strides, v_strides, mask_strides, slopes_stride, grad_out_strides,
        start_m, batch_head, lse_stride, heads, group, q_len, k_len, offset, window_left, window_right,
        scale, softcap, threshold, kept,
        D, DV, BLOCK_D, BLOCK_DV, MASK, ALIBI, SOFTCAP, DROPOUT, LEFT, RIGHT, PRECISION, DESCRIPTORS, VARLEN, False,
        BLOCK_M, BLOCK_N,
    )  # fmt: skip
    dq_head = head_pointer(dq_pointer, dq_strides, batch, head)
    store_tile(dq_head, dq, start_m, dq_strides, q_len, D, BLOCK_M, BLOCK_D)

    if LEFT or RIGHT or MASK != NO_MASK:  # noqa: SIM102 (decided by the compiler)
        if all_finite(dq) == 0:
            careful = query_gradient(
                q_pointer, k_pointer, v_pointer, mask_pointer, slopes_pointer, seed_pointer, grad_out_pointer, lse_pointer,
                delta, q_strides, k_strides, v_strides, mask_strides, slopes_stride, grad_out_strides,
                start_m, batch_head, lse_stride, heads, group, q_len, k_len, offset, window_left, window_right,
                scale, softcap, threshold, kept,
                D, DV, BLOCK_D, BLOCK_DV, MASK, ALIBI, SOFTCAP, DROPOUT, LEFT, RIGHT, PRECISION, DESCRIPTORS, VARLEN, True,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip
            store_again(dq_head, careful, i < q_len, start_m, dq_strides, q_len, D, BLOCK_M, BLOCK_D)


@triton.jit
def key_gradient(
    q_pointer, k_pointer, v_pointer, mask_pointer, slopes_pointer, seed_pointer, grad_out_pointer, lse_pointer, delta_pointer,
    q_strides, k_strides, v_strides, mask_strides, slopes_stride, grad_out_strides,
    start_n, batch, kv_head, lse_stride, heads, group, q_len, k_len, offset, window_left, window_right,
    scale, softcap, threshold, kept,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASK: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, VARLEN: tl.constexpr,
    CAREFUL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(dk, dv, keys that a gradient which is not finite attends to) of BLOCK_N keys; CAREFUL: see attend."""
    k_head = head_of(k_pointer, k_strides, batch, kv_head, DESCRIPTORS)
    v_head = head_of(v_pointer, v_strides, batch, kv_head, DESCRIPTORS)
    k = load_rows(k_head, batch, kv_head, start_n, k_strides, k_len, D, BLOCK_N, BLOCK_D, True, DESCRIPTORS)
    v = load_rows(v_head, batch, kv_head, start_n, v_strides, k_len, DV, BLOCK_N, BLOCK_DV, True, DESCRIPTORS)
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_pointer)
    j = (start_n + tl.arange(0, BLOCK_N))[:, None]

    first = start_n - offset
    last = tl.minimum(start_n + BLOCK_N, k_len) - 1 - offset
    lo, a, b, hi = span(first, last, window_right, window_left, q_len, RIGHT, LEFT, BLOCK_M)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    poisoned = tl.zeros([BLOCK_N], tl.int32)
    for member in range(0, group):
        head = kv_head * group + member
        batch_head = batch * heads + head
        lse_head = head if VARLEN else batch_head
        q_head = head_of(q_pointer, q_strides, batch, head, DESCRIPTORS)
        grad_out_head = head_of(grad_out_pointer, grad_out_strides, batch, head, DESCRIPTORS)
        mask_head, slope = mask_pointer, 0.0
        if MASK != NO_MASK:
            mask_head = head_pointer(mask_pointer, mask_strides, batch, head)
        if ALIBI:
            slope = tl.load(slopes_pointer + batch * slopes_stride + head)
        for part in tl.static_range(3):
            if part == 2 or (not CAREFUL and (part == 1 or RIGHT)):
                begin, end = part_of_span(part, lo, a, b, hi, CAREFUL)
                for start_m in range(begin, end, BLOCK_M):
                    if DROPOUT:  # first, while few registers are taken
                        keep = keep_tile(seed, start_m, start_n, batch_head, threshold, BLOCK_M, BLOCK_N, True)
                    i = start_m + tl.arange(0, BLOCK_M)
                    q = load_rows(
                        q_head, batch, head, start_m, q_strides, q_len, D, BLOCK_M, BLOCK_D, part != 1, DESCRIPTORS
                    )
                    s = product(k, q, PRECISION)
                    s, unit, capped = finish_scores(
                        s, i[None, :], j,
                        mask_head, mask_strides, slope, scale, softcap, window_left, window_right, offset, q_len, k_len,
                        part != 1, MASK, ALIBI, SOFTCAP, LEFT, RIGHT,
                    )  # fmt: skip
                    lse = load_lse(lse_pointer, lse_head, lse_stride, start_m, q_len, BLOCK_M, part != 1)
                    p = tl.exp2(s * unit - lse[None, :])
                    do = load_rows(
                        grad_out_head, batch, head, start_m, grad_out_strides, q_len, DV, BLOCK_M, BLOCK_DV, part != 1,
                        DESCRIPTORS,
                    )  # fmt: skip
                    dp = product(v, do, PRECISION)
                    weights = p
                    if DROPOUT:
                        weights = tl.where(keep, p, 0.0)
                        dp = tl.where(keep, dp * kept, 0.0)
                    if CAREFUL:
                        q, _bad_q = finite_part(q)
                        do, bad = finite_part(do)
                        poisoned = tl.maximum(poisoned, tl.max((bad[None, :] & (weights != 0.0)).to(tl.int32), 1))
                    dv = tl.dot(weights.to(do.dtype), do, dv, input_precision=PRECISION)
                    delta = load_row(delta_pointer, lse_head, lse_stride, start_m, q_len, 0.0, BLOCK_M, part != 1)
                    ds = score_gradient(p, dp, delta[None, :], part != 1 or MASK != NO_MASK)
                    if SOFTCAP:
                        ds = ds * capped
                    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk * scale, dv * kept, poisoned


@triton.jit(do_not_specialize=LENGTHS)
def key_kernel(
    q_pointer,  # [B, Hq, Sq, D]
    k_pointer,  # [B, Hkv, Sk, D]
    v_pointer,  # [B, Hkv, Sk, Dv]
    mask_pointer,  # [B, Hq, Sq, Sk], strides 0 where it is broadcast
    slopes_pointer,  # [B, Hq]
    seed_pointer,  # [1]
    grad_out_pointer,  # [B, Hq, Sq, Dv]
    lse_pointer,  # [B, Hq, Sq], contiguous, as is delta
    delta_pointer,  # [B, Hq, Sq]
    dk_pointer,  # [B, Hkv, Sk, D]
    dv_pointer,  # [B, Hkv, Sk, Dv]
    cu_q_pointer,  # [B + 1] or None, see triton_forward.py
    cu_k_pointer,
    q_strides, k_strides, v_strides, mask_strides, slopes_stride, grad_out_strides, dk_strides, dv_strides,
    heads, group, batch_heads, together, q_len, k_len, offset, window_left, window_right,
    scale, softcap, threshold, kept,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASK: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr = 0,
):  # fmt: skip
    VARLEN: tl.constexpr = cu_q_pointer is not None
    lse_stride = q_len
    if not VARLEN:
        tile, batch_kv_head = tile_of_program(tl.cdiv(k_len, BLOCK_N), batch_heads // group, together)
        kv_heads = heads // group
        batch, kv_head = batch_kv_head // kv_heads, batch_kv_head % kv_heads
    else:
        batch, kv_head, tile, k_start, k_len, q_start, q_len = tile_of_sequence(
            cu_k_pointer, cu_q_pointer, k_len, q_len, heads // group, batch_heads // heads, together, STEPS, BLOCK_N
        )
        if tile < 0:
            return
        offset *= k_len - q_len
        q_pointer = from_token(q_pointer, q_start, q_strides)
        grad_out_pointer = from_token(grad_out_pointer, q_start, grad_out_strides)
        k_pointer, dk_pointer = from_token(k_pointer, k_start, k_strides), from_token(dk_pointer, k_start, dk_strides)
        v_pointer, dv_pointer = from_token(v_pointer, k_start, v_strides), from_token(dv_pointer, k_start, dv_strides)
        lse_pointer += q_start
        delta_pointer += q_start
    start_n = tile * BLOCK_N
    dk, dv, _none_told = key_gradient(
        q_pointer, k_pointer, v_pointer, mask_pointer, slopes_pointer, seed_pointer, grad_out_pointer, lse_pointer,
        delta_pointer, q_strides, k_strides, v_strides, mask_strides, slopes_stride, grad_out_strides,
        start_n, batch, kv_head, lse_stride, heads, group, q_len, k_len, offset, window_left, window_right,
        scale, softcap, threshold, kept,
        D, DV, BLOCK_D, BLOCK_DV, MASK, ALIBI, SOFTCAP, DROPOUT, LEFT, RIGHT, PRECISION, DESCRIPTORS, VARLEN, False,
        BLOCK_M, BLOCK_N,
    )  # fmt: skip
    dk_head = head_pointer(dk_pointer, dk_strides, batch, kv_head)
    dv_head = head_pointer(dv_pointer, dv_strides, batch, kv_head)
    store_tile(dk_head, dk, start_n, dk_strides, k_len, D, BLOCK_N, BLOCK_D)
    store_tile(dv_head, dv, start_n, dv_strides, k_len, DV, BLOCK_N, BLOCK_DV)

    if LEFT or RIGHT or MASK != NO_MASK:  # noqa: SIM102 (decided by the compiler)
        if (all_finite(dk) & all_finite(dv)) == 0:
            careful_dk, careful_dv, poisoned = key_gradient(
                q_pointer, k_pointer, v_pointer, mask_pointer, slopes_pointer, seed_pointer, grad_out_pointer, lse_pointer,
                delta_pointer, q_strides, k_strides, v_strides, mask_strides, slopes_stride, grad_out_strides,
                start_n, batch, kv_head, lse_stride, heads, group, q_len, k_len, offset, window_left, window_right,
                scale, softcap, threshold, kept,
                D, DV, BLOCK_D, BLOCK_DV, MASK, ALIBI, SOFTCAP, DROPOUT, LEFT, RIGHT, PRECISION, DESCRIPTORS, VARLEN, True,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip
            store_again(dk_head, careful_dk, poisoned >= 0, start_n, dk_strides, k_len, D, BLOCK_N, BLOCK_D)
            store_again(dv_head, careful_dv, poisoned == 0, start_n, dv_strides, k_len, DV, BLOCK_N, BLOCK_DV)


@triton.jit(do_not_specialize=[*LENGTHS, "mask_heads", "mask_rows", "mask_columns", "batches_here", "heads_here"])
def mask_kernel(
    q_pointer,  # [B, Hq, Sq, D]
    k_pointer,  # [B, Hkv, Sk, D]
    v_pointer,  # [B, Hkv, Sk, Dv]
    mask_pointer,  # [B, Hq, Sq, Sk], strides 0 where it is broadcast
    slopes_pointer,  # [B, Hq]
    seed_pointer,  # [1]
    grad_out_pointer,  # [B, Hq, Sq, Dv]
    lse_pointer,  # [B, Hq, Sq], contiguous, as is delta
    delta_pointer,  # [B, Hq, Sq]
    dmask_pointer,  # [B or 1, Hq or 1, Sq or 1, Sk or 1], contiguous
    q_strides, k_strides, v_strides, mask_strides, slopes_stride, grad_out_strides,
    heads, group, q_len, k_len, offset, window_left, window_right,
    scale, softcap, threshold, kept,
    mask_heads, mask_rows, mask_columns, batches_here, heads_here,  # of dmask; over how many each of its entries is summed
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASK: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, PRECISION: tl.constexpr, ONE_ROW: tl.constexpr, ONE_COLUMN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row_tiles, column_tiles = tl.cdiv(mask_rows, BLOCK_M), tl.cdiv(mask_columns, BLOCK_N)
    program = tl.program_id(0)
    tile_n = program % column_tiles
    tile_m = program // column_tiles % row_tiles
    mask_batch_head = program // column_tiles // row_tiles
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_pointer)
    first_m, end_m = tile_m * BLOCK_M, tl.minimum(tile_m * BLOCK_M + BLOCK_M, q_len)
    first_n, end_n = tile_n * BLOCK_N, tl.minimum(tile_n * BLOCK_N + BLOCK_N, k_len)
    if ONE_ROW:
        end_m = q_len
    if ONE_COLUMN:
        end_n = k_len

    dmask = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for pair in range(0, batches_here * heads_here):
        batch = mask_batch_head // mask_heads + pair // heads_here
        head = mask_batch_head % mask_heads + pair % heads_here
        batch_head = batch * heads + head
        q_head = head_pointer(q_pointer, q_strides, batch, head)
        k_head = head_pointer(k_pointer, k_strides, batch, head // group)
        v_head = head_pointer(v_pointer, v_strides, batch, head // group)
        grad_out_head = head_pointer(grad_out_pointer, grad_out_strides, batch, head)
        mask_head = head_pointer(mask_pointer, mask_strides, batch, head)
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes_pointer + batch * slopes_stride + head)
        for start_m in range(first_m, end_m, BLOCK_M):
            i = start_m + tl.arange(0, BLOCK_M)
            q = load_tile(q_head, start_m, q_strides, q_len, D, BLOCK_M, BLOCK_D, True)
            do = load_tile(grad_out_head, start_m, grad_out_strides, q_len, DV, BLOCK_M, BLOCK_DV, True)
            lse = load_lse(lse_pointer, batch_head, q_len, start_m, q_len, BLOCK_M, True)
            delta = load_row(delta_pointer, batch_head, q_len, start_m, q_len, 0.0, BLOCK_M, True)
            last = tl.minimum(start_m + BLOCK_M, q_len) - 1 + offset
            lo, _a, _b, hi = span(start_m + offset, last, window_left, window_right, k_len, LEFT, RIGHT, BLOCK_N)
            for start_n in range(tl.maximum(first_n, lo), tl.minimum(end_n, hi), BLOCK_N):
                j = start_n + tl.arange(0, BLOCK_N)
                k = load_tile(k_head, start_n, k_strides, k_len, D, BLOCK_N, BLOCK_D, True)
                s = product(q, k, PRECISION)
                s, unit, _capped = finish_scores(
                    s, i[:, None], j[None, :],
                    mask_head, mask_strides, slope, scale, softcap, window_left, window_right, offset, q_len, k_len,
                    True, MASK, ALIBI, SOFTCAP, LEFT, RIGHT,
                )  # fmt: skip
                p = tl.exp2(s * unit - lse[:, None])
                v = load_tile(v_head, start_n, v_strides, k_len, DV, BLOCK_N, BLOCK_DV, True)
                dp = product(do, v, PRECISION)
                if DROPOUT:
                    keep = keep_tile(seed, start_m, start_n, batch_head, threshold, BLOCK_M, BLOCK_N, False)
                    dp = tl.where(keep, dp * kept, 0.0)
                dmask += score_gradient(p, dp, delta[:, None], True)

    base = dmask_pointer + tl.cast(mask_batch_head, tl.int64) * mask_rows * mask_columns
    if ONE_ROW:
        dmask = tl.where(tl.arange(0, BLOCK_M)[:, None] == 0, tl.sum(dmask, 0)[None, :], 0.0)
    if ONE_COLUMN:
        dmask = tl.where(tl.arange(0, BLOCK_N)[None, :] == 0, tl.sum(dmask, 1)[:, None], 0.0)
    i, j = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    pointers = base + i.to(tl.int64)[:, None] * mask_columns + j[None, :]
    inside = (i < mask_rows)[:, None] & (j < mask_columns)[None, :]
    tl.store(pointers, dmask.to(dmask_pointer.dtype.element_ty), mask=inside)
