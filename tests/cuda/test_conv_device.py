"""Depthwise convolutions and those with few input channels on the GPU: against float64 and PyTorch's own in the same dtype."""

import math

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.testing import assert_matches, make

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# batch, channels and size; output channels; kernel; options
DEPTHWISE = [
    ((4, 64, 56, 56), 64, (3, 3), {"padding": 1, "groups": 64}),
    ((2, 96, 28, 30), 96, (7, 7), {"padding": 3, "groups": 96}),
    ((2, 33, 29, 31), 33, (5, 5), {"stride": 2, "padding": 2, "groups": 33}),
    ((4, 128, 1000), 128, (4,), {"padding": "causal", "groups": 128}),
]
STEMS = [
    ((2, 3, 224, 224), 64, (7, 7), {"stride": 2, "padding": 3, "pool": ("max", 3, 2, 1)}),
    ((8, 3, 32, 32), 16, (5, 5), {"padding": 2, "pool": ("max", 2)}),
    ((3, 1, 28, 28), 6, (5, 5), {"pool": ("avg", 2)}),
    ((2, 4, 3000), 40, (9,), {"stride": 2, "padding": 4}),
]
TINY = [
    ((2, 3, 9, 9), 8, (3, 3), {"padding": 1, "pool": ("max", 3, 2, 1)}),
    ((2, 8, 7, 7), 8, (3, 3), {"padding": 1, "groups": 8}),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("shape", "channels", "kernel", "options"), DEPTHWISE + STEMS, ids=str)
def test_matches_float64(shape, channels, kernel, options, dtype, channels_last):
    depth = shape[1] // options.get("groups", 1)
    x = make(*shape, seed=1).to(dtype).cuda()
    weight = (make(channels, depth, *kernel, seed=2) * (depth * kernel[0] * kernel[-1]) ** -0.5).to(dtype).cuda()
    bias, scale, shift = (make(channels, seed=i).to(dtype).cuda() for i in (3, 4, 5))
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)

    def run(backend, dtype):
        tensors = [t.to(dtype) for t in (x, weight, bias, scale, shift)]
        return bmk.conv(*tensors[:3], scale=tensors[3], shift=tensors[4], activation="silu", backend=backend, **options)

    actual, expected = run("cuda", dtype), run("torch", dtype)
    assert actual.stride() == expected.stride()
    assert_matches(actual, run("torch", torch.float64), expected, dtype=dtype)
    assert torch.equal(actual, run("cuda", dtype))


def check_gradients(shape, channels, kernel, options, dtype, channels_last, activation):
    depth = shape[1] // options.get("groups", 1)
    tensors = {"x": make(*shape, seed=1), "weight": make(channels, depth, *kernel, seed=2) * (depth * 9) ** -0.5}
    tensors |= {name: make(channels, seed=i) for i, name in enumerate(("bias", "scale", "shift"), 3)}
    tensors = {name: t.to(dtype).cuda() for name, t in tensors.items()}
    if channels_last and len(shape) == 4:
        tensors["x"] = tensors["x"].contiguous(memory_format=torch.channels_last)

    def run(backend, dtype):
        leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in tensors.items()}
        out = bmk.conv(**leaves, **options, activation=activation, backend=backend)
        upstream = make(*out.shape, seed=9).to(dtype).cuda()
        return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), upstream)))

    actual, exact, again = run("cuda", dtype), run("torch", torch.float64), run("cuda", dtype)
    for name, found in actual.items():
        # Sums over all pixels may cancel: their size is that of as many terms of both signs.
        terms = (out_pixels(shape) if name != "x" else 1) ** 0.5
        assert_matches(
            found, exact[name], None, dtype=dtype, gradient=True, magnitude=0.1 * terms, name=name
        )  # fmt: skip
        assert torch.equal(found, again[name])


def out_pixels(shape) -> int:
    return shape[0] * math.prod(shape[2:]) // 16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("shape", "channels", "kernel", "options"), DEPTHWISE + STEMS, ids=str)
def test_gradients_match_float64(shape, channels, kernel, options, dtype, channels_last):
    check_gradients(shape, channels, kernel, options, dtype, channels_last, "silu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "channels", "kernel", "options"), TINY, ids=str)
def test_tiny(shape, channels, kernel, options, dtype):
    """For the sanitizer."""
    check_gradients(shape, channels, kernel, options, dtype, False, "relu")
