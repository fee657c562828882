"""What the Triton kernels of attention share: which tiles to visit, how one is loaded, scored, dropped out and multiplied.

A tile is BLOCK_M queries by BLOCK_N keys; `i` and `j` are the indices of its queries and keys, shaped [M, 1] and [1, N], or
[1, M] and [N, 1] where a kernel works on the transposed tile. Scores are kept in units of log2 (score * log2 e), because
2^x is the GPU's instruction. Offsets are int64 from the start of a tile on: a tensor may pass 2^31 elements in any stride.
"""

import triton
import triton.language as tl

from bigmodel_kernels._triton import LOG2E, tanh

LN2 = tl.constexpr(0.6931471805599453)
NO_MASK, BOOL_MASK, ADDED_MASK = (tl.constexpr(kind) for kind in range(3))  # what MASK says of attn_mask
PROBES = tl.constexpr(128)  # sequences looked at together to find a program's own
MOST_IN_REGISTERS = tl.constexpr(32)  # of a row of float32 numbers
LENGTHS = [  # arguments of the kernels whose values are not worth a compilation of their own
    "heads", "group", "batch_heads", "together", "q_len", "k_len", "offset", "window_left", "window_right", "threshold"
]  # fmt: skip


@triton.jit
def tile_of_program(tiles, batch_heads, together):
    """(tile, batch x head) of this program: tile by tile over `together` heads, whose keys and values fit in L2."""
    program = tl.program_id(0)
    first = program // (tiles * together) * together
    count = tl.minimum(together, batch_heads - first)
    rest = program - first * tiles
    return rest // count, first + rest % count


