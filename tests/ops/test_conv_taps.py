"""Convolutions of few channels with more than 3 taps an axis: csrc/cpu/conv_winograd_taps.h filters their taps in runs."""

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.testing import assert_matches, make
from tests.ops.conv_problem import LAYOUTS, TAPS, Problem
from tests.rerun import rerun

POOL = ("max", 3, 2, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tail", ["bias", "norm_residual_relu", "tanh_max", "norm_relu_padded", "silu_avg"])
@pytest.mark.parametrize("geometry", TAPS)
def test_matches_float64(geometry, tail, layout):
    for seed in range(3 if tail == "norm_relu_padded" else 1):
        Problem(f"taps_{geometry}", tail, seed=seed).check(LAYOUTS[layout])


@pytest.mark.parametrize("tail", ["bias", "norm_relu", "norm_relu_padded"])
@pytest.mark.parametrize("geometry", TAPS)
def test_integers_are_exact(geometry, tail):
    Problem(f"taps_{geometry}", tail, seed=4, integer=True).check_exact()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("geometry", ["k7s2", "k5", "k4x6", "bands", "k7bands", "k10x5"])
def test_an_infinity_reaches_the_outputs_that_read_it_and_no_other(geometry, value, layout):
    p = Problem(f"taps_{geometry}", "bias")
    x = p.tensors["x"]
    x[0, 1, 3, 5] = x[-1, 2, -1, -1] = value
    ours, exact = (
        p.run(dtype, b, grads=False, layout=LAYOUTS[layout])[0]
        for dtype, b in ((torch.float32, "cpu"), (torch.float64, "torch"))
    )
    assert torch.equal(ours.isfinite(), exact.isfinite())
    assert torch.equal(ours.isnan(), exact.isnan())
    torch.testing.assert_close(ours[ours.isfinite()], exact.float()[ours.isfinite()], rtol=1e-4, atol=1e-4)


# Tiles of three rows: the largest errors of what they are for, over inputs as they come after a ReLU and of images.
@pytest.mark.parametrize("inputs", [torch.relu, torch.sigmoid], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("channels", "stride", "size"), [(3, 2, (90, 90)), (3, 1, (40, 40)), (16, 1, (30, 30))])
def test_inputs_of_one_sign(channels, stride, size, inputs):
    for seed in range(5):
        x, w = inputs(make(1, channels, *size, seed=seed)), make(64, channels, 7, 7, seed=seed + 50) / 7
        options = {"stride": stride, "padding": 3}
        exact = bmk.conv(x.double(), w.double(), **options, backend="torch")
        ours, baseline = (bmk.conv(x, w, **options, backend=backend) for backend in ("cpu", "torch"))
        assert_matches(ours, exact, baseline, dtype=torch.float32)


def test_weights_that_are_not_finite():
    x, w = make(1, 3, 20, 30), make(32, 3, 5, 5, seed=1)
    w[3, 1, 2, 4] = float("inf")
    found, expected = (bmk.conv(x, w, backend=backend) for backend in ("cpu", "torch"))
    assert torch.equal(found.isfinite(), expected.isfinite())


@pytest.mark.parametrize("value", [0.0, float("inf")])
@pytest.mark.parametrize("pool", [None, POOL, ("max", 3, 1, 1)], ids=str)
def test_the_number_of_threads_does_not_change_a_bit(pool, value):
    x, w = make(1, 3, 130, 90), make(32, 3, 7, 7, seed=1)
    x[0, 0, ::31, 40] = value
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(bmk.conv(x, w, stride=2, padding=3, activation="relu", pool=pool, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r.nan_to_num(), results[0].nan_to_num()) for r in results)


# An odd number of channels: bfloat16 pairs the numbers of a row of taps, unless one is not finite or the tensor has gaps.
@pytest.mark.parametrize("layout", [*LAYOUTS, "gaps"])
@pytest.mark.parametrize("geometry", ["k7s2", "k5", "k4x6", "bands"])
def test_bfloat16(geometry, layout):
    p = Problem(f"taps_{geometry}", "norm_relu_padded", torch.bfloat16, seed=1)
    if layout == "gaps":
        p.check(lambda t: torch.cat([t, t.new_full(t.shape, torch.nan)], -1)[..., : t.shape[-1]] if t.dim() > 2 else t)
        return
    p.check(LAYOUTS[layout])
    p.tensors["x"][-1, -1, 4, 7] = float("inf")
    ours, exact = (
        p.run(dtype, b, grads=False, layout=LAYOUTS[layout])[0]
        for dtype, b in ((torch.bfloat16, "cpu"), (torch.float64, "torch"))
    )
    assert torch.equal(ours.isfinite(), exact.isfinite())
    assert not ours.isfinite().all()


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_other_instruction_sets(isa):
    selected = "integers or infinity or one_sign or threads or (test_matches_float64 and norm_relu_padded)"
    rerun(__file__, selected, isa)
