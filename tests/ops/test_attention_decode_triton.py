"""The Triton kernel of bmk.attention_decode: interpreted against float64, contiguous and paged, in several shares of the keys;
compiled for GPUs not at hand."""

import math
import re

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels import _triton, _tuned
from bigmodel_kernels.ops.attention_decode import torch_op, triton_configs, triton_kernels
from bigmodel_kernels.ops.attention_decode.op import prepare
from bigmodel_kernels.testing import assert_matches
from tests.ops.test_attention_decode import (
    OPTIONS,
    SHAPES,
    apart,
    check_error_rule,
    compiled_operators,
    drawn,
    slopes,
)
from tests.ops.test_attention_triton_compile import innermost_loops
from tests.triton_aot import SHARED_LIMIT, compiling
from tests.triton_interpreter import interpreted

ALL = SHAPES | {  # more rows than a tile has, and large head dimensions
    "two_tiles": (1, 40, 1, 1, 70, 32, 32),
    "wide": (1, 4, 2, 3, 50, 200, 256),
    "long": (1, 8, 1, 1, 400, 64, 64),
}


class in_shares:
    """In the block keys are split into `splits` shares, and no call is composed."""

    def __init__(self, splits):
        self.splits = splits

    def __enter__(self):
        self.before = triton_kernels.splits_for, torch_op.attention
        triton_kernels.splits_for, torch_op.attention = lambda *sizes: self.splits, None
        _tuned.forget()

    def __exit__(self, *exception):
        triton_kernels.splits_for, torch_op.attention = self.before
        _tuned.forget()


def decode(q, k, v, lengths, options, **more):
    options = dict(options)
    if options.pop("alibi", False):
        options["alibi_slopes"] = slopes(q)
    return bmk.attention_decode(q, k, v, torch.tensor(lengths), return_lse=True, backend="triton", **options, **more)


def check(shape, name, dtype, seed):
    for splits in (1, 3):
        with in_shares(splits):
            check_error_rule(decode, shape, name, dtype, seed)


