"""bmk.attention_varlen on attention's Triton kernels, interpreted on the CPU: each sequence by the error rule.

The kernels' arithmetic is tested in test_attention_triton.py, their code in test_attention_triton_compile.py.
"""

import math
import tempfile
import unittest.mock

import numpy as np
import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels import _triton
from bigmodel_kernels.ops.attention import triton_tile
from bigmodel_kernels.ops.attention_varlen import reference, triton_kernels
from bigmodel_kernels.testing import assert_matches, make
from tests.ops.attention_problem import NAMES, Sequences
from tests.ops.test_attention_varlen import FLAGS_HERE, LENGTHS, SIZES, WRONG_ENDS
from tests.triton_interpreter import interpreted

# Nothing, less than a tile, a tile of 32 and one more; first and last are the ends of what a tile must not read.
ODD = [(0, 3), (33, 31), (3, 5), (0, 0), (32, 64), (5, 0), (1, 40)]


def check(lengths, sizes, flags, dtype=torch.float32, **options):
    Sequences(lengths, sizes, flags, dtype, **options).check("triton", baseline=dtype == torch.float16)


@pytest.mark.parametrize("flags", FLAGS_HERE)
def test_matches_float64(flags):
    interpreted(check, ODD, SIZES[0], flags)


@pytest.mark.parametrize("sizes", SIZES[1:], ids=str)
@pytest.mark.parametrize("lengths", ["one", "some", "alike"])
def test_matches_float64_for_other_sizes(lengths, sizes):
    interpreted(check, LENGTHS[lengths], sizes, "causal")


@pytest.mark.parametrize("flags", FLAGS_HERE)
def test_float16_matches_float64(flags):
    interpreted(check, [(20, 20), (0, 1), (35, 40)], SIZES[2], flags, torch.float16)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("layout", ["packed", "heads first"])
def test_any_layout_and_seed(layout, seed):
    interpreted(check, LENGTHS["some"], SIZES[0], "alibi", seed=seed, layout=layout)


def arguments(lengths, sizes=SIZES[0], flags="causal_lower", dtype=torch.float32, dropout_p=0.0, **options):
    """The flat arguments of a call, and the seed of its dropout among them."""
    problem = Sequences(lengths, sizes, flags, dtype)
    args = bmk.attention_varlen.prepare(
        *problem.tensors, *problem.cu_seqlens, *problem.longest, dropout_p=dropout_p, **(problem.options | options)
    )
    return [*args[:6], torch.tensor([2**61 + 12345]), *args[7:]]


def results(args, module=triton_kernels):
    """out, lse, dq, dk, dv."""
    out, lse = module.fwd(*args)
    grads = (make(*out.shape, dtype=out.dtype, seed=3), torch.where(torch.isfinite(lse), make(*lse.shape, seed=4), 0.0))
    kept = () if module is reference else (None,)
    return [out, lse, *module.bwd(*grads, out, lse, *kept, *args)]


def compare(args):
    """The results with those that the reference gives in float64."""
    wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args]
    for i, (name, a, e) in enumerate(zip(NAMES, results(args), results(wide, reference))):
        assert torch.equal(torch.isinf(a), torch.isinf(e))
        a, e = a[torch.isfinite(e)], e[torch.isfinite(e)]
        dtype = torch.float32 if i == 1 else args[0].dtype
        assert_matches(a, e, None, dtype=dtype, gradient=i > 1, magnitude=0.1, name=name)


def check_dropout(dropout_p, dtype):
    compare(arguments([(20, 70), (0, 3), (35, 33)], dtype=dtype, dropout_p=dropout_p))


