"""Attention of a few new queries to a cache of keys and values in Triton, contiguous or paged, in one launch.

    s_j = softcap(scale q k_j) + bias,  p = softmax over the keys of the sequence,  out = sum_j p_j v_j,  lse = log sum_j exp s_j

Rows: the queries of all heads that share keys (GQA) are rows of one tile, so that each key is read once for all of them.
Program: BLOCK_M rows of one key head, over one of `splits` shares of the keys that are there (cache_seqlens, read on the
device: nothing waits for the lengths, and a CUDA graph can be captured). It leaves m, l and the sum of p v in float32 and takes a
ticket; the program that takes the last of its rows adds the shares up, always in the same order, and puts the ticket back to 0
(flash decoding, Dao et al. 2023, without its second launch).
Keys past a sequence's length are never read, nor are table entries past it. Masks between several queries (causality, window) may
exclude a value that is infinite or NaN for some rows: as in triton_forward.py, only a share with such a result is computed again.
A cache of 8 bits holds k_j / a_j and v_j / b_j as int8 or e4m3. Its numbers, exact in the queries' dtype, are multiplied as they
are; a_j multiplies the score, and b_j the weight p_j, relative to the largest of the tile, so that 16 bits hold what is left.
Gradients are bmk.attention's.
Floor: memory: the keys and values that are there, once per tile of rows.
"""

import triton
import triton.language as tl

from bigmodel_kernels.ops.attention.triton_tile import LN2, NO_MASK, all_finite, finish_scores, finite_part, product

AS_QUERIES, INT8, E4M3_BITS, E4M3 = (tl.constexpr(kind) for kind in range(4))  # what CACHE says of the caches


