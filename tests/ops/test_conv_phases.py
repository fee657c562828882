"""Convolutions of stride 2 with 3 or 4 taps, plain and transposed: csrc/cpu/conv_phases.h sums their phases by Winograd's
filtering."""

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.testing import make
from tests.ops.conv_problem import LAYOUTS, NAMES, PHASES, Problem


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tail", ["bias", "norm_residual_relu", "tanh_max", "gate", "norm_relu"])
@pytest.mark.parametrize("geometry", PHASES)
def test_matches_float64(geometry, tail, layout):
    for seed in range(3 if tail == "norm_relu" else 1):
        Problem(f"phases_{geometry}", tail, seed=seed).check(LAYOUTS[layout])


@pytest.mark.parametrize("geometry", ["t4", "t3", "c4", "c3"])
def test_bfloat16(geometry):
    Problem(f"phases_{geometry}", "norm_relu", torch.bfloat16, seed=1).check()


@pytest.mark.parametrize("tail", ["bias", "norm_relu", "relu_max"])
@pytest.mark.parametrize("geometry", PHASES)
def test_integers_are_exact(geometry, tail):
    Problem(f"phases_{geometry}", tail, seed=4, integer=True).check_exact()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("geometry", ["t4", "t3", "t4_images", "c4", "c3", "c4_images"])
def test_an_infinity_reaches_the_outputs_that_read_it_and_no_other(geometry, value, layout):
    p = Problem(f"phases_{geometry}", "bias")
    p.tensors["x"][0, 5, -1, 1] = p.tensors["x"][-1, 7, 0, 0] = value
    p.grad[0, 3, 1, 1] = value
    ours, exact = (
        p.run(dtype, b, layout=LAYOUTS[layout]) for dtype, b in ((torch.float32, "cpu"), (torch.float64, "torch"))
    )
    for name, found, expected in zip(("out", *NAMES), ours, exact):
        if found is not None:
            assert torch.equal(found.isfinite(), expected.isfinite()), name
            torch.testing.assert_close(
                found[found.isfinite()], expected.float()[expected.isfinite()], rtol=1e-4, atol=1e-4
            )


def test_weights_that_are_not_finite():
    x, w = make(1, 32, 6, 6), make(32, 32, 4, 4, seed=1)
    w[3, 4, 1, 2] = float("inf")
    found, expected = (
        bmk.conv(x, w, stride=2, padding=1, transposed=True, backend=backend) for backend in ("cpu", "torch")
    )
    assert torch.equal(found.isfinite(), expected.isfinite())
