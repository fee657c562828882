"""Gradients of bmk.attention in bfloat16 where keys lie in several blocks of 192 and few of them have nearly all the weight."""

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.ops.attention import cpu
from bigmodel_kernels.ops.attention.op import REST
from bigmodel_kernels.testing import make
from tests.ops.attention_problem import Problem
from tests.rerun import rerun

SIZES = [
    (1, 2, 2, 70, 400, 24, 40),
    (2, 4, 2, 40, 450, 64, 64),  # heads that share keys
    (1, 2, 1, 8, 400, 16, 16),  # 16 rows: keys and values are read where they lie
    (1, 1, 1, 3, 900, 33, 19),
    (1, 2, 2, 20, 400, 16, 24),  # too few rows for dot products
    (1, 1, 1, 40, 1300, 64, 64),  # parts of the keys, which are merged
]
KEPT = [(0, 399), (3, 205), (191, 192, 395)]  # in two or three blocks


def check(problem):
    """The gradients by the error rule; where their terms cancel, of what float32 leaves of them and not of bfloat16."""
    actual, (exact, sizes) = problem.run(with_grad_lse=False), problem.exact(with_grad_lse=False)
    for name, a, e, size in zip(("dq", "dk", "dv"), actual[2:], exact[2:], sizes[2:], strict=True):
        error, cap = (a.double() - e).norm().item(), 6e-3 * e.norm().item() + 1e-6 * size.norm().item()
        assert error <= cap, f"{name}: {error:.1e} past {cap:.1e}"


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("scale", [1.0, 30.0, -30.0])
@pytest.mark.parametrize("flags", ["plain", "causal_lower"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_peaked_rows(sizes, flags, scale, seed):
    problem = Problem(sizes, flags, torch.bfloat16, seed)
    problem.options["scale"] = scale
    check(problem)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("keys", KEPT, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_masks_that_leave_few_keys(sizes, keys, seed):
    problem = Problem(sizes, "plain", torch.bfloat16, seed)
    problem.options["scale"] = 2.0
    problem.mask = torch.zeros(1, 1, 1, sizes[4], dtype=torch.bool)
    problem.mask[..., list(keys)] = True
    check(problem)


@pytest.mark.parametrize("softcap", [0.0, 50.0])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_with_dropout_and_softcap(dropout_p, softcap):
    q, k, v, grad = (make(1, 2, n, 32, dtype=torch.bfloat16, seed=n) for n in (60, 400, 401, 61))
    v, grad = v[:, :, :400], grad[:, :, :60]
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        torch.manual_seed(5)
        options = {"softcap": softcap, "dropout_p": dropout_p, "scale": 8.0}
        found.append(torch.autograd.grad(bmk.attention(*leaves, **options, backend="cpu"), leaves, grad.to(dtype)))
    for actual, exact in zip(*found):
        assert (actual - exact).norm() <= 6e-3 * exact.norm()


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "amx_emulated"])
def test_every_instruction_set(isa):
    if isa == "amx_emulated" and bmk.build_info()["isa"] not in ("avx512_bf16", "amx"):
        pytest.skip(f"this CPU has {bmk.build_info()['isa']}")
    rerun(__file__, "not instruction and not threads", isa)


def test_what_is_kept():
    """What rounding took from out: the lower halves of the numbers in float32."""
    q, k, v = (make(1, 2, n, 40, dtype=torch.bfloat16, seed=n) for n in (50, 300, 300))
    args = (None, None, None, 0.3, 0.0, 0.0, -1, -1, False, False, False, REST)
    out, _, rest = cpu.fwd(q, k, v, *args)
    exact = cpu.fwd(*(t.double() for t in (q, k, v)), *args)[0]
    assert rest.shape == (2, 50, 40)
    assert rest.dtype == torch.int16
    whole = ((out[0].view(torch.int16).int() << 16) + rest.int()).view(torch.float32)
    assert torch.equal(whole.bfloat16(), out[0])
    assert (whole - exact[0]).norm() < 0.7 * (out - exact).norm()


def test_nothing_is_kept_in_inference_or_in_other_types():
    inputs = [make(1, 1, 300, 16, dtype=torch.bfloat16, seed=n) for n in range(3)]
    native = torch.ops.bigmodel_native.attention_fwd
    options = (None, None, None, 0.3, 0.0, 0.0, -1, -1, False)
    assert native(*inputs, *options, False)[2] is None
    assert native(*(t.float() for t in inputs), *options, True)[2] is None


def test_results_that_are_not_finite():
    """The gradients of other rows stay, and those of theirs say so."""
    q, k, v, grad = (make(1, 1, 300, 32, dtype=torch.bfloat16, seed=n) for n in range(4))
    v[0, 0, 250, 3] = float("inf")
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = bmk.attention(*leaves, is_causal=True, backend="cpu")
    dq, _, dv = torch.autograd.grad(out, leaves, grad)
    for t in (out[0, 0, :250], dq[0, 0, :250], dv):
        assert t.isfinite().all()
    assert not dq[0, 0, 250:].isfinite().all(-1).any()


def test_the_number_of_threads_changes_no_bit():
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            problem = Problem(SIZES[1], "causal_lower", torch.bfloat16)
            problem.options["scale"] = 30.0
            found.append(problem.run())
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*found):
        assert torch.equal(a, b)