@pytest.mark.parametrize("dropout_p", [0.4, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_dropout_drops_what_the_reference_drops(dtype, dropout_p):
    interpreted(check_dropout, dropout_p, dtype)


def check_scale(scale):
    compare(arguments(LENGTHS["some"], scale=scale))


@pytest.mark.parametrize("scale", [-0.4, 0.0])
def test_any_scale(scale):
    interpreted(check_scale, scale)


def check_many(probes):
    """Sequences found in several steps, most of them hold nothing."""
    lengths = np.random.default_rng(probes).integers(-20, 9, (50, 2)).clip(0).tolist()
    number = triton_kernels.PROBES.__class__(probes)
    with (
        unittest.mock.patch.object(triton_kernels, "PROBES", number),
        unittest.mock.patch.object(triton_tile, "PROBES", number),
    ):
        assert triton_kernels._steps(len(lengths)) == 6 // (probes.bit_length() - 1)
        compare(arguments([*lengths, (35, 40), (0, 0)], (1, 1, 4, 4), "causal"))


@pytest.mark.parametrize("probes", [4, 8])
def test_many_sequences(probes):
    interpreted(check_many, probes)


@pytest.mark.parametrize(
    ("sequences", "steps"), [(0, 1), (1, 1), (128, 1), (129, 2), (2**14, 2), (2**14 + 1, 3), (2**21, 3)]
)
def test_steps_in_which_a_sequence_is_found(sequences, steps):
    assert triton_kernels._steps(sequences) == steps


def check_leaks(bad, flags):
    args = arguments(ODD, flags=flags)
    clean = results(args)
    ends = args[3], args[4]
    for t, of_t in zip(args[:3], (ends[0], ends[1], ends[1])):
        t[of_t[1] : of_t[2]] = bad
    for i, (name, a, e) in enumerate(zip(NAMES, results(args), clean)):
        of_a = ends[i > 2]
        before, bad_ones, after = (t.transpose(0, 1) if i == 1 else t for t in (a, a, a))
        expected = e.transpose(0, 1) if i == 1 else e
        assert torch.equal(before[: of_a[1]], expected[: of_a[1]]), name
        assert torch.equal(after[of_a[2] :], expected[of_a[2] :]), name
        assert not torch.equal(bad_ones, expected), name


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("flags", ["plain", "causal"])
def test_sequences_do_not_touch_each_other(bad, flags):
    interpreted(check_leaks, bad, flags)


def check_other_longest():
    """max_seqlen only says how many heads run together."""
    args = arguments(ODD)
    for a, b in zip(results(args), results([*args[:7], 1 << 30, 1 << 30, *args[9:]])):
        assert torch.equal(a, b)


def test_results_do_not_depend_on_the_longest():
    interpreted(check_other_longest)


def check_wrong_ends(ends, longest, message):
    q, ends = make(3, 4, 8), torch.tensor(ends)
    with pytest.raises(RuntimeError, match=message):
        bmk.attention_varlen(q, q, q, ends, ends, longest, 9, backend="triton")


@pytest.mark.parametrize(("ends", "longest", "message"), WRONG_ENDS)
def test_lengths_that_do_not_fit_are_told(ends, longest, message):
    interpreted(check_wrong_ends, ends, longest, message)


def check_clamped(ends):
    """Where nobody looks at cu_seqlens first, as on a GPU, memory around the tensors is neither read nor written."""
    args = arguments([(20, 20), (15, 15)], flags="plain")
    guard = 64

    def guarded(*shape, fill):
        rows = torch.full((shape[0] + 2 * guard, *shape[1:]), fill)
        return rows, rows[guard:-guard]

    args[:3] = [guarded(*t.shape, fill=math.nan)[1].copy_(t) for t in args[:3]]
    args[3] = args[4] = torch.tensor(ends)
    stored = []

    def empty(t, *shape, **options):
        if shape == (0,):  # the interpreter's own
            return torch.empty(0)
        whole, inside = guarded(*(shape[0] if isinstance(shape[0], torch.Size) else shape), fill=7.0)
        stored.append(whole)
        return inside

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_triton, "INTERPRETED", False)
        patch.setattr(torch.Tensor, "new_empty", empty)
        found = results(args)
    assert len(stored) == 5
    for whole in stored:
        assert (whole[:guard] == 7).all()
        assert (whole[-guard:] == 7).all()
        assert not whole.isnan().any()
    assert len(found) == 5


@pytest.mark.parametrize(
    "ends", [[0, 99, 35], [-5, 10, 35], [0, 20, 1000], [9, 4, 0], [30, 2, 60], [-(2**40), 2**40, 3]]
)
def test_lengths_that_do_not_fit_touch_no_other_memory(ends):
    interpreted(check_clamped, ends)


def check_offsets(what):
    """Tokens of `what` are 2^29 elements apart: 32-bit offsets would wrap around."""
    args = arguments([(2, 1), (3, 4)], (1, 1, 4, 4), dtype=torch.float16)
    expected = results(args)
    with tempfile.TemporaryFile() as file:  # with holes, of which only what is touched takes memory
        whole = torch.from_numpy(np.memmap(file, np.float16, "w+", shape=((1 << 32) + 16,)))
        args[what] = whole.as_strided(args[what].shape, (1 << 29, 4, 1)).copy_(args[what])
        for name, a, e in zip(NAMES, results(args), expected):
            assert torch.equal(a, e), name


@pytest.mark.parametrize("what", [0, 1, 2], ids=["q", "k", "v"])
def test_offsets_beyond_32_bits(what):
    interpreted(check_offsets, what)


def check_nothing():
    q, k, ends = torch.zeros(0, 4, 8, requires_grad=True), torch.zeros(0, 2, 8), torch.tensor([0])
    out = bmk.attention_varlen(q, k, k, ends, ends, 0, 0, enable_gqa=True, backend="triton")
    assert out.shape == (0, 4, 8)
    assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape


def test_no_sequences():
    interpreted(check_nothing)


def check_refusals():
    ends = torch.tensor([0, 4])
    for dtype, width, message in (
        (torch.bfloat16, 16, "interpreter has no bfloat16"),
        (torch.float64, 16, "float32, float16 and bfloat16"),
        (torch.float32, 257, "head dimensions up to 256"),
    ):
        q = torch.zeros(4, 1, width, dtype=dtype)
        with pytest.raises(RuntimeError, match=message):
            bmk.attention_varlen(q, q, q, ends, ends, 4, 4, backend="triton")


def test_refusals_name_the_reason():
    interpreted(check_refusals)


def check_one_operator():
    q, ends = make(12, 2, 8), torch.tensor([0, 5, 12])
    compiled = torch.compile(bmk.attention_varlen, fullgraph=True, dynamic=True, backend="aot_eager")
    found, expected = (
        f(q, q, q, ends, ends, 7, 7, is_causal=True, backend="triton") for f in (compiled, bmk.attention_varlen)
    )
    assert torch.equal(found, expected)


def test_compiled_code_means_the_same():
    interpreted(check_one_operator)
