"""Depthwise convolutions and those with few input channels on the GPU: against float64 and PyTorch's own in the same dtype."""

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.testing import assert_matches, make

ALL, SHORT = [torch.float32, torch.float16, torch.bfloat16], [torch.float16, torch.bfloat16]
# batch, channels and size; output channels; kernel; options; dtypes
DEPTHWISE = [
    ((4, 64, 56, 56), 64, (3, 3), {"padding": 1, "groups": 64}, ALL),
    ((2, 96, 28, 30), 96, (7, 7), {"padding": 3, "groups": 96}, ALL),
    ((2, 33, 29, 31), 33, (5, 5), {"stride": 2, "padding": 2, "groups": 33}, ALL),
    ((4, 128, 1000), 128, (4,), {"padding": "causal", "groups": 128}, ALL),
]
STEMS = [
    ((2, 3, 224, 224), 64, (7, 7), {"stride": 2, "padding": 3, "pool": ("max", 3, 2, 1)}, SHORT),
    ((8, 3, 32, 32), 16, (5, 5), {"padding": 2, "pool": ("max", 2)}, SHORT),
    ((3, 1, 28, 28), 6, (5, 5), {"pool": ("avg", 2)}, SHORT),
    ((2, 4, 3000), 40, (9,), {"stride": 2, "padding": 4}, SHORT),
]
CASES = [(*case, dtype) for *case, dtypes in DEPTHWISE + STEMS for dtype in dtypes]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("shape", "channels", "kernel", "options", "dtype"), CASES, ids=str)
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
