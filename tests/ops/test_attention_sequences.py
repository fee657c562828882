"""bmk.attention_decode: each sequence as bmk.attention gives it alone."""

import math

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.testing import make


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch._dynamo.reset()


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "window": (3, 0)},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.1]), "is_causal": True},
    "alibi_by_sequence": {"alibi_slopes": torch.arange(12.0).view(3, 4) / 10},
    "softcap": {"softcap": 1.5, "scale": 0.7},
}


def alone(q, k, v, options, b, **more):
    options = dict(options)
    slopes = options.pop("alibi_slopes", None)
    if slopes is not None and slopes.dim() == 2:
        slopes = slopes[b]
    return bmk.attention(
        q, k, v, enable_gqa=True, return_lse=True, alibi_slopes=slopes, backend="cpu", **options, **more
    )


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("lengths", [(4, 20, 11), (20, 20, 20), (2, 2, 17)], ids=str)
@pytest.mark.parametrize("name", ["plain", "causal", "window", "alibi", "softcap"])
def test_decode_is_attention_to_the_valid_keys(name, lengths, compiled, paged):
    q, k, v = make(3, 4, 2, 8), make(3, 2, 20, 8, seed=1), make(3, 2, 20, 6, seed=2)
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    expected = [
        alone(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], OPTIONS[name], b, alignment="lower_right")
        for b, n in enumerate(lengths)
    ]
    for b, n in enumerate(lengths):  # what lies past the end may be anything
        k[b, :, n:], v[b, :, n:] = math.nan, math.nan
    table = None
    if paged:
        table = torch.randperm(17)[:15].view(3, 5)
        caches = [torch.full((17, 2, 4, d), math.nan) for d in (8, 6)]
        for cache, t in zip(caches, (k, v)):
            cache[table.flatten()] = t.unflatten(2, (5, 4)).transpose(1, 2).flatten(0, 1)
        k, v = caches
        for b, n in enumerate(lengths):
            table[b, -(-n // 4) :] = -1

    def decode(q, k, v):
        return bmk.attention_decode(q, k, v, seqlens, block_table=table, return_lse=True, **OPTIONS[name])

    run = torch.compile(decode, fullgraph=True, backend="eager") if compiled else decode
    out, lse = run(q, k, v)
    torch.testing.assert_close(out, torch.cat([o for o, _ in expected]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, torch.cat([x for _, x in expected]), rtol=1e-5, atol=1e-5)


Q, CACHE = make(3, 4, 8), make(3, 2, 20, 8)
PAGES = make(4, 2, 5, 8)
DECODE_ERRORS = [
    (
        lambda: bmk.attention_decode(CACHE[:, :, :1], CACHE[:2], CACHE[:2], torch.ones(3).int()),
        RuntimeError,
        "k_cache must hold 3 sequences as q does, got 2",
    ),
    (
        lambda: bmk.attention_decode(CACHE, CACHE, CACHE[..., :5, :], torch.ones(3).int()),
        RuntimeError,
        r"v_cache must have the first three sizes of k_cache, \[3, 2, 20\], got \[3, 2, 5\]",
    ),
    (
        lambda: bmk.attention_decode(
            CACHE, PAGES, PAGES, torch.full((3,), 6), block_table=torch.tensor([[0, 1]] * 2 + [[0, 4]])
        ),
        RuntimeError,
        r"block_table must name blocks from 0 to 3 of k_cache, got 4 at \[2, 1\]",
    ),
    (lambda: bmk.attention_decode(Q, CACHE, CACHE, torch.ones(3).int()), RuntimeError, "q must have 4 dimensions"),
    (lambda: bmk.attention_decode(CACHE, CACHE, None, torch.ones(3).int()), TypeError, "v_cache must be a tensor"),
    (lambda: bmk.attention_decode(CACHE, CACHE, CACHE, torch.ones(3)), TypeError, "cache_seqlens must be an int32"),
    (lambda: bmk.attention_decode(CACHE, CACHE, CACHE, torch.ones(2).int()), RuntimeError, "cache_seqlens must have"),
    (
        lambda: bmk.attention_decode(CACHE, CACHE, CACHE, torch.full((3,), 21)),
        RuntimeError,
        "cache_seqlens must be within",
    ),
    (
        lambda: bmk.attention_decode(CACHE, CACHE, CACHE, torch.ones(3).int(), block_table=torch.ones(3).int()),
        RuntimeError,
        "block_table must have 2 dimensions",
    ),
]


@pytest.mark.parametrize(("function", "error", "message"), DECODE_ERRORS)
def test_wrong_input_is_named(function, error, message):
    with pytest.raises(error, match=message):
        function()
