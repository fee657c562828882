"""Sums by Winograd's filtering: 3x3 convolutions of stride 1 in tiles of 4 x 4 outputs (csrc/cpu/conv_winograd.h; those in
tiles of 2 x 2 are among the geometries of test_conv.py), and the phases of stride 2 with 3 or 4 taps, plain and transposed
(csrc/cpu/conv_phases.h)."""

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.testing import make
from tests.ops.conv_problem import LAYOUTS, NAMES, PHASES_BY_NAME, TILED_BY_NAME, Problem

WINOGRAD = [*PHASES_BY_NAME, *TILED_BY_NAME]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tail", ["bias", "norm_residual_relu", "tanh_max", "gate", "norm_relu"])
@pytest.mark.parametrize("geometry", WINOGRAD)
def test_matches_float64(geometry, tail, layout):
    for seed in range(3 if tail == "norm_relu" else 1):
        Problem(geometry, tail, seed=seed).check(LAYOUTS[layout])


@pytest.mark.parametrize("geometry", ["phases_t4", "phases_t3", "phases_c4", "phases_c3", "tiled_odd"])
def test_bfloat16(geometry):
    Problem(geometry, "norm_relu", torch.bfloat16, seed=1).check()


@pytest.mark.parametrize("tail", ["bias", "norm_relu", "relu_max"])
@pytest.mark.parametrize("geometry", WINOGRAD)
def test_integers_are_exact(geometry, tail):
    Problem(geometry, tail, seed=4, integer=True).check_exact()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize(
    "geometry",
    [
        *("phases_t4", "phases_t3", "phases_t4_images", "phases_c4", "phases_c3", "phases_c4_images"),
        *("tiled_odd", "tiled_images", "tiled_bands"),
    ],
)
def test_an_infinity_reaches_the_outputs_that_read_it_and_no_other(geometry, value, layout):
    p = Problem(geometry, "bias")
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


@pytest.mark.parametrize(
    ("size", "taps", "options"), [(6, 4, {"stride": 2, "padding": 1, "transposed": True}), (6, 3, {}), (44, 3, {})]
)
def test_weights_that_are_not_finite(size, taps, options):
    x, w = make(1, 32, size, size), make(32, 32, taps, taps, seed=1)
    w[3, 4, 1, 2] = float("inf")
    found, expected = (bmk.conv(x, w, backend=backend, **options) for backend in ("cpu", "torch"))
    assert torch.equal(found.isfinite(), expected.isfinite())
