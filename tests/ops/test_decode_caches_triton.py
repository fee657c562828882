"""The Triton kernel of bmk.attention_decode with caches of 8 bits, interpreted: as with the numbers they stand for."""

import math

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.testing import assert_matches, make
from tests.ops.test_attention_decode import OPTIONS, slopes
from tests.ops.test_attention_decode_triton import in_shares
from tests.triton_interpreter import interpreted

DTYPES = [torch.int8, torch.float8_e4m3fn]
SHAPES = {  # batch, query heads, key heads, queries, keys, head dimension, value dimension
    "one_row": (2, 2, 2, 1, 70, 32, 32),
    "eight_rows": (2, 8, 1, 1, 50, 64, 48),
    "queries": (2, 4, 2, 4, 40, 23, 7),
}
SCALES = {
    "number": (0.02, -3.0),
    "head": ("head", "head"),
    "key": ("key", "key"),
    "tiny": ("key", 2e-6),  # a value times it would be 0 or have few bits in float16
}


def scale_of(kind, cache, seed, size):
    """Of either sign."""
    if isinstance(kind, float):
        return torch.tensor(kind)
    return make(*(cache.shape[1:2] if kind == "head" else cache.shape[:3]), seed=seed) * size


def spread(scale, cache):
    scale = scale.float()
    return (scale.view(1, -1, 1) if scale.dim() == 1 else scale).expand(cache.shape[:3])


def in_pages(t, page_size, table):
    padded = torch.nn.functional.pad(t, (0, 0) * (t.dim() - 3) + (0, -t.shape[2] % page_size))
    pages = torch.zeros(int(table.max()) + 1, t.shape[1], page_size, *t.shape[3:]).to(t.dtype)
    pages[table.flatten()] = padded.unflatten(2, (-1, page_size)).transpose(1, 2).flatten(0, 1)
    return pages


def decode(q, k, v, lengths, options, backend, **more):
    options = dict(options)
    if options.pop("alibi", False):
        options["alibi_slopes"] = slopes(q)
    return bmk.attention_decode(q, k, v, lengths, return_lse=True, backend=backend, **options, **more)


def codes(shape, dtype, seed):
    return (make(*shape, seed=seed) * 40).round().clamp(-128, 127).to(dtype)


