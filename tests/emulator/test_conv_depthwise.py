"""The CUDA kernel of depthwise convolutions, emulated: against float64 and PyTorch's own convolution in the same dtype."""

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.ops.conv.op import ACTIVATIONS
from bigmodel_kernels.testing import assert_matches, make
from tests.emulator.backend import SUFFIX, emulated
from tests.emulator.emulator import Program, needs_compiler

pytestmark = needs_compiler
THREADS, RUN = 128, 4
HEIGHTS = (3, 5, 7)
NAMES = ["none", *(name for name in ACTIVATIONS if name != "tanh_sigmoid")]
ORDER = ["none", "relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu"]  # of Activation


def kernel_name(dtype: torch.dtype, vector: int, channels_last: bool, height: int) -> str:
    return f"bmk::depthwise_forward<{SUFFIX[dtype]}, {vector}, {str(channels_last).lower()}, {height}>"


VARIANTS = [
    (dtype, *variant)
    for dtype in SUFFIX
    for variant in [
        (16 // dtype.itemsize, True, 0),
        (16 // dtype.itemsize, True, 3),
        (1, True, 0),
        (1, False, 0),
        (1, False, 3),
    ]
]
VARIANTS += [
    (torch.float16, 8, True, 7),
    (torch.float32, 1, False, 5),
    (torch.float16, 8, True, 5),
    (torch.float32, 1, False, 7),
]
DEPTHWISE = Program("conv_depthwise.cuh", *(kernel_name(*variant) for variant in VARIANTS))


def _strides(t: torch.Tensor | None) -> tuple[int, ...]:
    if t is None:
        return (0, 0, 0, 0)
    return t.stride() if t.dim() == 4 else (t.stride(0), t.stride(1), 0, t.stride(2))


def _has_vectors(t: torch.Tensor, elements: int) -> bool:
    steps = [t.shape[1], *(t.stride(i) for i in (0, 2, 3))]
    return t.stride(1) == 1 and t.data_ptr() % 16 == 0 and all(step % elements == 0 for step in steps)


class Native:
    """The native op of csrc/cuda/conv_depthwise.cu, with its launch run by the emulator."""

    def __init__(self):
        self.used = []

    def conv_depthwise_fwd(
        self, x, weight, bias, scale, shift, residual, stride, padding, dilation, activation, slope, out
    ):
        def both(values, otherwise):
            return [otherwise, *values] if len(values) == 1 else list(values)

        batch, channels = x.shape[:2]
        (in_h, in_w), (out_h, out_w) = both(x.shape[2:], 1), both(out.shape[2:], 1)
        kernel = both(weight.shape[:-1], 1)
        strides, dilations = both(stride, 1), both(dilation, 1)
        vector = 16 // x.element_size()
        channels_last = out.dim() == 4 and channels > 1 and out.stride(1) == 1
        vectors = channels_last and all(_has_vectors(t, vector) for t in (x, residual, out) if t is not None)
        slides = (vectors or not channels_last) and strides[0] == dilations[0] == 1 and out_h > 1
        height = kernel[0] if slides and kernel[0] in HEIGHTS else 0
        runs = -(-out_h // (RUN if height else 1)) * out_w
        per_image = runs * (channels // vector if vectors else channels) if channels_last else runs
        blocks = -(-per_image // THREADS)
        variant = (x.dtype, vector if vectors else 1, channels_last, height)
        self.used.append(variant)
        arguments = (
            x, weight, (bias, scale, shift, ORDER.index(activation), slope), residual, out,
            _strides(x), _strides(residual), _strides(out),
            channels, in_h, in_w, out_h, out_w, *kernel, *strides, *both(padding, 0), *dilations,
            per_image, blocks,
        )  # fmt: skip
        images = batch if channels_last else batch * channels
        DEPTHWISE.run(kernel_name(*variant), images * blocks, THREADS, arguments)


@pytest.fixture
def native(monkeypatch):
    native = Native()
    with emulated(monkeypatch, "conv", conv_depthwise_fwd=native.conv_depthwise_fwd):
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
    assert native.used[-1][2] == channels_last


@pytest.mark.parametrize("kernel", [5, 7])
def test_taller_kernels(kernel, native):
    for dtype, channels_last in ((torch.float16, True), (torch.float32, False)):
        x, weight, extra = problem((2, 8, 10, 6), (kernel, kernel), dtype, channels_last, padding=kernel // 2)
        check(x, weight, extra, padding=kernel // 2)
        assert native.used[-1][3] == kernel


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
        (weight.clone().requires_grad_(), {"groups": 8}, "no backward"),
    ):
        with pytest.raises(RuntimeError, match=message):
            bmk.conv(x, wrong, backend="cuda", **options)
    assert native.used == []
