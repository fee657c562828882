"""Gradients under a 2x2 max-pool as sums over its windows (csrc/cpu/conv_planar_gradient.h, conv_chosen_gradient.h), and
the index of the chosen elements that the kernel of few input channels keeps (conv_planar.h)."""

import pytest
import torch
import torch.nn.functional as F

import bigmodel_kernels as bmk
from bigmodel_kernels.testing import make
from tests.ops.conv_problem import CHOSEN_BY_NAME, LAYOUTS, NAMES, Problem
from tests.rerun import rerun


@pytest.mark.parametrize("tail", ["relu_max", "max", "norm_relu_max", "leaky_max", "tanh_halves", "silu_max"])
@pytest.mark.parametrize("geometry", CHOSEN_BY_NAME)
def test_matches_float64(geometry, tail):
    for seed in range(3 if tail == "relu_max" else 1):
        Problem(geometry, tail, seed=seed).check()


@pytest.mark.parametrize("geometry", CHOSEN_BY_NAME)
def test_channels_last_and_bfloat16(geometry):
    Problem(geometry, "relu_max", seed=1).check(LAYOUTS["channels_last"])
    for layout in LAYOUTS.values():
        Problem(geometry, "norm_relu_max", torch.bfloat16, seed=2).check(layout)


@pytest.mark.parametrize("tail", ["relu_max", "max", "leaky_max"])
@pytest.mark.parametrize("geometry", CHOSEN_BY_NAME)
def test_integers_are_exact(geometry, tail):
    """Sums of small integers are often equal within a window: the first of them is the chosen one."""
    Problem(geometry, tail, seed=4, integer=True).check_exact()


@pytest.mark.parametrize("values", [(0.0,), (0.0, -0.0), (-0.0, 0.0), (1.0, 1.0, -1.0)])
@pytest.mark.parametrize("channels", [1, 16])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_the_first_of_equals_is_chosen(activation, channels, values):
    """Zeros of either sign are equal, and under a ReLU they pass no gradient on."""
    x = torch.tensor(values).repeat(4 * channels * 12 * 28)[: 4 * channels * 12 * 28].view(4, channels, 12, 28)
    w = torch.zeros(20, channels, 3, 3)
    w[:, 0, 1, 1] = torch.tensor([1.0, -1.0]).repeat(10)
    g = make(4, 20, 6, 14, integer=True)
    found, expected = [], []
    for results, backend in ((found, "cpu"), (expected, "torch")):
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        y = bmk.conv(*leaves, padding=1, activation=activation, pool=("max", 2), backend=backend)
        results += [y.detach(), *torch.autograd.grad(y, leaves, g)]
    for ours, torchs in zip(found, expected):
        assert torch.equal(ours, torchs)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["x", "weight", "bias", "grad"])
@pytest.mark.parametrize("channels", [1, 16])
def test_what_is_not_finite_goes_where_it_does_in_torch(channels, side, value, activation):
    tensors = {
        "x": make(4, channels, 12, 28),
        "weight": make(20, channels, 3, 3, seed=1),
        "bias": make(20, seed=2),
        "grad": make(4, 20, 6, 14, seed=3),
    }
    place = {"x": (2, 0, 5, 8), "weight": (3, 0, 1, 2), "bias": (4,), "grad": (1, 5, 2, 3)}[side]
    tensors[side][place] = value
    found, expected = [], []
    for results, dtype in ((found, torch.float32), (expected, torch.float64)):
        *leaves, g = [t.to(dtype) for t in tensors.values()]
        leaves = [t.requires_grad_() for t in leaves]
        if dtype == torch.float32:
            y = bmk.conv(*leaves, padding=1, activation=activation, pool=("max", 2), backend="cpu")
        else:
            y = F.conv2d(*leaves, padding=1)
            y = F.max_pool2d(y.relu() if activation else y, 2)
        results += [y.detach(), *torch.autograd.grad(y, leaves, g)]
    if side == "weight":  # beside the image its gradient is that of zeros, which meet the weight as well
        found[1], expected[1] = (dx[..., 1:-1, 1:-1] for dx in (found[1], expected[1]))
    for ours, exact in zip(found, expected):
        torch.testing.assert_close(ours, exact.float(), rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("needed", ["x", "weight"])
def test_one_gradient_alone(needed):
    for geometry in ("chosen_first", "chosen_textbook"):
        p = Problem(geometry, "relu_max", seed=5)
        everything = p.run(torch.float32, "cpu")
        tensors = {k: None if t is None else t.clone().requires_grad_(k == needed) for k, t in p.tensors.items()}
        y = bmk.conv(tensors["x"], tensors["weight"], tensors["bias"], **p.options, backend="cpu")
        (found,) = torch.autograd.grad(y, tensors[needed], p.grad.float())
        assert torch.equal(found, everything[1 + NAMES.index(needed)])


def test_a_gradient_with_gaps():
    """Expanded, and every second column of another: read where it lies, or not at all."""
    p = Problem("chosen_textbook", "relu_max", integer=True)
    for g in (torch.ones(5, 1, 1, 1).expand(5, 64, 7, 7), make(5, 64, 7, 14, integer=True)[..., ::2]):
        p.grad = g
        for ours, exact in zip(p.run(torch.float32, "cpu"), p.run(torch.float64, "torch")):
            assert ours is None or torch.equal(ours, exact.float())


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_other_instruction_sets(isa):
    rerun(__file__, "float64 or integers or equals or finite or gaps", isa)
