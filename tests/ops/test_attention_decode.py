"""The C++ kernel of bmk.attention_decode, which reads caches where they lie, and bmk.attention with few rows, which shares it."""

import math
from importlib import import_module

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.testing import assert_matches, make

# batch, query heads, key heads, queries, capacity, head dimension, value dimension
SHAPES = {
    "one_row": (2, 3, 3, 1, 70, 64, 64),
    "two_rows": (1, 4, 2, 1, 33, 32, 32),
    "three_rows": (2, 3, 1, 1, 100, 16, 48),
    "eight_rows": (2, 8, 1, 1, 130, 128, 128),
    "eleven_rows": (1, 22, 2, 1, 65, 64, 80),
    "sixteen_rows": (1, 8, 1, 2, 97, 48, 16),
    "queries": (2, 4, 2, 4, 40, 32, 64),
    "odd_widths": (2, 5, 1, 1, 37, 23, 7),
    "long": (1, 8, 1, 1, 1500, 64, 64),
    "one_key": (1, 2, 1, 1, 1, 16, 16),
}
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "window": (9, 0)},
    "alibi": {"is_causal": True, "alibi": True},
    "softcap": {"softcap": 1.5, "scale": 0.7},
}


def drawn(shape, dtype, seed):
    b, heads, kv_heads, queries, keys, d, dv = shape
    q, k, v = (
        make(b, heads, queries, d, seed=3 * seed, dtype=dtype),
        make(b, kv_heads, keys, d, seed=3 * seed + 1, dtype=dtype),
        make(b, kv_heads, keys, dv, seed=3 * seed + 2, dtype=dtype),
    )
    return q, k, v, [keys - (i * 7 + seed) % min(keys, 30) for i in range(b)]


def apart(q, k, v, lengths, options, backend):
    """Each sequence by bmk.attention on another backend."""
    options = dict(options)
    if options.pop("alibi", False):
        options["alibi_slopes"] = slopes(q)
    parts = [
        bmk.attention(
            q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n],
            enable_gqa=True, alignment="lower_right", return_lse=True, backend=backend, **options,
        )
        for b, n in enumerate(lengths)
    ]  # fmt: skip
    return [torch.cat(t) for t in zip(*parts)]


def slopes(q):
    return torch.linspace(0.02, 0.5, q.shape[1])


def decode(q, k, v, lengths, options, **more):
    options = dict(options)
    if options.pop("alibi", False):
        options["alibi_slopes"] = slopes(q)
    return bmk.attention_decode(q, k, v, torch.tensor(lengths), return_lse=True, backend="cpu", **options, **more)


def in_pages(t, page_size, table):
    """The same cache in pages, of which those that hold nothing are NaN."""
    heads, keys, d = t.shape[1:]
    padded = torch.nn.functional.pad(t, (0, 0, 0, -keys % page_size), value=math.nan if t.is_floating_point() else 0)
    pages = torch.full((table.max() + 2, heads, page_size, d), math.nan).to(t.dtype)
    pages[table.flatten()] = padded.unflatten(2, (-1, page_size)).transpose(1, 2).flatten(0, 1)
    return pages


