"""The gradient of an additive mask of bmk.attention, summed over what the mask is broadcast along."""

import itertools
import math

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.ops.attention import reference
from bigmodel_kernels.testing import make
from tests.ops.attention_problem import Problem
from tests.rerun import rerun

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
BROADCAST = list(itertools.product([True, False], repeat=4))  # along batch, heads, queries, keys
SOME = [(True, True, False, False), (True, False, False, False), (False, True, True, False)]
# All keys in one block and in three, few rows and blocks of them, heads that share keys.
SIZES = [(2, 4, 2, 40, 70, 16, 16), (3, 2, 1, 75, 450, 8, 12), (1, 3, 3, 130, 200, 24, 8), (2, 2, 2, 5, 21, 8, 8)]


def problem_of(sizes, broadcast, dtype, flags="plain", seed=0):
    problem = Problem(sizes, flags, dtype, seed)
    full = (sizes[0], sizes[1], sizes[3], sizes[4])
    problem.mask = make(*(1 if along else n for along, n in zip(broadcast, full)), dtype=dtype, seed=seed + 300)
    return problem


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("broadcast", BROADCAST, ids=str)
def test_matches_float64_along_any_dimensions(broadcast, dtype):
    problem_of(SIZES[1], broadcast, dtype).check(baseline=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("broadcast", SOME, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_matches_float64(sizes, broadcast, dtype):
    problem_of(sizes, broadcast, dtype).check()


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flags", ["causal", "window_lower", "softcap", "everything"])
@pytest.mark.parametrize("broadcast", SOME, ids=str)
def test_matches_float64_with_other_options(broadcast, flags, dtype, seed):
    problem_of(SIZES[1], broadcast, dtype, flags, seed).check(baseline=False)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "amx_emulated"])
def test_every_instruction_set(isa):
    if isa == "amx_emulated" and bmk.build_info()["isa"] not in ("avx512_bf16", "amx"):
        pytest.skip(f"this CPU has {bmk.build_info()['isa']}")
    rerun(__file__, "any_dimensions or nan", isa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("keys", [70, 450])
def test_with_dropout(keys, softcap, dtype):
    """Against float64 with the same keys dropped."""
    sizes = (2, 2, 2, 40, keys, 16, 16)
    problem = problem_of(sizes, (True, True, False, False), dtype)
    problem.options |= {"dropout_p": 0.3, "softcap": softcap}
    torch.manual_seed(5)
    args = list(problem.arguments())
    args[5] = torch.randint(0, 2**62, (1,))
    out, lse = reference.fwd(*args)
    grads = reference.bwd(problem.grad_out.double(), None, out, lse, True, *args)
    torch.manual_seed(5)
    actual = problem.run(with_grad_lse=False)
    cap = {torch.float32: 4e-6, torch.bfloat16: 6e-3, torch.float64: 1e-12}[dtype]
    for name, a, e in zip(("dq", "dk", "dv", "dmask"), actual[2:], grads):
        assert (a.double() - e).norm() <= cap * e.norm(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_nan_behind_the_mask_does_not_reach_it(sizes, dtype):
    problem = problem_of(sizes, (True, True, False, False), dtype)
    hidden = [0, 3, sizes[4] - 1]
    problem.mask[..., hidden] = -math.inf
    clean = problem.run()[5]
    problem.k[:, :, hidden], problem.v[:, :, hidden] = math.nan, math.inf
    dmask = problem.run()[5]
    assert torch.equal(dmask, clean)
    assert dmask[..., hidden].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_of_groups_are_the_same_for_any_number_of_threads(dtype):
    """Twelve heads share the mask, in runs that are added up, and a mask of each head's own."""
    threads = torch.get_num_threads()
    try:
        for heads in (1, 12):
            mask, results = make(1, heads, 66, 450, seed=3), []
            q, k, v = (make(1, 12, s, 16, dtype=dtype, seed=s) for s in (66, 450, 450))
            for n in (1, 2, 5):
                torch.set_num_threads(n)
                leaves = [t.clone().requires_grad_() for t in (q, k, v, mask)]
                out = bmk.attention(*leaves[:3], attn_mask=leaves[3], backend="cpu")
                results.append(torch.autograd.grad(out.square().sum(), leaves))
            assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("sizes", [(0, 2, 2, 5, 7, 8, 8), (1, 2, 2, 0, 7, 8, 8), (1, 2, 2, 5, 0, 8, 8)], ids=str)
def test_of_nothing(sizes):
    problem = problem_of(sizes, (True, True, False, False), torch.float32)
    dmask = problem.run(return_lse=False)[5]
    assert dmask.shape == problem.mask.shape
    assert dmask.eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [50, 450])
def test_gradients_lie_as_the_tensors_do(keys, dtype):
    """So that a leaf of autograd takes them as they are: a gradient that lies otherwise is copied."""
    q, k, v, grad_out = (
        make(2, 4, 40, 16),
        make(2, 2, keys, 16, seed=1),
        make(2, 2, keys, 24, seed=2),
        make(2, 4, 40, 24, seed=3),
    )
    results = []
    for inside in (False, True):
        lay = (
            (lambda t: t.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)) if inside else (lambda t: t.to(dtype))
        )
        leaves = [lay(t).requires_grad_() for t in (q, k, v)]
        out = bmk.attention(*leaves, enable_gqa=True, is_causal=True, backend="cpu")
        grads = torch.autograd.grad(out, leaves, lay(grad_out))
        for leaf, grad in zip(leaves, grads):
            assert grad.stride() == leaf.stride()
        results.append(grads)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_of_a_float32_mask_of_bfloat16_tensors_keeps_its_digits():
    """The probabilities kept in half precision are not what it is summed from."""
    problem = problem_of((2, 2, 2, 64, 96, 16, 16), (True, True, False, False), torch.bfloat16)
    problem.mask = problem.mask.float()
    dmask = problem.run()[5]
    exact = problem.exact()[0][5]
    assert dmask.dtype == torch.float32
    assert (dmask.double() - exact).norm() <= 4e-6 * exact.norm()