def check(shape, dtype, q_dtype, kind, option, seed):
    batch, heads, kv_heads, queries, keys, d, dv = shape
    q = make(batch, heads, queries, d, dtype=q_dtype, seed=seed)
    k, v = codes((batch, kv_heads, keys, d), dtype, 10 + seed), codes((batch, kv_heads, keys, dv), dtype, 20 + seed)
    of_k, of_v = SCALES[kind]
    k_scale, v_scale = scale_of(of_k, k, 30 + seed, 0.03), scale_of(of_v, v, 40 + seed, 0.1)
    lengths = torch.tensor([keys, keys // 2 + 1])
    exact = decode(
        q.double(), k.double() * spread(k_scale, k)[..., None].double(), v.double() * spread(v_scale, v)[..., None].double(),
        lengths, OPTIONS[option], "torch",
    )  # fmt: skip
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    stock = decode(q, k, v, lengths, OPTIONS[option], "torch", **scales)
    for splits in (1, 3):
        with in_shares(splits):
            found = decode(q, k, v, lengths, OPTIONS[option], "triton", **scales)
            assert_matches(found[0], exact[0], stock[0], dtype=q_dtype)
            assert_matches(found[1], exact[1], None, dtype=torch.float32, magnitude=1.0)  # what counts is e^lse
            page_size = (1, 5, 16)[seed]
            table = torch.randperm(batch * -(-keys // page_size), generator=torch.Generator().manual_seed(0)).view(
                batch, -1
            )
            pages = [in_pages(t, page_size, table) for t in (k, v)]
            if k_scale.dim() == 3:
                scales_of_pages = [
                    in_pages(spread(s, k), page_size, table) if s.dim() else s for s in (k_scale, v_scale)
                ]
            else:
                scales_of_pages = [k_scale, v_scale]
            paged = decode(
                q, *pages, lengths, OPTIONS[option], "triton", block_table=table.int(), k_scale=scales_of_pages[0],
                v_scale=scales_of_pages[1],
            )  # fmt: skip
            assert all(torch.equal(a, b) for a, b in zip(paged, found))


CASES = [
    *(("one_row", dtype, torch.float16, kind, "plain", 0) for dtype in DTYPES for kind in SCALES),
    *(("eight_rows", dtype, torch.float32, kind, "plain", 0) for dtype in DTYPES for kind in SCALES),
    *(("queries", dtype, torch.float16, "key", option, 1) for dtype in DTYPES for option in OPTIONS),
    *(("queries", dtype, torch.float32, "head", "window", seed) for dtype in DTYPES for seed in (0, 1, 2)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_rule(case):
    shape, *rest = case
    interpreted(check, SHAPES[shape], *rest)


def check_every_code(dtype, q_dtype):
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    k, v = torch.zeros(1, 1, 1, 16).to(dtype), every.view(1, 1, 1, 256)  # with one key, its value is the result
    q = torch.ones(1, 1, 1, 16, dtype=q_dtype)
    out = bmk.attention_decode(q, k, v, torch.tensor([1]), k_scale=1.0, v_scale=0.5, backend="triton")
    expected = (every.float() * 0.5).to(q_dtype).view(out.shape)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    assert out.isnan().any() == (dtype == torch.float8_e4m3fn)


@pytest.mark.parametrize("q_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code(dtype, q_dtype):
    interpreted(check_every_code, dtype, q_dtype)


def check_leaks(where, queries):
    """Past the length, before the window, and where one query sees it: NaNs in an fp8 cache or in the scales of any."""
    options = {"is_causal": True, "window": (20, 0)}
    q = make(1, 4, queries, 32, seed=1)
    shape, dtype = (1, 2, 64, 32), torch.float8_e4m3fn
    k, v, k_scale, v_scale = codes(shape, dtype, 2), codes(shape, dtype, 3), *torch.full((2, 1, 2, 64), 0.02)
    given = dict(zip(("k", "v", "k_scale", "v_scale"), (k, v, k_scale, v_scale)))

    def run():
        given_scales = {"k_scale": given["k_scale"], "v_scale": given["v_scale"]}
        return decode(q, given["k"], given["v"], torch.tensor([60]), options, "triton", **given_scales)

    for splits in (1, 2):
        with in_shares(splits):
            given[where] = before = given[where].clone()
            expected = run()
            hidden = before.clone()
            hidden[:, :, 60:], hidden[:, :, : 60 - 20 - queries] = math.nan, math.nan
            given[where] = hidden
            assert all(torch.equal(a, b) for a, b in zip(run(), expected))
            hidden[:, :, 59] = math.nan  # the last query alone attends to it
            out, _ = run()
            torch.testing.assert_close(out[:, :, :-1], expected[0][:, :, :-1], rtol=1e-6, atol=1e-6)
            assert not out[:, :, -1].isfinite().any()
            given[where] = before


@pytest.mark.parametrize("where", ["k", "v", "k_scale", "v_scale"])
@pytest.mark.parametrize("queries", [1, 3])
def test_what_is_left_out_never_leaks(where, queries):
    interpreted(check_leaks, where, queries)


def check_refusals(backend):
    q, k = make(2, 4, 1, 16), make(2, 2, 12, 16)
    pages, table = make(6, 2, 4, 16), torch.arange(6).view(2, 3)
    for lengths in ([12, 13], [-1, 3]):
        with pytest.raises(
            RuntimeError, match=r"cache_seqlens must be within the 12 positions of k_cache, got (13|-1) at"
        ):
            bmk.attention_decode(q, k, k, torch.tensor(lengths), backend=backend)
        with pytest.raises(
            RuntimeError, match=r"cache_seqlens must be within the 12 positions of k_cache, got (13|-1) at"
        ):
            bmk.attention_decode(q, pages, pages, torch.tensor(lengths), block_table=table, backend=backend)
    wrong = table.clone()
    wrong[1, 1] = 6
    with pytest.raises(RuntimeError, match=r"block_table must name blocks from 0 to 5 of k_cache, got 6 at \[1, 1\]"):
        bmk.attention_decode(q, pages, pages, torch.tensor([12, 5]), block_table=wrong, backend=backend)
    bmk.attention_decode(
        q, pages, pages, torch.tensor([12, 4]), block_table=wrong, backend=backend
    )  # past the sequence


@pytest.mark.parametrize("backend", ["triton", "cpu", "torch"])
def test_lengths_and_blocks_that_do_not_fit(backend):
    interpreted(check_refusals, backend)
