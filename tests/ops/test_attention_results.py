"""The results of the CPU kernels of bmk.attention in bfloat16, which are rounded from registers where they can be."""

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels import _cpu
from tests.ops.attention_problem import Problem

# Widths of whole panels of 32, with tiles of 8, of 4 and of fewer rows and keys at the end.
SIZES = [
    (1, 2, 2, 100, 132, 64, 32),
    (1, 2, 2, 98, 130, 32, 64),
    (2, 4, 2, 36, 60, 64, 64),  # two heads to a group: rows of several heads in a block
    (1, 2, 2, 64, 190, 64, 64),  # causal: keys without a row
    (1, 1, 1, 190, 64, 64, 64),  # causal from the end: rows without a key
    (1, 2, 2, 140, 450, 64, 64),
]


@pytest.mark.skipif(not _cpu.dot_products(), reason="this CPU has no dot products of bfloat16")
@pytest.mark.parametrize("layout", ["contiguous", "heads_inside"])
@pytest.mark.parametrize("flags", ["plain", "causal", "causal_lower", "window", "bool_mask", "float_mask"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_matches_float64(sizes, flags, layout):
    Problem(sizes, flags, torch.bfloat16, layout=layout).check()


@pytest.mark.parametrize("row", [0, 63, 64, 99])
def test_a_gradient_that_is_not_finite_spoils_no_key_that_its_row_does_not_attend_to(row):
    q, k, v, grad = (torch.randn(1, 1, 100, 64, dtype=torch.bfloat16) for _ in range(4))
    grad[0, 0, row] = torch.nan
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = bmk.attention(*leaves, is_causal=True, backend="cpu")
    _, dk, dv = torch.autograd.grad(out, leaves, grad)
    for gradient in (dk, dv):
        assert gradient[0, 0, row + 1 :].isfinite().all()
    assert dk[0, 0, : row + 1].isnan().all()
