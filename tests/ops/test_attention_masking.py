"""bmk.attention where something is masked out: fully masked rows, infinities and NaNs behind a mask, dropout."""

import math

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.ops.attention import reference
from bigmodel_kernels.testing import make, relative_l2

# With few query rows (read where they lie) and with many (packed in tiles), in one block of keys and in several.
SHAPES = [(1, 2, 2, 2, 40, 16, 16), (2, 4, 2, 21, 50, 20, 9), (1, 2, 2, 70, 420, 8, 24)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def inputs(sizes, dtype=torch.float32, seed=0):
    B, Hq, Hkv, Sq, Sk, D, Dv = sizes
    q, k, v = (
        make(B, h, s, d, dtype=dtype, seed=seed + i)
        for i, (h, s, d) in enumerate([(Hq, Sq, D), (Hkv, Sk, D), (Hkv, Sk, Dv)])
    )
    return q, k, v, make(B, Hq, Sq, Dv, dtype=dtype, seed=seed + 9)


def run(q, k, v, grad_out, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    out, lse = bmk.attention(*leaves, enable_gqa=True, return_lse=True, backend="cpu", **options)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad_out)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float", "keys"])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_rows_that_attend_to_nothing_give_zero(sizes, kind, dtype):
    q, k, v, grad_out = inputs(sizes, dtype)
    B, _, _, Sq, Sk, *_ = sizes
    mask = torch.ones(B, 1, 1 if kind == "keys" else Sq, Sk, dtype=torch.bool)
    mask[0, :, 1 if kind != "keys" else 0] = False
    blocked = ~mask.any(-1).expand(B, 1, Sq)
    if kind == "float":
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -math.inf).requires_grad_()
    out, lse, dq, dk, dv = run(q, k, v, grad_out, attn_mask=mask)
    rows = blocked.expand(lse.shape)
    assert out[rows].eq(0).all()
    assert dq[rows].eq(0).all()
    assert lse[rows].eq(-math.inf).all()
    assert torch.isfinite(lse[~rows]).all()
    for t in (out, dq, dk, dv):
        assert torch.isfinite(t).all()
    # A row that attends to nothing gives nothing to keys and values either.
    grad_out2 = torch.where(rows[..., None], 1e4, grad_out)
    for a, b in zip(run(q, k, v, grad_out2, attn_mask=mask)[3:], (dk, dv)):
        assert torch.equal(a, b)


def test_gradient_of_a_mask_is_zero_for_rows_that_attend_to_nothing():
    q, k, v, grad_out = inputs(SHAPES[1])
    mask = make(1, 1, 21, 50, seed=3)
    mask[..., 4, :] = -math.inf
    mask.requires_grad_()
    out = bmk.attention(q, k, v, attn_mask=mask, enable_gqa=True, backend="cpu")
    (grad,) = torch.autograd.grad(out, mask, grad_out)
    assert torch.isfinite(grad).all()
    assert grad[..., 4, :].eq(0).all()