@triton.jit
def tile_of_sequence(
    cu_pointer, cu_other_pointer, total, total_other, heads, sequences, together, STEPS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Where sequences lie end to end: (sequence, head, tile) of this program, then the first token and the number of tokens
    of the sequence, of the side that has tiles and of the other one. The tile is -1 for programs that are left over.

    Tile t of sequence b is in slot cu_seqlens[b] // BLOCK + b + t. That are total // BLOCK + sequences slots, whatever the
    lengths: b has 1 + the multiples of BLOCK that it passes, which are at least its tiles. b is searched in STEPS steps, each
    of which leaves one part of PROBES. (A loop would do, but behind it the compiler pipelines no other whose bounds
    depend on it.)
    """
    slot, head = tile_of_program(total // BLOCK + sequences, heads, together)
    batch = 0
    for step in tl.static_range(STEPS):
        apart = PROBES ** (STEPS - 1 - step)
        b = batch + tl.arange(0, PROBES) * apart
        start = token_inside(tl.load(cu_pointer + b, mask=b < sequences, other=0), total)
        before = (b < sequences) & (start // BLOCK + b <= slot)
        batch += tl.maximum(tl.sum(before.to(tl.int32), 0) - 1, 0) * apart
    start, size = tokens_of(cu_pointer, batch, total)
    start_other, size_other = tokens_of(cu_other_pointer, batch, total_other)
    tile = slot - (start // BLOCK + batch)
    tile = tl.where(tile < tl.cdiv(size, BLOCK), tl.maximum(tile, -1), -1)
    return batch, head, tile, start, size, start_other, size_other


@triton.jit
def tokens_of(cu_pointer, b, total):
    """(first token, number of tokens) of a sequence."""
    start = token_inside(tl.load(cu_pointer + b), total)
    return start, tl.maximum(token_inside(tl.load(cu_pointer + b + 1), total) - start, 0)


@triton.jit
def token_inside(token, total):
    """What cu_seqlens says, or the nearest that is no other memory."""
    return tl.minimum(tl.maximum(token, 0), total).to(tl.int32)


@triton.jit
def from_token(pointer, start, strides):
    """[tokens, H, D], with strides of 4 numbers as everywhere, from a sequence's first token on."""
    return pointer + tl.cast(start, tl.int64) * strides[2]


@triton.jit
def span(first, last, below, above, size, BELOW: tl.constexpr, ABOVE: tl.constexpr, BLOCK: tl.constexpr):
    """Of the other side's indices 0 .. size, those that positions first .. last see, from x - below to x + above.

    Returns (lo, a, b, hi): tiles from lo and from b to hi hold pairs to exclude, those from a to b are seen whole.
    """
    lo, hi = 0, size
    whole_lo, whole_hi = 0, size
    if BELOW:
        lo = tl.maximum(first - below, 0) // BLOCK * BLOCK
        whole_lo = tl.cdiv(tl.maximum(last - below, 0), BLOCK) * BLOCK
    if ABOVE:
        hi = tl.minimum(size, tl.maximum(last + above + 1, 0))
        whole_hi = tl.minimum(size, tl.maximum(first + above + 1, 0))
    hi = tl.maximum(hi, lo)
    a = tl.minimum(tl.maximum(whole_lo, lo), hi)
    b = tl.maximum(a, whole_hi // BLOCK * BLOCK)
    return lo, a, b, hi


@triton.jit
def part_of_span(part: tl.constexpr, lo, a, b, hi, ALL: tl.constexpr):
    """Loop bounds of part 0 (the edge below), 1 (whole tiles), 2 (the edge above, or everything if ALL)."""
    begin, end = lo, a
    if part == 1:
        begin, end = a, b
    elif part == 2:
        begin, end = b, hi
        if ALL:
            begin = lo
    return begin, end


@triton.jit
def head_pointer(pointer, strides, batch, head):
    return pointer + tl.cast(batch, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]


@triton.jit
def tile_pointers(pointer, start, strides, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to rows start .. start + ROWS of one head's [S, D]."""
    rows = tl.arange(0, ROWS).to(tl.int64)[:, None] * strides[2]
    columns = tl.arange(0, COLUMNS).to(tl.int64)[None, :] * strides[3]
    return pointer + tl.cast(start, tl.int64) * strides[2] + (rows + columns)


@triton.jit
def inside(start, size, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return (start + tl.arange(0, ROWS) < size)[:, None] & (tl.arange(0, COLUMNS) < WIDTH)[None, :]


@triton.jit
def head_of(source, strides, batch, head, DESCRIPTORS: tl.constexpr):
    """Where load_rows finds one head's [S, D]: at a pointer, or in a descriptor of all heads, which stays as it is."""
    found = source
    if not DESCRIPTORS:
        found = head_pointer(source, strides, batch, head)
    return found


@triton.jit
def load_rows(
    found, batch, head, start, strides, size,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EDGE: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """load_tile of what head_of found; a descriptor's tile is brought by the copy engine (TMA), which fills in the zeros."""
    if DESCRIPTORS:
        tile = tl.reshape(found.load([batch, head, start, 0]), (ROWS, COLUMNS))
    else:
        tile = load_tile(found, start, strides, size, WIDTH, ROWS, COLUMNS, EDGE)
    return tile


@triton.jit
def load_tile(
    pointer, start, strides, size, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EDGE: tl.constexpr
):  # fmt: skip
    """Rows start .. start + ROWS of one head's [S, D], 0 past the last row (looked at if EDGE) and past the last column."""
    pointers = tile_pointers(pointer, start, strides, ROWS, COLUMNS)
    if EDGE:
        tile = tl.load(pointers, mask=inside(start, size, WIDTH, ROWS, COLUMNS), other=0.0)
    elif WIDTH != COLUMNS:
        tile = tl.load(pointers, mask=(tl.arange(0, COLUMNS) < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_tile(
    pointer, tile, start, strides, size, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    pointers = tile_pointers(pointer, start, strides, ROWS, COLUMNS)
    tl.store(pointers, tile.to(pointer.dtype.element_ty), mask=inside(start, size, WIDTH, ROWS, COLUMNS))


@triton.jit
def store_again(
    pointer, tile, rows, start, strides, size, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """store_tile of the rows that `rows` has, over what this program has stored before."""
    tl.debug_barrier()
    pointers = tile_pointers(pointer, start, strides, ROWS, COLUMNS)
    here = inside(start, size, WIDTH, ROWS, COLUMNS) & rows[:, None]
    tl.store(pointers, tile.to(pointer.dtype.element_ty), mask=here)


@triton.jit
def product(
    a,  # [M, K]
    b,  # [N, K]
    PRECISION: tl.constexpr,
):  # fmt: skip
    """a b^T. Without matrix units a thread holds whole rows of both, so long ones are cut into parts, which are added up."""
    PARTS: tl.constexpr = a.shape[1] // MOST_IN_REGISTERS if a.dtype == tl.float32 and PRECISION == "ieee" else 1
    if PARTS > 1:
        a = tl.permute(tl.reshape(a, (a.shape[0], PARTS, MOST_IN_REGISTERS)), (1, 0, 2))
        b = tl.permute(tl.reshape(b, (b.shape[0], PARTS, MOST_IN_REGISTERS)), (1, 2, 0))
        s = tl.sum(tl.dot(a, b, input_precision=PRECISION), 0)
    else:
        s = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    return s


@triton.jit
def finish_scores(
    s, i, j,
    mask_pointer, mask_strides, slope, scale, softcap, window_left, window_right, offset, q_len, k_len,
    EDGE: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
):  # fmt: skip
    """From the product of queries and keys: (s, unit, slope of softcap), the scores in log2 being s * unit, -inf if excluded.

    Without softcap, ALiBi and mask, `unit` stays a factor for the caller, who then gets s * unit - max as one instruction.
    EDGE: the tile may hold keys outside k_len, causality or window. (Queries past q_len give what nobody reads.)
    """
    unit = scale * LOG2E
    capped = 1.0
    if SOFTCAP:
        t = tanh(s * (scale / softcap))
        capped = 1.0 - t * t
        s = t * (softcap * LOG2E)
        unit = 1.0
    elif ALIBI or MASK != NO_MASK:
        s = s * unit
        unit = 1.0
    if ALIBI:
        s -= slope * LOG2E * tl.abs(i + offset - j).to(tl.float32)
    if MASK != NO_MASK:
        pointers = mask_pointer + i.to(tl.int64) * mask_strides[2] + j.to(tl.int64) * mask_strides[3]
        mask = tl.load(pointers, mask=(i < q_len) & (j < k_len), other=0)
        if MASK == BOOL_MASK:
            s = tl.where(mask, s, float("-inf"))
        else:
            added = mask.to(tl.float32) * LOG2E
            s = tl.where(added == float("-inf"), float("-inf"), s + added)
    if EDGE:
        end = k_len
        if RIGHT:
            end = tl.minimum(i + (offset + window_right + 1), k_len)
        seen = j < end
        if LEFT:
            seen = seen & (j >= i + (offset - window_left))
        s = tl.where(seen, s, float("-inf"))
    return s, unit, capped


@triton.jit
def keep_tile(
    seed, start_m, start_n, batch_head, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr
):  # fmt: skip
    """Which weights of a tile dropout keeps, [M, N] or [N, M]: see reference.dropout_keep, which defines the numbers.

    One Philox call serves four keys of a block of 64 that lie 16 apart; a tile of fewer keys takes its part of the block's.
    """
    CALLS: tl.constexpr = max(BLOCK_N // 4, 16)
    key = start_n // 64 * 16 + tl.arange(0, CALLS)
    query = start_m + tl.arange(0, BLOCK_M)
    if TRANSPOSED:
        c0, c1 = tl.broadcast(key[:, None], query[None, :])
    else:
        c0, c1 = tl.broadcast(key[None, :], query[:, None])
    zero = c0 * 0
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero + batch_head, zero)
    k0, k1 = (w0 >= threshold).to(tl.int8), (w1 >= threshold).to(tl.int8)
    k2, k3 = (w2 >= threshold).to(tl.int8), (w3 >= threshold).to(tl.int8)
    if BLOCK_N < 64:  # in the second half of its block of 64, or not
        later = start_n % 64 >= 32
        k0, k1 = tl.where(later, k2, k0), tl.where(later, k3, k1)
    if BLOCK_N < 32:
        keep = tl.where(start_n % 32 >= 16, k1, k0)
    elif BLOCK_N < 64:
        pairs = tl.join(k0, k1)  # [.., .., bit of the word's number]
        if TRANSPOSED:
            keep = tl.reshape(tl.permute(pairs, (2, 0, 1)), (BLOCK_N, BLOCK_M))
        else:
            keep = tl.reshape(tl.permute(pairs, (0, 2, 1)), (BLOCK_M, BLOCK_N))
    else:
        pairs = tl.join(tl.join(k0, k1), tl.join(k2, k3))  # [.., .., low bit of the word's number, high bit]
        if TRANSPOSED:
            parts = tl.reshape(pairs, (BLOCK_N // 64, 16, BLOCK_M, 2, 2))
            keep = tl.reshape(tl.permute(parts, (0, 4, 3, 1, 2)), (BLOCK_N, BLOCK_M))
        else:
            parts = tl.reshape(pairs, (BLOCK_M, BLOCK_N // 64, 16, 2, 2))
            keep = tl.reshape(tl.permute(parts, (0, 1, 4, 3, 2)), (BLOCK_M, BLOCK_N))
    return keep != 0


@triton.jit
def all_finite(x):
    return tl.sum(tl.sum(x * 0.0, 1), 0) == 0.0


@triton.jit
def finite_part(x):
    """x with 0 for infinities and NaNs, and which rows had any."""
    finite = tl.abs(x) < float("inf")
    return tl.where(finite, x, 0.0).to(x.dtype), tl.min(finite.to(tl.int32), 1) == 0
