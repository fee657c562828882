"""bmk.attention_varlen: each sequence by the error rule, as bmk.attention gives it alone."""

import math

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.ops.attention_varlen import reference, torch_op
from bigmodel_kernels.testing import make, relative_l2
from tests.ops.attention_problem import FLAGS, Sequences

FLAGS_HERE = [name for name, options in FLAGS.items() if "mask" not in options]
# Nothing, one, few and many rows, and lengths below, at and above tiles of rows and blocks of keys.
LENGTHS = {
    "one": [(5, 7)],
    "some": [(3, 5), (0, 4), (9, 7), (4, 0), (1, 1)],
    "few and many": [(64, 64), (2, 3), (65, 193), (1, 200), (200, 66)],
    "alike": [(32, 32)] * 5,
    "long": [(150, 150), (3, 3), (400, 400)],
}
SIZES = [(4, 2, 8, 6), (2, 2, 64, 64), (3, 1, 17, 33)]


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch._dynamo.reset()


@pytest.mark.parametrize("flags", FLAGS_HERE)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_matches_float64(lengths, sizes, flags):
    Sequences(LENGTHS[lengths], sizes, flags).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("flags", ["plain", "causal_lower", "alibi"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_other_dtypes_match_float64(lengths, flags, dtype):
    Sequences(LENGTHS[lengths], SIZES[1], flags, dtype).check()


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("layout", ["packed", "heads first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_layout_and_seed(dtype, layout, seed):
    Sequences(LENGTHS["few and many"], SIZES[0], "causal", dtype, seed=seed, layout=layout).check()


@pytest.mark.parametrize(("flags", "seed"), [("plain", 6), ("plain", 18), ("causal", 6), ("causal", 18)])
def test_gradients_of_few_keys_are_not_those_of_a_rounded_output(flags, seed):
    Sequences([(2, 2), (3, 3), (40, 2), (3, 2)], (2, 2, 16, 16), flags, torch.bfloat16, seed).check()


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("flags", FLAGS_HERE)
def test_torch_backend_and_compiled_code_mean_the_same(flags, compiled, backend):
    problem = Sequences(LENGTHS["some"], SIZES[0], flags, torch.float64)
    if compiled:
        call = problem.call
        problem.call = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    problem.check(backend, baseline=False)


def test_compiled_code_serves_other_lengths():
    compiled = torch.compile(bmk.attention_varlen, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (3, 8, 21):
        q, ends = make(2 * n + 1, 2, 8).requires_grad_(), torch.tensor([0, n, 2 * n + 1])
        found, expected = (
            f(q, q, q, ends, ends, n + 1, n + 1, is_causal=True) for f in (compiled, bmk.attention_varlen)
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        grads = (torch.autograd.grad(out, q, torch.ones_like(out))[0] for out in (found, expected))
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)


def test_a_call_is_one_operator_in_a_graph():
    q, ends = make(12, 2, 8), torch.tensor([0, 5, 12])
    exported = torch.export.export(_Module(), (q, ends), strict=True)
    called = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert torch.ops.bigmodel_kernels.attention_varlen_fwd.default in called
    assert not any("attention" in str(t) or "matmul" in str(t) for t in called if "varlen" not in str(t))


class _Module(torch.nn.Module):
    def forward(self, q, ends):
        return bmk.attention_varlen(q, q, q, ends, ends, 7, 7, is_causal=True)


def _arguments(dtype=torch.float64, dropout_p=0.0, **options):
    problem = Sequences(LENGTHS["some"], SIZES[0], "causal", dtype)
    args = bmk.attention_varlen.prepare(
        *problem.tensors, *problem.cu_seqlens, *problem.longest, dropout_p=dropout_p, **problem.options, **options
    )
    return [*args[:6], torch.tensor([2**61 + 12345]), *args[7:]]


@pytest.mark.parametrize("dropout_p", [0.0, 0.4, 1.0])
def test_reference_backward_is_what_autograd_gives(dropout_p):
    args = _arguments(dropout_p=dropout_p)
    inputs = [t.requires_grad_() for t in args[:3]]
    out, lse = reference.fwd(*args)
    finite = torch.isfinite(lse)
    grad_out, grad_lse = make(*out.shape, dtype=out.dtype), torch.where(finite, make(*lse.shape, dtype=lse.dtype), 0.0)
    expected = torch.autograd.grad([out, torch.where(finite, lse, 0.0)], inputs, [grad_out, grad_lse])
    for a, e in zip(reference.bwd(grad_out, grad_lse, out, lse, *args), expected):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("dropout_p", [0.4, 1.0])
def test_dropout_follows_its_seed(dropout_p, backend):
    args = _arguments(dropout_p=dropout_p)
    op, (out, lse) = bmk.attention_varlen.op, reference.fwd(*args)
    found = op.fwd(*args, backend)
    for a, e in zip(found, (out, lse)):
        torch.testing.assert_close(a, e)
    grad = make(*out.shape, dtype=out.dtype)
    for a, e in zip(op.bwd(grad, None, *found, None, *args, backend), reference.bwd(grad, None, out, lse, *args)):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(transposed):
    args = _arguments(torch.float32, return_lse=True)
    if transposed:
        args[:3] = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in args[:3]]
    args[:3] = [t.requires_grad_() for t in args[:3]]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.bigmodel_kernels.attention_varlen_fwd, (*args, "cpu"), test_utils=checks)
    with torch.no_grad():
        out, lse = bmk.attention_varlen.op.fwd(*args, "cpu")
    backward = (torch.ones_like(out), None, out, lse, None, *args, "cpu")
    torch.library.opcheck(torch.ops.bigmodel_kernels.attention_varlen_bwd, backward, test_utils=checks)


def test_gradients_and_their_gradients():
    problem = Sequences([(3, 4), (0, 2), (2, 2)], (2, 1, 3, 2), "softcap", torch.float64)
    inputs = [t.requires_grad_() for t in problem.tensors]
    both = lambda *tensors: problem.call(*tensors, return_lse=True, backend="cpu")  # noqa: E731
    assert torch.autograd.gradcheck(both, inputs)
    assert torch.autograd.gradgradcheck(both, inputs)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_sequences_do_not_touch_each_other(bad):
    problem = Sequences(LENGTHS["few and many"], SIZES[1], "plain")
    clean = problem.run()
    starts = [ends[2] for ends in problem.cu_seqlens]
    stops = [ends[3] for ends in problem.cu_seqlens]
    problem.tensors[1][starts[1] : stops[1]] = bad
    problem.tensors[2][starts[1] : stops[1]] = bad
    for b, (a, e) in enumerate(zip(problem.run(), clean)):
        same = all(torch.equal(x, y) for x, y in zip(a, e))
        assert same == (b != 2)


def test_no_sequences():
    q, k = torch.zeros(0, 4, 8, requires_grad=True), torch.zeros(0, 2, 8)
    ends = torch.tensor([0])
    for backend in ("auto", "torch"):
        out = bmk.attention_varlen(q, k, k, ends, ends, 0, 0, enable_gqa=True, backend=backend)
        assert out.shape == (0, 4, 8)
        assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape


def test_one_head_of_q_or_k_serves_all_of_the_other():
    one, many, ends = make(7, 1, 8), make(7, 4, 8, seed=1), torch.tensor([0, 3, 7])
    for q, k in ((one, many), (many, one)):
        expected = bmk.attention_varlen(q.expand(-1, 4, -1), *[k.expand(-1, 4, -1)] * 2, ends, ends, 4, 4)
        torch.testing.assert_close(bmk.attention_varlen(q, k, k, ends, ends, 4, 4), expected)


def test_autocast_casts():
    q, ends = make(7, 2, 8), torch.tensor([0, 3, 7])
    with torch.autocast("cpu", torch.bfloat16):
        out = bmk.attention_varlen(q, q, q, ends, ends, 4, 4)
    assert out.dtype == torch.bfloat16
    assert relative_l2(out, bmk.attention_varlen(q, q, q, ends, ends, 4, 4)) < 0.01


def test_explain_names_the_backend():
    q, ends = make(7, 2, 8), torch.tensor([0, 3, 7])
    assert bmk.explain(bmk.attention_varlen, q, q, q, ends, ends, 4, 4).backend == "cpu"


Q, ENDS_Q, ENDS_K = make(3, 4, 8), torch.tensor([0, 3, 3, 12]), torch.tensor([0, 5, 9, 16])
ERRORS = [
    (lambda: bmk.attention_varlen(Q[0], Q, Q, ENDS_Q, ENDS_K, 9, 7), RuntimeError, "q must have 3 dimensions"),
    (lambda: bmk.attention_varlen(1, Q, Q, ENDS_Q, ENDS_K, 9, 7), TypeError, "q must be a tensor"),
    (lambda: bmk.attention_varlen(Q.long(), Q, Q, ENDS_Q, ENDS_K, 9, 7), RuntimeError, "q must have a floating dtype"),
    (
        lambda: bmk.attention_varlen(Q, Q.double(), Q, ENDS_Q, ENDS_K, 9, 7),
        RuntimeError,
        "k must be torch.float32 on cpu",
    ),
    (lambda: bmk.attention_varlen(Q, Q, Q, ENDS_Q.float(), ENDS_K, 9, 7), TypeError, "cu_seqlens_q must be"),
    (lambda: bmk.attention_varlen(Q, Q, Q, torch.tensor([0, 3]), ENDS_K, 9, 7), RuntimeError, "cu_seqlens_k must have"),
    (
        lambda: bmk.attention_varlen(Q, Q[..., :7], Q, ENDS_Q, ENDS_K, 9, 7),
        RuntimeError,
        "k must have the head dimension",
    ),
    (
        lambda: bmk.attention_varlen(Q, Q, Q[:, :2], ENDS_Q, ENDS_K, 9, 7),
        RuntimeError,
        "v must have as many heads as k, 4",
    ),
    (
        lambda: bmk.attention_varlen(Q, *[Q[:, :2]] * 2, ENDS_Q, ENDS_K, 9, 7),
        RuntimeError,
        "k must have the 4 heads of q",
    ),
    (
        lambda: bmk.attention_varlen(Q, *[Q[:, :3]] * 2, ENDS_Q, ENDS_K, 9, 7, enable_gqa=True),
        RuntimeError,
        "q must have a multiple of the 3 heads",
    ),
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


@pytest.mark.parametrize(("function", "error", "message"), ERRORS)
def test_wrong_input_is_named(function, error, message):
    with pytest.raises(error, match=message):
        function()


WRONG_ENDS = [([0, 2], 9, "rise from 0 to the 3"), ([0, 4, 3], 9, "rise from 0 to the 3"), ([1, 3], 9, "rise from 0 to the 3"),
              ([0, 3], 2, "max_seqlen_q must be at least the longest sequence, got 2")]  # fmt: skip


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(("ends", "longest", "message"), WRONG_ENDS)
def test_lengths_that_do_not_fit_are_told(ends, longest, message, backend):
    ends = torch.tensor(ends)
    with pytest.raises(RuntimeError, match=message):
        bmk.attention_varlen(Q, Q, Q, ends, ends, longest, 9, backend=backend)
    with pytest.raises(RuntimeError, match="rise from 0 to the 3"):
        bmk.attention_varlen(Q, Q, Q, torch.tensor([0, 1, 3]), torch.tensor([0, 5, 3]), 9, 9, backend=backend)


def test_torch_backend_gives_what_sdpa_gives():
    args = _arguments(torch.float32)
    out, lse = torch_op.call(*args)
    assert lse is None
    torch.testing.assert_close(out, reference.fwd(*args)[0])