def test_causal_lower_right_with_more_queries_than_keys():
    q, k, v, grad_out = inputs((1, 1, 1, 9, 4, 8, 8))
    out, lse, dq, *_ = run(q, k, v, grad_out, is_causal=True, alignment="lower_right")
    assert out[:, :, :5].eq(0).all()
    assert dq[:, :, :5].eq(0).all()
    assert lse[:, :, :5].eq(-math.inf).all()
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float", "window"])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_nothing_behind_a_mask_leaks(sizes, kind, dtype, poison):
    """Keys 3, 7 and the last are masked out for every query: whatever they hold, no bit of a result changes."""
    q, k, v, grad_out = inputs(sizes, dtype)
    Sq, Sk = sizes[3:5]
    options = {}
    if kind == "window":
        options = {"window": (None, max(0, Sk - Sq - 1)), "alignment": "upper_left"}
        hidden = [Sk - 1]
        options["window"] = (None, Sk - 1 - Sq)
    else:
        hidden = [3, 7, Sk - 1]
        mask = torch.ones(1, 1, 1, Sk, dtype=torch.bool)
        mask[..., hidden] = False
        options["attn_mask"] = (
            mask if kind == "bool" else torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -math.inf)
        )
    clean = run(q, k, v, grad_out, **options)
    k[:, :, hidden], v[:, :, hidden] = poison, poison
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), run(q, k, v, grad_out, **options), clean):
        assert torch.isfinite(a).all(), name
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_nothing_in_the_future_leaks(sizes, dtype):
    q, k, v, grad_out = inputs(sizes, dtype)
    Sq = sizes[3]
    clean = run(q, k, v, grad_out, is_causal=True)
    k[:, :, Sq:], v[:, :, Sq:] = math.nan, math.nan
    k[:, :, Sq - 1], v[:, :, Sq - 1] = math.nan, math.nan  # attended by the last query alone
    poisoned = run(q, k, v, grad_out, is_causal=True)
    for a, b in zip(poisoned[:3], clean[:3]):
        torch.testing.assert_close(a[:, :, : Sq - 1], b[:, :, : Sq - 1], rtol=1e-6, atol=1e-6)
        assert a[:, :, Sq - 1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_masked_query_that_holds_nan_leaks_into_no_gradient(dtype):
    q, k, v, grad_out = inputs(SHAPES[1], dtype)
    mask = torch.ones(1, 1, 21, 50, dtype=torch.bool)
    mask[..., 5, :] = False
    clean = run(q, k, v, grad_out, attn_mask=mask)
    q[:, :, 5], grad_out[:, :, 5] = math.nan, math.inf
    for a, b in zip(run(q, k, v, grad_out, attn_mask=mask), clean):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_attended_nan_and_infinity_arrive():
    for sizes in SHAPES:
        q, k, v, _ = inputs(sizes)
        v[0, 0, 1, 0] = math.inf
        v[0, 1, 1, 0] = math.nan
        out = bmk.attention(q, k, v, enable_gqa=True, backend="cpu")
        heads = q.shape[1] // k.shape[1]
        assert out[0, :heads, :, 0].eq(math.inf).all()
        assert out[0, heads : 2 * heads, :, 0].isnan().all()
        assert torch.isfinite(out[..., 1:]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_dropout_is_the_reference_with_the_same_seed(sizes, p, dtype):
    q, k, v, grad_out = inputs(sizes, dtype)
    torch.manual_seed(11)
    actual = run(q, k, v, grad_out, dropout_p=p)
    torch.manual_seed(11)
    seed = torch.randint(0, 2**62, (1,))
    args = list(bmk.attention.prepare(q.double(), k.double(), v.double(), dropout_p=p, enable_gqa=True))
    args[5] = seed
    out, lse = reference.fwd(*args)
    grads = reference.bwd(grad_out.double(), None, out, lse, False, *args)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float64: 1e-12}[dtype]
    for a, e in zip(actual, (out, lse, *grads)):
        torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sizes", [(1, 2, 2, 3, 3, 16, 16), (1, 2, 2, 40, 2, 16, 16)], ids=str)
def test_gradients_of_few_keys_with_dropout_are_not_those_of_a_rounded_output(sizes):
    worst = 0.0
    for seed in range(30):
        q, k, v, grad_out = inputs(sizes, torch.bfloat16, seed)
        torch.manual_seed(seed)
        actual = run(q, k, v, grad_out, dropout_p=0.2)
        torch.manual_seed(seed)
        args = list(bmk.attention.prepare(*(t.double() for t in (q, k, v)), dropout_p=0.2))
        args[5] = torch.randint(0, 2**62, (1,))
        out, lse = reference.fwd(*args)
        dq, dk, _, _ = reference.bwd(grad_out.double(), None, out, lse, False, *args)
        worst = max(worst, relative_l2(actual[2], dq), relative_l2(actual[3], dk))
    assert worst < 6e-3


def test_dropout_drops_the_share_asked_for_and_follows_manual_seed():
    q, k = torch.zeros(2, 2, 40, 8), torch.zeros(2, 2, 128, 8)
    v = torch.eye(128).expand(2, 2, 128, 128)
    torch.manual_seed(1)
    first = bmk.attention(q, k, v, dropout_p=0.3, backend="cpu")
    torch.manual_seed(1)
    again = bmk.attention(q, k, v, dropout_p=0.3, backend="cpu")
    other = bmk.attention(q, k, v, dropout_p=0.3, backend="cpu")
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    dropped = first.eq(0)
    count = dropped.numel()
    assert abs(dropped.float().mean().item() - 0.3) < 4 * math.sqrt(0.21 / count)
    torch.testing.assert_close(first[~dropped], torch.full_like(first[~dropped], 1 / 128 / 0.7))
    # No pattern along heads, rows or keys.
    for dim in range(4):
        a, b = dropped.narrow(dim, 0, dropped.shape[dim] - 1), dropped.narrow(dim, 1, dropped.shape[dim] - 1)
        assert abs((a & b).float().mean().item() - 0.09) < 5 * math.sqrt(0.09 * 0.91 / a.numel())
