"""The CUDA kernel of convolutions with few input channels, emulated: against float64 and PyTorch's own in the same dtype."""

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.ops.conv import cuda
from bigmodel_kernels.ops.conv.op import ACTIVATIONS
from bigmodel_kernels.testing import assert_matches, make
from tests.emulator.backend import SUFFIX, emulated
from tests.emulator.conv_native import Native
from tests.emulator.emulator import EmulatorError, needs_compiler

pytestmark = needs_compiler


@pytest.fixture
def native(monkeypatch):
    native = Native()
    # Small tiles, so that small images have several.
    monkeypatch.setattr(cuda, "TILES", {1: [(1, 16), (1, 1)], 2: [(4, 4), (1, 1)]})
    with emulated(monkeypatch, "conv", **native.ops()):
        yield native


def problem(shape, channels, kernel, dtype=torch.float16, integer=False):
    """x, weight, and a bias, scale and shift."""
    x = make(*shape, dtype=dtype, seed=1, integer=integer)
    weight = make(channels, shape[1], *kernel, dtype=dtype, seed=2, integer=integer)
    weight = weight if integer else weight * weight[0].numel() ** -0.5
    return x, weight, [make(channels, dtype=dtype, seed=i, integer=integer) for i in (3, 4, 5)]


def run(backend, dtype, x, weight, extra, **options):
    x, weight, bias, scale, shift = (None if t is None else t.to(dtype) for t in (x, weight, *extra))
    return bmk.conv(x, weight, bias, scale=scale, shift=shift, backend=backend, **options)


def check(x, weight, extra, **options):
    actual, expected = (run(backend, x.dtype, x, weight, extra, **options) for backend in ("cuda", "torch"))
    assert actual.stride() == expected.stride()
    assert_matches(actual, run("torch", torch.float64, x, weight, extra, **options), expected, dtype=x.dtype)


# batch, channels and size; output channels; kernel; options: a textbook CNN, a ResNet's stem, LeNet, and odd ones.
CASES = [
    ((2, 3, 12, 12), 16, (5, 5), {"padding": 2, "pool": ("max", 2)}),
    ((1, 3, 18, 21), 64, (7, 7), {"stride": 2, "padding": 3, "pool": ("max", 3, 2, 1)}),
    ((2, 1, 9, 9), 6, (5, 5), {"pool": ("avg", 2)}),
    ((1, 3, 9, 8), 32, (3, 3), {"padding": 1}),
    ((2, 4, 7, 6), 17, (3, 2), {"stride": (1, 2), "dilation": (2, 1), "padding": (2, 0)}),
    ((1, 2, 10, 11), 70, (1, 1), {"pool": ("avg", 3, 2)}),
    ((1, 5, 6, 5), 1, (3, 3), {"pool": ("max", 2, 1, 1)}),
    ((2, 1, 50), 20, (9,), {"stride": 2, "padding": 4}),
    ((1, 2, 37), 33, (4,), {"padding": "causal", "dilation": 3, "pool": ("max", 2)}),
]


@pytest.mark.parametrize("dtype", SUFFIX, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("shape", "channels", "kernel", "options"), CASES, ids=str)
def test_matches_float64(shape, channels, kernel, options, channels_last, dtype, native):
    x, weight, extra = problem(shape, channels, kernel, dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.mT.contiguous().mT
    check(x, weight, extra, activation="relu", **options)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS[:-1], ("leaky_relu", 0.3)], ids=str)
def test_activations(activation, native):
    x, weight, extra = problem((1, 3, 8, 8), 16, (3, 3))
    check(x, weight, [extra[0], None, None], activation=activation, pool=("max", 2))
    check(x, weight, [None, *extra[1:]], activation=activation)


@pytest.mark.parametrize(("shape", "channels", "kernel", "options"), CASES, ids=str)
def test_integers_are_exact(shape, channels, kernel, options, native):
    x, weight, extra = problem(shape, channels, kernel, torch.float16, integer=True)
    options = {name: value for name, value in options.items() if name != "pool"}
    actual = run("cuda", x.dtype, x, weight, [extra[0], None, None], **options)
    assert torch.equal(actual.double(), run("torch", torch.float64, x, weight, [extra[0], None, None], **options))


def test_strides_and_what_is_not_finite(native):
    x, weight, extra = problem((2, 3, 20, 20), 8, (3, 3))
    check(x[:, :, ::2, 3:], weight, extra, padding=1)
    x[0, 0, 4, 4] = torch.inf
    x[1, 1, 0, 0] = torch.nan
    actual, expected = (run(backend, torch.float16, x, weight, [None] * 3) for backend in ("cuda", "torch"))
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())


def test_tiles_of_real_networks_fit():
    pool = [3, 3, 2, 2, 1, 1]
    assert cuda.stem_tile((64, 3, 7, 7), [2, 2], [1, 1], pool, 2, False, 227 << 10) == [8, 8]
    assert cuda.stem_tile((64, 3, 7, 7), [2, 2], [1, 1], pool, 4, True, 227 << 10) == [4, 8]
    assert cuda.stem_tile((16, 3, 5, 5), [1, 1], [1, 1], [2, 2, 2, 2, 0, 0], 2, False, 99 << 10) == [8, 16]
    assert cuda.stem_tile((64, 8, 7, 7), [50, 50], [40, 40], pool, 2, False, 99 << 10) is None
    assert cuda.stem_gradient_tile((64, 3, 7, 7), [2, 2], [1, 1], 2, 227 << 10) == [16, 16]


def test_refuses(native):
    x, weight, _ = problem((2, 4, 9, 9), 8, (3, 3))
    for wrong, options, message in (
        (weight[:, :2], {"groups": 2}, "of one group"),
        (weight, {"activation": "tanh_sigmoid"}, "no gate"),
        (weight, {"residual": torch.zeros(2, 8, 7, 7).half()}, "residual"),
        (weight.clone().requires_grad_(), {"pool": ("max", 16), "padding": 6}, "pool has a window of 256"),
        (make(8, 4, 12, 12).half(), {"padding": 6}, "window has 576 elements"),
    ):
        with pytest.raises(RuntimeError, match=message):
            bmk.conv(x, wrong, backend="cuda", **options)
    with pytest.raises(RuntimeError, match="float16 and bfloat16, got"):
        bmk.conv(x.double(), weight.double(), backend="cuda")


@pytest.mark.parametrize("seed", range(3))
def test_no_races(seed, native):
    native.how = {"detect": "races", "seed": seed}
    check(*problem((1, 3, 12, 12), 16, (5, 5)), padding=2, pool=("max", 3, 2, 1))


@pytest.mark.parametrize("barrier", ["input and weights have come", "all outputs before pooling are there"])
def test_every_barrier_is_needed(barrier, native):
    native.edit, native.how = ("conv_stem.cuh", f"__syncthreads();  // {barrier}", ""), {"detect": "races"}
    with pytest.raises(EmulatorError, match=r"race in|never written"):
        run("cuda", torch.float16, *problem((1, 3, 12, 12), 16, (5, 5)), pool=("max", 2))