@triton.jit
def places(j, first, end, batch, table_pointer, table_width, page_size, pages):
    """Where keys j of a sequence lie: block, place in it, and which of them are asked for, those in first .. end."""
    here = (j >= first) & (j < end)
    block, place = batch, j
    if table_pointer is not None:
        block = tl.load(table_pointer + batch * table_width + j // page_size, mask=here, other=0)
        block = tl.minimum(tl.maximum(block, 0), pages - 1)
        place = j % page_size
    return block.to(tl.int64), place.to(tl.int64), here


@triton.jit
def cached_rows(
    pointer, strides, kv_head, block, place, here,
    CACHE: tl.constexpr, DTYPE: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Keys or values at these places as DTYPE; 0 where they are not asked for and past the last column."""
    rows = block * strides[0] + tl.cast(kv_head, tl.int64) * strides[1] + place * strides[2]
    column = tl.arange(0, COLUMNS)
    pointers = pointer + rows[:, None] + column.to(tl.int64)[None, :] * strides[3]
    mask = here[:, None] & (column < WIDTH)[None, :]
    if CACHE == E4M3_BITS:
        found = number_of_e4m3(tl.load(pointers, mask=mask, other=0))
    elif CACHE == INT8:
        found = tl.load(pointers, mask=mask, other=0)
    else:
        found = tl.load(pointers, mask=mask, other=0.0)
    return found.to(DTYPE)


@triton.jit
def number_of_e4m3(bits):
    """The float32 of a byte: exponent and mantissa moved to where float32 has them, whose bias is 120 more."""
    bits = bits.to(tl.int32)
    moved = ((bits & 0x7F) << 20) | ((bits & 0x80) << 24)
    number = moved.to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), number)


@triton.jit
def cached_scales(pointer, strides, kv_head, block, place, here):
    at = block * strides[0] + tl.cast(kv_head, tl.int64) * strides[1] + place * strides[2]
    return tl.load(pointer + at, mask=here, other=0.0)


@triton.jit
def attend_to_share(
    q, i, slope, k_pointer, v_pointer, k_scale_pointer, v_scale_pointer, k_strides, v_strides, k_scale_strides,
    v_scale_strides, kv_head, batch, begin, first, end, k_len,
    table_pointer, table_width, page_size, pages, q_len, window_left, window_right, scale, softcap,
    CACHE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PRECISION: tl.constexpr, CAREFUL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """m, l and the sum of p v over the keys first .. end; CAREFUL as in triton_forward.attend."""
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    poisoned = tl.zeros([BLOCK_M], tl.int32)
    for start in range(begin, end, BLOCK_N):
        j = (start + tl.arange(0, BLOCK_N))[None, :]
        block, place, here = places(
            start + tl.arange(0, BLOCK_N), first, end, batch, table_pointer, table_width, page_size, pages
        )
        k = cached_rows(k_pointer, k_strides, kv_head, block, place, here, CACHE, q.dtype, D, BLOCK_D)
        s = product(q, k, PRECISION)
        if CACHE != AS_QUERIES:
            s *= cached_scales(k_scale_pointer, k_scale_strides, kv_head, block, place, here)[None, :]
        s, unit, _capped = finish_scores(
            s, i, j, k_pointer, (0, 0, 0, 0), slope, scale, softcap, window_left, window_right, k_len - q_len, q_len, end,
            True, NO_MASK, ALIBI, SOFTCAP, LEFT, RIGHT,
        )  # fmt: skip
        new_m = tl.maximum(m, tl.max(s, 1) * unit)
        shift = tl.where(new_m == float("-inf"), 0.0, new_m)
        p = tl.exp2(s * unit - shift[:, None])
        shrink = tl.exp2(m - shift)
        total = total * shrink + tl.sum(p, 1)
        v = cached_rows(v_pointer, v_strides, kv_head, block, place, here, CACHE, q.dtype, DV, BLOCK_DV)
        if CAREFUL:
            v, bad = finite_part(v)
        if CACHE == AS_QUERIES:
            if CAREFUL:
                poisoned = tl.maximum(poisoned, tl.max((bad[None, :] & (p != 0.0)).to(tl.int32), 1))
            out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
        else:
            v_scale = cached_scales(v_scale_pointer, v_scale_strides, kv_head, block, place, here)
            if CAREFUL:
                finite = tl.abs(v_scale) < float("inf")
                v_scale = tl.where(finite, v_scale, 0.0)
                poisoned = tl.maximum(poisoned, tl.max(((bad | (finite == 0))[None, :] & (p != 0.0)).to(tl.int32), 1))
            largest = tl.max(tl.abs(v_scale), 0)
            relative = v_scale / tl.where(largest == 0.0, 1.0, largest)
            of_tile = tl.dot((p * relative[None, :]).to(v.dtype), v, input_precision=PRECISION)
            out = out * shrink[:, None] + of_tile * largest
        m = new_m
    return m, total, out, poisoned


@triton.jit(
    do_not_specialize=[
        "heads", "group", "q_len", "tiles", "splits", "capacity", "table_width", "pages", "window_left", "window_right"
    ]
)  # fmt: skip
def decode_kernel(
    q_pointer,  # [B, Hq, Sq, D]
    k_pointer,  # [B, Hkv, S, D]; [pages, Hkv, page_size, D] where there is a table
    v_pointer,  # likewise, Dv
    k_scale_pointer,  # float32, as keys without their last dimension; None if CACHE is AS_QUERIES
    v_scale_pointer,  # likewise
    lengths_pointer,  # [B] int32 or int64
    table_pointer,  # [B, table_width] int32 or int64; None where the cache is contiguous
    slopes_pointer,  # [B or 1, Hq] float32, if ALIBI; else None
    out_pointer,  # [B, Hq, Sq, Dv], rows contiguous
    lse_pointer,  # [B, Hq, Sq], contiguous
    partial_pointer,  # [B Hkv tiles, splits, BLOCK_M (BLOCK_DV + 2)] float32: sum of p v, m, l; None if there is one split
    tickets_pointer,  # [B Hkv tiles] int32, 0 before and after; likewise
    q_strides, k_strides, v_strides, k_scale_strides, v_scale_strides, out_strides, slopes_stride,
    heads, group, q_len, tiles, splits, capacity, page_size, table_width, pages, window_left, window_right, scale, softcap,
    CACHE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SOFTCAP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SEVERAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    ALIBI: tl.constexpr = slopes_pointer is not None
    split, task = tl.program_id(0) % splits, tl.program_id(0) // splits
    tile, pair = task % tiles, task // tiles
    kv_heads = heads // group
    kv_head, batch = pair % kv_heads, (pair // kv_heads).to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < group * q_len
    head, i = kv_head * group + row // q_len, row % q_len
    column = tl.arange(0, BLOCK_D)
    q_rows = batch * q_strides[0] + head.to(tl.int64) * q_strides[1] + i.to(tl.int64) * q_strides[2]
    q_pointers = q_pointer + q_rows[:, None] + column.to(tl.int64)[None, :] * q_strides[3]
    q = tl.load(q_pointers, mask=exists[:, None] & (column < D)[None, :], other=0.0)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_pointer + batch * slopes_stride + head, mask=exists, other=0.0)[:, None]

    k_len = tl.minimum(tl.maximum(tl.load(lengths_pointer + batch), 0), capacity).to(tl.int32)
    first, last = 0, k_len  # of the keys that any query sees
    if LEFT:
        first = tl.maximum(k_len - q_len - window_left, 0)
    if RIGHT:
        last = tl.minimum(k_len + window_right, k_len)
    from_tile = first // BLOCK_N * BLOCK_N
    share = tl.cdiv(tl.cdiv(last - from_tile, BLOCK_N), splits) * BLOCK_N
    begin = from_tile + split * share
    end = tl.minimum(begin + share, last)
    # One query sees all keys up to the last.
    m, total, out, _none_told = attend_to_share(
        q, i[:, None], slope, k_pointer, v_pointer, k_scale_pointer, v_scale_pointer, k_strides, v_strides,
        k_scale_strides, v_scale_strides, kv_head, batch, begin, first, end, k_len,
        table_pointer, table_width, page_size, pages, q_len, window_left, window_right, scale, softcap,
        CACHE, D, DV, BLOCK_D, BLOCK_DV, ALIBI, SOFTCAP, LEFT, RIGHT and SEVERAL, PRECISION, False, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if SEVERAL and (LEFT or RIGHT):  # noqa: SIM102 (decided by the compiler)
        if all_finite(out) == 0:
            _same_m, _same_total, careful, poisoned = attend_to_share(
                q, i[:, None], slope, k_pointer, v_pointer, k_scale_pointer, v_scale_pointer, k_strides, v_strides,
                k_scale_strides, v_scale_strides, kv_head, batch, begin, first, end, k_len,
                table_pointer, table_width, page_size, pages, q_len, window_left, window_right, scale, softcap,
                CACHE, D, DV, BLOCK_D, BLOCK_DV, ALIBI, SOFTCAP, LEFT, RIGHT, PRECISION, True, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            out = tl.where((poisoned == 0)[:, None], careful, out)

    value_column = tl.arange(0, BLOCK_DV)
    of_lse = (batch * heads + head) * q_len + i
    of_out = batch * out_strides[0] + head.to(tl.int64) * out_strides[1] + i.to(tl.int64) * out_strides[2]
    if partial_pointer is None:
        store_results(out_pointer, lse_pointer, m, total, out, of_out, of_lse, exists, DV, BLOCK_DV)
    else:
        number = tl.arange(0, BLOCK_M)
        place = number[:, None] * BLOCK_DV + value_column[None, :]
        SHARE: tl.constexpr = BLOCK_M * (BLOCK_DV + 2)
        shares = partial_pointer + task.to(tl.int64) * splits * SHARE
        mine = shares + split * SHARE
        tl.store(mine + place, out)
        tl.store(mine + BLOCK_M * BLOCK_DV + number, m)
        tl.store(mine + BLOCK_M * (BLOCK_DV + 1) + number, total)
        tl.debug_barrier()  # all that this program's threads have stored comes before its ticket
        if tl.atomic_add(tickets_pointer + task, 1) == splits - 1:
            tl.debug_barrier()
            m = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            out = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
            for other in range(0, splits):
                theirs = shares + other * SHARE
                their_m = tl.load(theirs + BLOCK_M * BLOCK_DV + number, cache_modifier=".cg")
                their_total = tl.load(theirs + BLOCK_M * (BLOCK_DV + 1) + number, cache_modifier=".cg")
                their_out = tl.load(theirs + place, cache_modifier=".cg")
                new_m = tl.maximum(m, their_m)
                shift = tl.where(new_m == float("-inf"), 0.0, new_m)
                shrink, their_shrink = tl.exp2(m - shift), tl.exp2(their_m - shift)
                total = total * shrink + their_total * their_shrink
                # A share without keys for a row has 0 there, and no NaN.
                out = out * shrink[:, None] + their_out * their_shrink[:, None]
                m = new_m
            tl.store(tickets_pointer + task, 0)
            store_results(out_pointer, lse_pointer, m, total, out, of_out, of_lse, exists, DV, BLOCK_DV)


@triton.jit
def store_results(
    out_pointer, lse_pointer, m, total, out, of_out, of_lse, exists, DV: tl.constexpr, BLOCK_DV: tl.constexpr
):  # fmt: skip
    """Of rows that begin at of_out; a row without a key gives 0 and -inf."""
    empty = total == 0.0
    safe = tl.where(empty, 1.0, total)
    column = tl.arange(0, BLOCK_DV)
    pointers = out_pointer + of_out[:, None] + column[None, :]
    here = exists[:, None] & (column < DV)[None, :]
    tl.store(pointers, (out / safe[:, None]).to(out_pointer.dtype.element_ty), mask=here)
    tl.store(lse_pointer + of_lse, tl.where(empty, float("-inf"), (m + tl.log2(safe)) * LN2), mask=exists)
