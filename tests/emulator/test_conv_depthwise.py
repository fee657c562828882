"""The CUDA kernel of depthwise convolutions, emulated: against float64 and PyTorch's own convolution in the same dtype."""

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.testing import assert_matches, make
from tests.emulator.backend import SUFFIX, emulated
from tests.emulator.conv_native import ACTIVATIONS as NAMES
from tests.emulator.conv_native import Native, depthwise_name
from tests.emulator.emulator import needs_compiler

pytestmark = needs_compiler


@pytest.fixture
def native(monkeypatch):
    native = Native()
    with emulated(monkeypatch, "conv", **native.ops()):
        yield native


def check(x, weight, extra, **options):
    def run(backend, dtype):
        tensors = [None if t is None else t.to(dtype) for t in (x, weight, *extra)]
        x_, weight_, bias, scale, shift, residual = tensors
        return bmk.conv(
            x_,
            weight_,
            bias,
            scale=scale,
            shift=shift,
            residual=residual,
            groups=x.shape[1],
            backend=backend,
            **options,
        )

    actual, expected = run("cuda", x.dtype), run("torch", x.dtype)
    assert actual.stride() == expected.stride()
    assert_matches(actual, run("torch", torch.float64), expected, dtype=x.dtype)


def problem(shape, kernel, dtype, channels_last=False, **options):
    """x, weight, and a bias, scale, shift and residual."""
    channels = shape[1]
    x, weight = make(*shape, dtype=dtype, seed=1), make(channels, 1, *kernel, dtype=dtype, seed=2)
    out = torch.nn.functional.conv2d if len(kernel) == 2 else torch.nn.functional.conv1d
    residual = make(*out(x.float(), weight.float(), groups=channels, **options).shape, dtype=dtype, seed=6)
    if channels_last:
        x, residual = (t.contiguous(memory_format=torch.channels_last) for t in (x, residual))
    return x, weight, [*(make(channels, dtype=dtype, seed=i) for i in (3, 4, 5)), residual]


# batch, channels, size; kernel; options
IMAGES = [
    ((2, 8, 9, 7), (3, 3), {"padding": 1}),
    ((1, 16, 5, 6), (3, 3), {}),
    ((2, 8, 8, 9), (3, 3), {"stride": 2, "padding": 1}),
    ((1, 8, 9, 9), (3, 2), {"dilation": (1, 2), "padding": (2, 1)}),
    ((2, 5, 6, 7), (3, 3), {"padding": 1}),
    ((1, 8, 1, 4), (1, 3), {"padding": (0, 1)}),
    ((1, 24, 4, 4), (4, 4), {"padding": 2, "dilation": 2}),
]


@pytest.mark.parametrize("dtype", SUFFIX, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("shape", "kernel", "options"), IMAGES, ids=str)
def test_images(shape, kernel, options, channels_last, dtype, native):
    x, weight, extra = problem(shape, kernel, dtype, channels_last, **options)
    check(x, weight, extra, activation="silu", **options)
    assert (", true, " in native.used[-1]) == channels_last


@pytest.mark.parametrize("kernel", [5, 7])
def test_taller_kernels(kernel, native):
    for dtype, channels_last in ((torch.float16, True), (torch.float32, False)):
        x, weight, extra = problem((2, 8, 10, 6), (kernel, kernel), dtype, channels_last, padding=kernel // 2)
        check(x, weight, extra, padding=kernel // 2)
        assert native.used[-1] == depthwise_name(dtype, 8 if channels_last else 1, channels_last, kernel)


@pytest.mark.parametrize("dtype", SUFFIX, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"padding": 3}, {"stride": 3, "padding": 2}, {"dilation": 4, "padding": 9}], ids=str
)
@pytest.mark.parametrize("length", [13, 300])
def test_sequences(length, options, dtype, native):
    x, weight, extra = problem((2, 3, length), (4,), dtype, **options)
    check(x, weight, extra, activation="gelu", **options)


@pytest.mark.parametrize("activation", [None, *NAMES[1:], ("leaky_relu", 0.3)], ids=str)
def test_activations(activation, native):
    x, weight, extra = problem((1, 4, 40), (3,), torch.float32)
    check(x, weight, extra, activation=activation)
    check(x, weight, [extra[0], None, None, None], activation=activation)
    check(x, weight, [None] * 4, activation=activation)


def test_causal_and_unusual_strides(native):
    x, weight, _ = problem((2, 3, 30), (4,), torch.float16)
    wide = torch.full((2, 30, 5), torch.nan, dtype=torch.float16).transpose(1, 2)
    wide[:, 1:4] = x
    check(wide[:, 1:4], weight, [None] * 4, padding="causal", dilation=2)
    x, weight, extra = problem((2, 8, 6, 6), (3, 3), torch.float16, channels_last=True)
    check(x[..., ::2, 1:], weight, [*extra[:3], None])
    check(x.expand(2, 8, 6, 6)[:1].expand(3, 8, 6, 6), weight, [*extra[:3], None])


def test_refuses(native):
    x, weight, _ = problem((2, 8, 9), (3,), torch.float32)
    for wrong, options, message in (
        (weight, {"groups": 8, "pool": ("max", 2)}, "pools only"),
        (weight.expand(8, 2, 3), {"groups": 4}, "depthwise"),
        (weight, {"groups": 8, "activation": "tanh_sigmoid"}, "no gate"),
    ):
        with pytest.raises(RuntimeError, match=message):
            bmk.conv(x, wrong, backend="cuda", **options)
    assert native.used == []
