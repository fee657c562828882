"""bmk.attention_varlen and bmk.attention_decode: each sequence as bmk.attention gives it alone."""

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
ENDS_Q, ENDS_K = torch.tensor([0, 3, 3, 12]), torch.tensor([0, 5, 9, 16])


def alone(q, k, v, options, b, **more):
    options = dict(options)
    slopes = options.pop("alibi_slopes", None)
    if slopes is not None and slopes.dim() == 2:
        slopes = slopes[b]
    return bmk.attention(
        q, k, v, enable_gqa=True, return_lse=True, alibi_slopes=slopes, backend="cpu", **options, **more
    )


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("alignment", ["upper_left", "lower_right"])
@pytest.mark.parametrize("name", OPTIONS)
def test_varlen_is_attention_in_each_sequence(name, alignment, compiled):
    q, k, v = (make(*s, seed=i).requires_grad_() for i, s in enumerate([(12, 4, 8), (16, 2, 8), (16, 2, 6)]))

    def varlen(q, k, v):
        return bmk.attention_varlen(
            q, k, v, ENDS_Q, ENDS_K, 9, 7, enable_gqa=True, return_lse=True, alignment=alignment, **OPTIONS[name]
        )

    run = torch.compile(varlen, fullgraph=True, backend="aot_eager") if compiled else varlen
    out, lse = run(q, k, v)
    parts = []
    for b in range(3):
        rows, keys = slice(ENDS_Q[b], ENDS_Q[b + 1]), slice(ENDS_K[b], ENDS_K[b + 1])
        one = [t[s].transpose(0, 1)[None] for t, s in ((q, rows), (k, keys), (v, keys))]
        parts.append(alone(*one, OPTIONS[name], b, alignment=alignment))
    expected = torch.cat([o[0].transpose(0, 1) for o, _ in parts])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, torch.cat([x[0] for _, x in parts], 1), rtol=1e-5, atol=1e-5)
    grad = make(*out.shape, seed=9)
    for a, e in zip(torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad)):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def test_varlen_of_no_sequences():
    q, k = torch.zeros(0, 4, 8), torch.zeros(0, 2, 8)
    ends = torch.tensor([0])
    assert bmk.attention_varlen(q, k, k, ends, ends, 0, 0, enable_gqa=True).shape == (0, 4, 8)


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
VARLEN_ERRORS = [
    (lambda: bmk.attention_varlen(Q[0], Q, Q, ENDS_Q, ENDS_K, 9, 7), RuntimeError, "q must have 3 dimensions"),
    (lambda: bmk.attention_varlen(1, Q, Q, ENDS_Q, ENDS_K, 9, 7), TypeError, "q must be a tensor"),
    (lambda: bmk.attention_varlen(Q, Q, Q, ENDS_Q.float(), ENDS_K, 9, 7), TypeError, "cu_seqlens_q must be"),
    (lambda: bmk.attention_varlen(Q, Q, Q, torch.tensor([0, 3]), ENDS_K, 9, 7), RuntimeError, "cu_seqlens_k must have"),
    (lambda: bmk.attention_varlen(Q, Q, Q, *[torch.tensor([0, 2])] * 2, 9, 7), RuntimeError, "rise from 0 to the 3"),
    (lambda: bmk.attention_varlen(Q, Q, Q, *[torch.tensor([0, 4, 3])] * 2, 9, 7), RuntimeError, "rise from 0 to the 3"),
    (lambda: bmk.attention_varlen(Q, Q, Q, *[torch.tensor([0, 3])] * 2, 2, 7), RuntimeError, "max_seqlen_q must be"),
    (
        lambda: bmk.attention_varlen(Q, Q, Q, *[torch.tensor([0, 3])] * 2, 3, 3, alignment="x"),
        ValueError,
        "alignment must be",
    ),
    (lambda: bmk.attention_varlen(Q, Q, Q[:2], *[torch.tensor([0, 3])] * 2, 3, 3), RuntimeError, "v must have the 3"),
    (
        lambda: bmk.attention_varlen(Q, Q, Q, *[torch.tensor([0, 3])] * 2, 3, 3.5),
        TypeError,
        "max_seqlen_k must be an int",
    ),
]
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


@pytest.mark.parametrize(("function", "error", "message"), VARLEN_ERRORS + DECODE_ERRORS)
def test_wrong_input_is_named(function, error, message):
    with pytest.raises(error, match=message):
        function()