CASES = [
    *((shape, name, torch.float32, number % 3) for number, shape in enumerate(ALL) for name in ("plain", "window")),
    *((shape, name, torch.float16, seed) for seed, shape in enumerate(("eight_rows", "queries")) for name in OPTIONS),
    *(("queries", name, torch.float32, seed) for name in ("causal", "alibi", "softcap") for seed in (0, 1, 2)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_rule(case):
    shape, name, dtype, seed = case
    interpreted(check, ALL[shape], name, dtype, seed)


def check_leaks(value, queries):
    options = {"is_causal": True, "window": (20, 0)}
    q, k, v, _ = drawn((1, 4, 2, queries, 64, 32, 32), torch.float32, 0)
    for splits in (1, 2):
        with in_shares(splits):
            expected = decode(q, k, v, [60], options)
            hidden = [t.clone() for t in (k, v)]
            for t in hidden:
                t[:, :, 60:], t[:, :, : 60 - 20 - queries] = value, value
            assert all(torch.equal(a, b) for a, b in zip(decode(q, *hidden, [60], options), expected))
            for t in hidden:
                t[:, :, 59] = value  # the last query alone attends to it
            out, _ = decode(q, *hidden, [60], options)
            assert torch.equal(out[:, :, :-1], expected[0][:, :, :-1])
            assert not out[:, :, -1].isfinite().any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("queries", [1, 3])
def test_what_is_left_out_never_leaks(value, queries):
    interpreted(check_leaks, value, queries)


def check_lengths():
    q, k, v, _ = drawn((4, 4, 2, 2, 40, 32, 32), torch.float32, 0)
    for splits in (1, 3):
        with in_shares(splits):
            out, lse = decode(q, k, v, [0, 1, 40, 33], {"is_causal": True})
        assert not out[0].any()
        assert not out[1, :, 0].any()  # the first of two queries stands before the only key
        assert (lse[0] == -math.inf).all()
        assert (lse[1, :, 0] == -math.inf).all()
        assert lse[2:].isfinite().all()


def test_rows_without_keys_give_zero():
    interpreted(check_lengths)


def check_strides(layout):
    q, k, v, lengths = drawn((2, 4, 2, 1, 50, 32, 32), torch.float32, 0)
    tensors = {
        "heads_inside": [q, *(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))],
        "every_second": [t.repeat_interleave(2, 3)[..., ::2] for t in (q, k, v)],
        "transposed": [t.mT.contiguous().mT for t in (q, k, v)],
    }[layout]
    with in_shares(2):
        found, expected = decode(*tensors, lengths, {}), decode(q, k, v, lengths, {})
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("layout", ["heads_inside", "every_second", "transposed"])
def test_strides(layout):
    interpreted(check_strides, layout)


def check_left_to_attention():
    q, k, v, lengths = drawn((2, 4, 2, 1, 20, 32, 32), torch.float32, 0)
    for cache, options in ((k.half(), {}), (k, {"scale": -0.5})):  # another dtype, a negative scale
        args = prepare(q, cache, cache, torch.tensor(lengths), **options)
        assert triton_kernels.supports(*args) is not None
    composed, _ = decode(q, k, v, lengths, {"scale": -0.5})
    exact = apart(*(t.double() for t in (q, k, v)), lengths, {"scale": -0.5}, "torch")
    assert_matches(composed, exact[0], None, dtype=torch.float32)
    q.requires_grad_()
    out, _ = decode(q, k, v, lengths, {})  # composed, with its gradient
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert grad.isfinite().all()


def test_what_the_kernel_leaves_to_attention():
    interpreted(check_left_to_attention)


def check_far_keys():
    """Keys past 2^31 numbers give what near ones give; memory that nothing touches costs nothing."""
    q, k, v, _ = drawn((1, 2, 1, 1, 16, 32, 32), torch.float16, 0)
    expected = decode(q, k, v, [16], {})
    pages = 2**31 // (16 * 32) + 1
    far = [torch.empty(pages, 1, 16, 32, dtype=torch.float16) for _ in range(2)]
    for pool, t in zip(far, (k, v)):
        pool[-1] = t[0]
    found = decode(q, *far, [16], {}, block_table=torch.tensor([[pages - 1]], dtype=torch.int32))
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def check_compiled():
    q, k, v, lengths = drawn((1, 4, 2, 1, 40, 16, 16), torch.float32, 0)

    def call(q, k, v, lengths):
        return bmk.attention_decode(q, k, v, lengths, return_lse=True, backend="triton")

    operators, found = compiled_operators(call, q, k, v, torch.tensor(lengths))
    assert all(torch.equal(a, b) for a, b in zip(found, call(q, k, v, torch.tensor(lengths))))
    assert torch.ops.bigmodel_kernels.attention_decode.default in operators


def test_compiled_it_is_one_operator():
    interpreted(check_compiled)


def test_pages_past_two_to_the_31_numbers():
    interpreted(check_far_keys)


# Registers and bytes of shared memory that the compiler may use, by element size of queries and caches and head dimension, under
# Triton 3.6 and 3.7.
BUDGET = {
    (2, 2, 64): (168, 40 << 10),
    (2, 2, 128): (184, 46 << 10),
    (2, 2, 256): (224, 44 << 10),
    (4, 4, 64): (232, 32 << 10),
    (4, 4, 128): (240, 60 << 10),
    (4, 4, 256): (248, 68 << 10),
    (2, 1, 64): (168, 16 << 10),
    (2, 1, 128): (224, 20 << 10),
    (2, 1, 256): (248, 28 << 10),
    (4, 1, 64): (255, 20 << 10),
    (4, 1, 128): (255, 36 << 10),
    (4, 1, 256): (255, 44 << 10),
}


def compile_decode(gpu, monkeypatch, dtype, head_dim, rows=8, paged=True, queries=1, cache_dtype=None, **options):
    q = torch.empty(2, 2 * rows // queries, queries, head_dim, dtype=dtype)
    cache = torch.empty(8, 2, 2048, head_dim, dtype=cache_dtype or dtype)
    table = torch.zeros(2, 4, dtype=torch.int32)
    if not paged:
        cache, table = cache[:2], None
    if cache_dtype is not None:
        options |= {"k_scale": torch.ones(cache.shape[:3]), "v_scale": torch.ones(cache.shape[:3])}
    monkeypatch.setattr(_triton, "reason", lambda t: None)
    monkeypatch.setattr("bigmodel_kernels._registry.availability", lambda op, backend: None)
    with compiling(gpu, monkeypatch) as binaries:
        bmk.attention_decode(q, cache, cache, torch.ones(2).int(), block_table=table, backend="triton", **options)
    (binary,) = binaries
    return binary


def check_budget(binary, dtype, head_dim, cache_dtype=None):
    registers, shared = BUDGET[dtype.itemsize, (cache_dtype or dtype).itemsize, head_dim]
    local = [sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in body) for body in innermost_loops(binary.sass)]
    assert sum(local) == 0, (binary, local)
    assert binary.spills <= 8, binary  # of what is needed only after the loop
    assert binary.registers <= registers, binary
    assert binary.shared <= min(shared, SHARED_LIMIT["sm_86"]), binary
    assert re.search(r"LDGSTS\S*\.128\b", binary.sass), (
        binary
    )  # keys and values come past the registers, 16 bytes at a time
    assert re.search(r"\bFFMA" if dtype == torch.float32 else r"\bHMMA", binary.sass), binary


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", triton_configs.TABLE[2])
@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
def test_kernel_compiles_within_its_budget(gpu, head_dim, dtype, monkeypatch):
    heights = triton_configs.HEIGHTS[dtype.itemsize]
    for rows in heights if head_dim == 128 else heights[:1]:
        check_budget(compile_decode(gpu, monkeypatch, dtype, head_dim, rows), dtype, head_dim)


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", triton_configs.TABLE_8_BITS[2])
@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
def test_kernel_of_8_bits_compiles_within_its_budget(gpu, head_dim, dtype, cache_dtype, monkeypatch):
    heights = triton_configs.HEIGHTS[dtype.itemsize]
    for rows in heights if head_dim == 128 else heights[:1]:
        binary = compile_decode(gpu, monkeypatch, dtype, head_dim, rows, cache_dtype=cache_dtype)
        check_budget(binary, dtype, head_dim, cache_dtype)
        converts = gpu == "sm_90" and cache_dtype == torch.float8_e4m3fn  # by an instruction of its own
        assert bool(re.search(r"\bF2FP\S*E4M3", binary.sass)) == converts, binary


@pytest.mark.parametrize(
    "options",
    [
        {"paged": False},
        {"queries": 4, "is_causal": True, "window": (100, 0)},
        {"softcap": 20.0, "alibi_slopes": torch.ones(16)},
    ],
    ids=["contiguous", "masked", "scores"],
)
def test_other_calls_compile_within_the_budget(options, monkeypatch):
    check_budget(compile_decode("sm_90", monkeypatch, torch.float16, 64, **options), torch.float16, 64)
