"""What the forward of bmk.attention keeps of its probabilities for the backward: bfloat16 by dot products, keys in one block."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bigmodel_kernels as bmk
from bigmodel_kernels import _cpu
from bigmodel_kernels.ops.attention import cpu
from bigmodel_kernels.ops.attention.op import PROBABILITIES
from bigmodel_kernels.testing import make
from tests.ops.attention_problem import Problem

pytestmark = pytest.mark.skipif(not _cpu.dot_products(), reason="this CPU has no dot products of bfloat16")

SIZES = [
    (2, 2, 2, 128, 128, 64, 64),
    (1, 2, 2, 64, 192, 32, 64),  # as many keys as a block has
    # Heads that share keys, a row without a second one, widths that are no whole pairs or vectors.
    (1, 2, 1, 33, 66, 33, 19),
    (1, 3, 1, 20, 31, 24, 8),
    (1, 2, 2, 70, 17, 40, 40),
    (1, 2, 2, 45, 2, 64, 64),
    (1, 1, 1, 100, 1, 8, 8),
]
FLAGS = [
    "plain",
    "causal",
    "causal_lower",
    "window",
    "window_lower",
    "bool_mask",
    "float_mask",
    "key_padding",
    "row_bias",
    "alibi",
]


def kept_of(sizes, dtype=torch.bfloat16, dropout_p=0.0, softcap=0.0):
    B, Hq, Hkv, Sq, Sk, D, Dv = sizes
    q, k, v = make(B, Hq, Sq, D, dtype=dtype), make(B, Hkv, Sk, D, dtype=dtype), make(B, Hkv, Sk, Dv, dtype=dtype)
    seed = torch.tensor([3]) if dropout_p > 0 else None
    out, _, *kept = cpu.fwd(
        q, k, v, None, None, seed, 0.1, dropout_p, softcap, -1, -1, False, False, False, PROBABILITIES
    )
    return sum(t.numel() for t in kept), sum(t.numel() for t in (q, k, v, out))


@pytest.mark.parametrize("layout", ["contiguous", "heads_inside"])
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_matches_float64(sizes, flags, layout):
    Problem(sizes, flags, torch.bfloat16, layout=layout).check()


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("flags", ["plain", "causal", "bool_mask"])
@pytest.mark.parametrize("sizes", SIZES[2:6], ids=str)
def test_matches_float64_for_other_seeds(sizes, flags, seed):
    Problem(sizes, flags, torch.bfloat16, seed).check()


def test_no_more_is_kept_than_inputs_and_output_take():
    for sizes in SIZES:
        kept, others = kept_of(sizes)
        assert 0 < kept <= others
    assert kept_of((1, 2, 2, 192, 192, 32, 32))[0] == 0


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((1, 2, 2, 31, 64, 64, 64), {}),
        ((1, 2, 2, 64, 64, 64, 64), {"dropout_p": 0.5}),
        ((1, 2, 2, 64, 64, 64, 64), {"softcap": 2.0}),
        ((1, 2, 2, 64, 64, 64, 64), {"dtype": torch.float32}),
    ],
    ids=["few rows", "dropout", "softcap", "float32"],
)
def test_nothing_is_kept_of_other_calls(sizes, options):
    assert kept_of(sizes, **options)[0] == 0


def leaves(seed=0, sizes=(1, 2, 50, 70, 32)):
    B, H, Sq, Sk, D = sizes
    q, k, v, grad = (make(B, H, s, D, dtype=torch.bfloat16, seed=seed + i) for i, s in enumerate((Sq, Sk, Sk, Sq)))
    return [t.requires_grad_() for t in (q, k, v)], grad


def test_a_graph_that_is_retained_gives_the_same_gradients_twice():
    inputs, grad = leaves()
    out = bmk.attention(*inputs, is_causal=True, backend="cpu")
    first = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(out, inputs, grad)):
        assert torch.equal(a, b)


def test_a_backward_through_the_operator_reads_what_was_kept():
    inputs, grad = leaves()
    out = bmk.attention(*inputs, backend="cpu")
    kept = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    with FlopCounterMode(display=False):
        again = torch.autograd.grad(out, inputs, grad)
    for a, b in zip(kept, again):
        assert torch.equal(a, b)


def test_saved_tensors_may_be_packed_elsewhere():
    inputs, grad = leaves()
    plain = torch.autograd.grad(bmk.attention(*inputs, backend="cpu"), inputs, grad)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        out = bmk.attention(*inputs, backend="cpu")
    for a, b in zip(plain, torch.autograd.grad(out, inputs, grad)):
        assert torch.equal(a, b)


def test_nothing_behind_a_mask_leaks():
    inputs, grad = leaves()
    mask = make(1, 1, 50, 70, seed=7) > -0.5
    mask[..., 5::9] = False
    clean = torch.autograd.grad(bmk.attention(*inputs, attn_mask=mask, backend="cpu"), inputs, grad)
    spoilt = [t.detach().clone() for t in inputs]
    spoilt[1][..., 5::9, :], spoilt[2][..., 5::9, :] = float("inf"), float("nan")
    spoilt = [t.requires_grad_() for t in spoilt]
    for a, b in zip(clean, torch.autograd.grad(bmk.attention(*spoilt, attn_mask=mask, backend="cpu"), spoilt, grad)):
        assert torch.equal(a, b)


def test_the_number_of_threads_changes_no_bit():
    inputs, grad = leaves(sizes=(3, 4, 130, 130, 64))
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            out = bmk.attention(*inputs, is_causal=True, backend="cpu")
            found.append((out, *torch.autograd.grad(out, inputs, grad)))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*found):
        assert torch.equal(a, b)


def test_the_native_op_checks_what_it_is_told_was_kept():
    (q, k, v), grad = leaves()
    args = (q, k, v, None, None, None, 0.1, 0.0, 0.0, -1, -1, False)
    with torch.no_grad():
        out, lse, kept = torch.ops.bigmodel_native.attention_fwd(*args, True)
        for wrong, message in (
            (kept[:, :-1].contiguous(), "kept must have shape"),
            (kept.float(), "kept must"),
            (kept.transpose(1, 2), "kept must be contiguous"),
        ):
            with pytest.raises(RuntimeError, match=message):
                torch.ops.bigmodel_native.attention_bwd(grad, None, out, lse, wrong, False, *args, True)


@pytest.mark.parametrize("keys", [40, 400])
@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0, 30.0])
def test_scores_of_any_sign_and_size(scale, keys):
    """A scale that is not positive turns the largest score into the smallest; a large one leaves one key of all."""
    q, k, v = make(1, 2, 70, 24), make(1, 2, keys, 24), make(1, 2, keys, 40)
    grad = make(1, 2, 70, 40)
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [t.bfloat16().to(dtype).requires_grad_() for t in (q, k, v)]
        out, lse = bmk.attention(*leaves, scale=scale, return_lse=True, backend="cpu")
        alone = bmk.attention(*leaves, scale=scale, backend="cpu")
        found.append([out, lse, alone, *torch.autograd.grad(alone, leaves, grad.bfloat16().to(dtype))])
    caps = [4e-3, 1e-6, 4e-3, 6e-3, 6e-3, 6e-3]
    for actual, exact, cap in zip(*found, caps, strict=True):
        assert (actual - exact).norm() <= cap * exact.norm() + 1e-6


def test_scores_that_are_not_finite():
    q, k, v = (make(1, 1, 50, 16).bfloat16() for _ in range(3))
    k[0, 0, 7] = float("inf")  # scores of both infinities: a weight of 0, or all rows of one key are NaN
    q[0, 0, :25] = -q[0, 0, :25].abs()
    q[0, 0, 25:] = q[0, 0, 25:].abs()
    out = bmk.attention(q, k, v, backend="cpu")
    keep = torch.arange(50) != 7
    expected = bmk.attention(q.double(), k.double()[:, :, keep], v.double()[:, :, keep], backend="cpu")
    assert (out[0, 0, :25] - expected[0, 0, :25]).norm() <= 4e-3 * expected[0, 0, :25].norm()
    assert out[0, 0, 25:].isnan().all()
