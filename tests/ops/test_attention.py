"""bmk.attention against float64: forward and every gradient, over sizes, flags, layouts and dtypes."""

import pytest
import torch

from bigmodel_kernels.testing import LAYOUTS
from tests.ops.attention_problem import FLAGS, Problem

# B, Hq, Hkv, Sq, Sk, D, Dv: nothing, single elements, odd sizes, and sizes below, at and above what a vector (4, 8, 16), a
# tile (3, 4, 6, 8 rows), a panel (8 to 32 keys), a block (48 or 64 rows, 192 keys) holds, with few rows and with many.
SIZES = [
    (0, 2, 2, 3, 4, 5, 5),
    (2, 0, 0, 3, 4, 5, 5),
    (1, 2, 2, 0, 4, 5, 5),
    (1, 2, 2, 3, 0, 5, 5),
    (1, 2, 2, 3, 4, 0, 5),
    (1, 2, 2, 3, 4, 5, 0),
    (1, 1, 1, 1, 1, 1, 1),
    (2, 2, 1, 1, 7, 3, 2),
    (1, 4, 1, 1, 33, 16, 17),
    (1, 3, 3, 2, 15, 8, 8),
    (2, 2, 2, 4, 16, 15, 1),
    (1, 8, 2, 1, 200, 64, 64),
    (1, 2, 1, 2, 193, 31, 65),
    (1, 2, 2, 3, 700, 8, 8),
    (1, 2, 2, 5, 17, 16, 16),
    (2, 4, 2, 6, 31, 17, 31),
    (1, 2, 2, 7, 32, 33, 32),
    (1, 2, 1, 8, 33, 64, 64),
    (1, 2, 2, 9, 47, 7, 48),
    (1, 1, 1, 12, 48, 48, 16),
    (2, 6, 3, 13, 49, 20, 40),
    (1, 2, 2, 31, 63, 32, 33),
    (1, 2, 2, 47, 64, 12, 12),
    (1, 2, 1, 48, 65, 64, 15),
    (1, 1, 1, 49, 96, 5, 9),
    (1, 2, 2, 63, 127, 16, 64),
    (1, 4, 2, 64, 128, 64, 64),
    (1, 1, 1, 65, 191, 24, 24),
    (1, 2, 2, 33, 192, 40, 8),
    (1, 2, 1, 66, 193, 32, 32),
    (1, 1, 1, 100, 40, 65, 3),
    (1, 1, 1, 130, 60, 128, 96),
    (2, 3, 1, 40, 200, 10, 10),
    (1, 2, 2, 197, 197, 64, 64),
    (1, 1, 1, 20, 800, 16, 16),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def size_id(sizes):
    return "x".join(map(str, sizes))


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("sizes", SIZES, ids=size_id)
def test_matches_float64(sizes, flags):
    Problem(sizes, flags).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("flags", ["plain", "causal_lower", "float_mask", "everything"])
@pytest.mark.parametrize("sizes", SIZES[6::2], ids=size_id)
def test_other_dtypes_match_float64(sizes, flags, dtype):
    Problem(sizes, flags, dtype).check()


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("flags", ["plain", "causal", "bool_mask", "everything"])
@pytest.mark.parametrize("sizes", [(1, 4, 2, 37, 70, 20, 12), (1, 4, 1, 1, 300, 32, 32)], ids=size_id)
def test_matches_float64_for_other_seeds(sizes, flags, seed):
    Problem(sizes, flags, seed=seed).check()


# dp - delta cancels: each of these broke a cap with delta = sum of do o, o being rounded to bfloat16.
@pytest.mark.parametrize(
    ("sizes", "flags", "seed"),
    [
        ((1, 2, 2, 3, 2, 16, 16), "plain", 18),
        ((1, 2, 2, 3, 2, 16, 16), "plain", 34),
        ((1, 1, 1, 4, 2, 64, 64), "plain", 44),
        ((1, 2, 2, 3, 2, 16, 16), "causal", 34),
        ((1, 2, 2, 40, 2, 16, 16), "causal_lower", 54),
        ((1, 2, 1, 40, 3, 16, 16), "causal_lower", 34),
        ((1, 2, 2, 3, 2, 16, 16), "bool_mask", 33),
        ((1, 1, 1, 4, 2, 64, 64), "float_mask", 14),
        ((1, 1, 1, 4, 2, 64, 64), "float_mask", 20),
        ((1, 1, 1, 4, 2, 64, 64), "softcap", 5),
        ((1, 2, 2, 3, 2, 16, 16), "alibi", 54),
        ((1, 2, 2, 3, 3, 16, 16), "everything", 28),
        ((1, 2, 2, 3, 3, 16, 16), "key_padding", 24),
    ],
    ids=str,
)
def test_gradients_of_few_keys_are_not_those_of_a_rounded_output(sizes, flags, seed):
    Problem(sizes, flags, torch.bfloat16, seed).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sizes", [(1, 2, 2, 400, 3, 16, 16), (1, 2, 1, 12, 2, 32, 32), (1, 1, 1, 1000, 16, 64, 64)], ids=size_id
)
def test_alibi_far_from_few_keys_keeps_their_differences(sizes, dtype):
    Problem(sizes, "alibi", dtype).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [(2, 4, 2, 37, 70, 20, 12), (2, 2, 2, 2, 50, 33, 16)], ids=size_id)
def test_matches_float64_for_any_layout(sizes, layout, dtype):
    Problem(sizes, "everything", dtype, layout=layout).check(baseline=False)


@pytest.mark.parametrize("flags", FLAGS)
def test_torch_backend_means_the_same(flags):
    for return_lse in (True, False):
        problem = Problem((2, 4, 2, 9, 13, 8, 6), flags, torch.float64)
        actual = problem.run("torch", return_lse=return_lse, with_grad_lse=return_lse)
        exact, _ = problem.exact(with_grad_lse=return_lse)
        for i, (a, e) in enumerate(zip(actual, exact)):
            if a is not None:
                torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-12, msg=f"result {i}, return_lse={return_lse}")


@pytest.mark.parametrize("flags", FLAGS)
def test_reference_backward_is_what_autograd_gives(flags):
    from bigmodel_kernels.ops.attention import reference

    problem = Problem((2, 4, 2, 9, 13, 8, 6), flags, torch.float64)
    args = list(problem.arguments())
    inputs = [t.requires_grad_() for t in (args[:3] if args[3] is None or args[3].dtype == torch.bool else args[:4])]
    args[5], args[7] = torch.tensor([2**61 + 12345]), 0.3
    out, lse = reference.fwd(*args)
    grad_lse = torch.where(torch.isfinite(lse), problem.grad_lse, 0.0)
    expected = torch.autograd.grad([out, lse.masked_fill(torch.isinf(lse), 0.0)], inputs, [problem.grad_out, grad_lse])
    actual = reference.bwd(problem.grad_out, grad_lse, out, lse, len(inputs) == 4, *args)
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e)