def table_for(batch, keys, page_size):
    count = batch * -(-keys // page_size)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0)).view(batch, -1)


@pytest.fixture
def only_the_kernel(monkeypatch):
    """Fails where a call is composed instead."""

    def composed(*args, **kwargs):
        raise AssertionError("the kernel did not take this call")

    monkeypatch.setattr(import_module("bigmodel_kernels.ops.attention_decode.torch_op"), "attention", composed)


def check_error_rule(decode, shape, name, dtype, seed):
    """By `decode`: the error rule, and pages, whose size goes by the seed, equal to one piece to the bit."""
    q, k, v, lengths = drawn(shape, dtype, seed)
    exact = apart(*(t.double() for t in (q, k, v)), lengths, OPTIONS[name], "torch")
    stock = apart(q, k, v, lengths, OPTIONS[name], "torch")
    page_size = (1, 5, 16)[seed]
    table = table_for(len(lengths), k.shape[2], page_size)
    pages = [in_pages(t, page_size, table) for t in (k, v)]
    out, lse = decode(q, k, v, lengths, OPTIONS[name])
    assert_matches(out, exact[0], stock[0], dtype=dtype)
    lucky = None if k.shape[2] == 1 else stock[1]  # of one number PyTorch's error may be anything down to 0
    assert_matches(lse, exact[1], lucky, dtype=lse.dtype, magnitude=1.0)  # what counts is e^lse
    paged = decode(q, *pages, lengths, OPTIONS[name], block_table=table.int())
    assert torch.equal(paged[0], out)
    assert torch.equal(paged[1], lse)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_error_rule(shape, name, dtype, seed, only_the_kernel):
    check_error_rule(decode, shape, name, dtype, seed)


@pytest.mark.parametrize("layout", ["heads_inside", "every_second", "transposed", "expanded"])
def test_strides(layout, only_the_kernel):
    q, k, v, lengths = drawn((2, 4, 2, 1, 50, 32, 32), torch.float32, 0)
    expected = decode(q, k, v, lengths, {})
    if layout == "heads_inside":
        k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
    elif layout == "every_second":
        q, k, v = (t.repeat_interleave(2, 3)[..., ::2] for t in (q, k, v))
    elif layout == "transposed":
        k, v = (t.mT.contiguous().mT for t in (k, v))
    else:
        k, v = (t[:1].expand(2, -1, -1, -1) for t in (k, v))
        expected = decode(q, k.contiguous(), v.contiguous(), lengths, {})
    assert all(torch.equal(a, b) for a, b in zip(decode(q, k, v, lengths, {}), expected))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_every_code_of_a_cache_of_8_bits(dtype, only_the_kernel):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    codes = codes[codes.float().isfinite()]
    v = codes.view(1, 1, -1, 1).expand(-1, -1, -1, 16).contiguous()
    k = torch.zeros(v.shape).to(dtype)
    for i in range(0, codes.numel(), 29):  # with one key, its value is the result
        one = [t[:, :, i : i + 1] for t in (k, v)]
        out = bmk.attention_decode(torch.ones(1, 1, 1, 16), *one, torch.tensor([1]), k_scale=1.0, v_scale=0.5)
        assert (out == codes[i].float() * 0.5).all()
    mean = bmk.attention_decode(torch.ones(1, 1, 1, 16), k, v, torch.tensor([codes.numel()]), k_scale=1.0, v_scale=1.0)
    torch.testing.assert_close(mean[0, 0, 0], codes.double().mean().float().expand(16), rtol=1e-5, atol=1e-5)


def test_a_nan_of_fp8_stays_one(only_the_kernel):
    v = torch.full((1, 1, 1, 16), math.nan).to(torch.float8_e4m3fn)
    out = bmk.attention_decode(torch.ones(1, 1, 1, 16), v.float().zero_().to(v.dtype), v, torch.tensor([1]))
    assert out.isnan().all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("queries", [1, 3])
def test_what_is_left_out_never_leaks(value, queries, only_the_kernel):
    q, k, v, _ = drawn((1, 4, 2, queries, 64, 32, 32), torch.float32, 0)
    expected = decode(q, k, v, [60], {"is_causal": True, "window": (20, 0)})
    k[:, :, 60:], v[:, :, 60:] = value, value
    k[:, :, : 60 - 20 - queries], v[:, :, : 60 - 20 - queries] = value, value
    found = decode(q, k, v, [60], {"is_causal": True, "window": (20, 0)})
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    k[:, :, 59], v[:, :, 59] = value, value  # the last query alone attends to it
    out, _ = decode(q, k, v, [60], {"is_causal": True, "window": (20, 0)})
    assert torch.equal(out[:, :, :-1], expected[0][:, :, :-1])
    assert not out[:, :, -1].isfinite().any()


def test_an_empty_sequence_gives_zero(only_the_kernel):
    q, k, v, _ = drawn((2, 4, 2, 1, 20, 32, 32), torch.float32, 0)
    out, lse = decode(q, k, v, [0, 20], {})
    assert not out[0].any()
    assert (lse[0] == -math.inf).all()
    assert lse[1].isfinite().all()


@pytest.mark.parametrize("batch", [1, 3])
def test_the_same_for_any_number_of_threads(batch, only_the_kernel):
    q, k, v, lengths = drawn((batch, 8, 1, 1, 3000, 64, 64), torch.float32, 0)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(decode(q, k, v, lengths, {})[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_few_rows_of_attention_have_masks_and_dropout():
    q, k, v, _ = drawn((2, 8, 1, 1, 200, 64, 64), torch.float32, 0)
    mask = make(2, 8, 1, 200, seed=9)
    mask[0, :, :, 50:90] = -math.inf
    k[0, :, 60], v[0, :, 60] = math.nan, math.inf
    clean = [t.nan_to_num(0, 0, 0) for t in (k, v)]
    found = bmk.attention(q, k, v, attn_mask=mask, enable_gqa=True, backend="cpu")
    exact = bmk.attention(*(t.double() for t in (q, *clean)), attn_mask=mask.double(), enable_gqa=True, backend="torch")
    stock = bmk.attention(q, *clean, attn_mask=mask, enable_gqa=True, backend="torch")
    assert_matches(found, exact, stock, dtype=torch.float32)
    # Dropout leaves out the same entries whatever tiling meets them: rows of 17 queries are packed, the first 2 read in place.
    q, k, v, _ = drawn((1, 1, 1, 17, 200, 64, 64), torch.float32, 0)
    torch.manual_seed(3)
    many = bmk.attention(q, k, v, dropout_p=0.4, backend="cpu")
    torch.manual_seed(3)
    few = bmk.attention(q[:, :, :2], k, v, dropout_p=0.4, backend="cpu")
    torch.testing.assert_close(few, many[:, :, :2], rtol=1e-5, atol=1e-6)


def test_what_the_kernel_leaves_to_attention():
    q, k, v, lengths = drawn((2, 4, 2, 1, 20, 32, 32), torch.float32, 0)

    def op(q):
        found = bmk.explain(bmk.attention_decode, q, k, v, torch.tensor(lengths))
        return found.calls[0].op, found.backend

    assert op(q) == ("attention_decode", "cpu")
    assert op(q.clone().requires_grad_()) == ("attention", "cpu")
    with torch.no_grad():
        assert op(q.clone().requires_grad_()) == ("attention_decode", "cpu")
    assert op(make(2, 34, 1, 32))[0] == "attention"  # 17 rows of a key head
    with torch.autocast("cpu", torch.bfloat16):
        assert op(q)[0] == "attention"
    with bmk.use_backend("torch"):
        assert op(q) == ("attention", "torch")


def compiled_operators(call, *inputs):
    """What torch.compile's graph of a call without gradients calls, and its results."""
    graphs = []

    def look(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        results = torch.compile(call, fullgraph=True, dynamic=True, backend=look)(*inputs)
    return graphs[0], results


def test_compiled_it_is_one_operator():
    q, k, v, lengths = drawn((2, 8, 2, 1, 70, 32, 32), torch.float32, 0)

    def call(q, k, v, lengths):
        return bmk.attention_decode(q, k, v, lengths, return_lse=True)

    operators, found = compiled_operators(call, q, k, v, torch.tensor(lengths))
    assert all(torch.equal(a, b) for a, b in zip(found, call(q, k, v, torch.tensor(lengths))))
    assert torch.ops.bigmodel_kernels.attention_decode.default in operators


def test_opcheck():
    op = torch.ops.bigmodel_kernels.attention_decode.default
    q, k, v, lengths = drawn((2, 4, 2, 1, 20, 32, 32), torch.float32, 0)
    unscaled = (None, None, torch.tensor(lengths), None, None, 0.2, 0.0, -1, -1, True, "cpu")
    torch.library.opcheck(op, (q, k, v, *unscaled))
    torch.library.opcheck(op, (q, k.mT.contiguous().mT, v.mT.contiguous().mT, *unscaled))
