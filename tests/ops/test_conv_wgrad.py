"""Gradients of convolution weights by Winograd's filtering (csrc/cpu/conv_wgrad_winograd.h), and of bfloat16 numbers by dot
products (conv_wgrad_pairs.h) where the CPU has them."""

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.testing import assert_matches, make
from tests.ops.conv_problem import FILTERED, FILTERED_BY_NAME, LAYOUTS, NAMES, PAIRED_BY_NAME, Problem


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tail", ["norm_relu", "relu_max"])
@pytest.mark.parametrize("geometry", FILTERED)
def test_matches_float64(geometry, tail, layout):
    for seed in range(3 if tail == "norm_relu" else 1):
        Problem(f"filtered_{geometry}", tail, seed=seed).check(LAYOUTS[layout])


@pytest.mark.parametrize("tail", ["sigmoid", "silu_avg", "gate"])
@pytest.mark.parametrize("geometry", ["k3_parts", "k3_groups", "k3_transposed", "k4s2_transposed"])
def test_tails_and_bfloat16(geometry, tail):
    Problem(f"filtered_{geometry}", tail, seed=1).check()
    Problem(f"filtered_{geometry}", tail, torch.bfloat16, seed=2).check()


@pytest.mark.parametrize("geometry", FILTERED)
def test_integers_are_exact(geometry):
    Problem(f"filtered_{geometry}", "norm_relu", seed=4, integer=True).check_exact()


@pytest.mark.parametrize("side", ["x", "grad"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("geometry", ["k3", "k3_parts", "k3_groups", "k4s2", "k3s2"])
def test_an_infinity_reaches_the_weights_that_meet_it_and_no_other(geometry, value, side):
    p = Problem(f"filtered_{geometry}", "bias")
    if side == "x":
        p.tensors["x"][-1, 3, 0, 0] = value  # no pixel pairs a corner with every tap
    else:
        p.grad[-1, 5, 0, 0] = value
    weight = 1 + NAMES.index("weight")
    ours, exact = p.run(torch.float32, "cpu")[weight], p.run(torch.float64, "torch")[weight]
    assert not exact.isfinite().all()
    assert torch.equal(ours.isfinite(), exact.isfinite())
    finite = exact.isfinite()
    assert_matches(ours[finite], exact[finite], None, dtype=torch.float32, gradient=True)


@pytest.mark.parametrize("shape", [(2, 20, 16, 16), (0, 20, 16, 16), (1, 20, 1, 1)])
@pytest.mark.parametrize("options", [{"dilation": 2, "padding": 2}, {"stride": 3, "padding": 1}, {"padding": 1}])
def test_other_geometries_and_few_pixels(shape, options):
    x, w = make(*shape, requires_grad=True), make(24, 20, 3, 3, seed=1, requires_grad=True)
    found = torch.autograd.grad(bmk.conv(x, w, **options, backend="cpu").square().sum(), (x, w))
    d = [t.detach().double().requires_grad_() for t in (x, w)]
    exact = torch.autograd.grad(torch.nn.functional.conv2d(*d, **options).square().sum(), d)
    for ours, other in zip(found, exact):
        torch.testing.assert_close(ours, other.float(), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("geometry", [*PAIRED_BY_NAME, *FILTERED_BY_NAME])
def test_bfloat16_matches_float64(geometry, layout):
    tails = ("bias", "all_gelu_max", "gate") if geometry in PAIRED_BY_NAME else ("norm_relu",)
    for seed, tail in enumerate(tails):
        Problem(geometry, tail, torch.bfloat16, seed=seed).check(LAYOUTS[layout])


@pytest.mark.parametrize("side", ["x", "grad"])
@pytest.mark.parametrize("pixel", [0, -1])
@pytest.mark.parametrize("geometry", ["filtered_k3", "filtered_k3s2", "paired_row", "paired_strip", "paired_tall"])
def test_a_nan_in_bfloat16_reaches_the_weights_that_meet_it_and_no_other(geometry, pixel, side):
    p = Problem(geometry, "bias", torch.bfloat16)
    spoilt = p.tensors["x"] if side == "x" else p.grad
    spoilt[(-1, 3) + (pixel,) * (spoilt.dim() - 2)] = float("nan")
    weight = 1 + NAMES.index("weight")
    ours, exact = p.run(torch.bfloat16, "cpu")[weight], p.run(torch.float64, "torch")[weight]
    assert not exact.isfinite().all()
    assert torch.equal(ours.isfinite(), exact.isfinite())


@pytest.mark.parametrize("geometry", PAIRED_BY_NAME)
def test_bfloat16_does_not_depend_on_threads(geometry):
    p = Problem(geometry, "relu_max", torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append([t for t in p.run(torch.bfloat16, "cpu") if t is not None])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))
