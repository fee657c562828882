"""What the plans in Python say of a block's shared memory is what the launchers in csrc/cuda/*.cu ask for."""

import itertools

import pytest
import torch

from bigmodel_kernels.ops.conv import cuda as conv
from bigmodel_kernels.ops.conv_step import cuda as conv_step
from bigmodel_kernels.ops.lstm.cuda_plan import BACKWARD, FORWARD, STREAMED_REGISTERS
from tests.emulator.backend import SUFFIX
from tests.emulator.emulator import HERE, Program, needs_compiler
from tests.emulator.shared_sizes import decode_shared_bytes

pytestmark = needs_compiler
CACHES = ["as_query", "int8", "e4m3"]
LSTM = [f"bmk::lstm_bytes<{SUFFIX[dtype]}>" for dtype in (torch.float32, torch.float16)]
DECODE = [f"bmk::decode_bytes<bmk::Cache::{cache}, {head}>" for cache in CACHES for head in (64, 128)]
STEM = [
    (name, dtype, channels, save)
    for dtype, channels, save in itertools.product((torch.float32, torch.float16), (16, 64), (False, True))
    for name in [f"bmk::stem_bytes<{SUFFIX[dtype]}, {channels}, {str(save).lower()}>"]
]
WEIGHTS = [
    (f"bmk::stem_weights_bytes<{SUFFIX[dtype]}, {channels}>", dtype, channels)
    for dtype, channels in itertools.product((torch.float32, torch.float16), (32, 64))
]
STEP = [f"bmk::step_bytes<{SUFFIX[dtype]}>" for dtype in (torch.float32, torch.float16)]
SIZES = Program(
    HERE / "launch_sizes.cuh", *LSTM, *DECODE, *STEP, *(name for name, *_ in STEM), *(name for name, *_ in WEIGHTS)
)
GEOMETRIES = [  # input channels, kernel, stride, dilation, pool, tile
    (3, (7, 7), [2, 2], [1, 1], [3, 3, 2, 2, 1, 1], (8, 8)),
    (1, (1, 9), [1, 2], [1, 3], [1, 2, 1, 2, 0, 0], (1, 64)),
]


def bytes_of(kernel: str, *arguments) -> int:
    found = torch.zeros(1, dtype=torch.int32)
    SIZES.run(kernel, 1, 1, *arguments, found)
    return int(found)


@pytest.mark.parametrize("kernel", LSTM)
@pytest.mark.parametrize("hidden", [1, 33, 128, 500])
@pytest.mark.parametrize("warps", [1, 5])
def test_lstm(kernel, hidden, warps):
    size = 4 if "float" in kernel else 2
    for forward, plans in ((True, FORWARD), (False, BACKWARD)):
        for scope, registers in ((2, plans[size].registers), (3, STREAMED_REGISTERS)):
            expected = plans[size].shared_bytes(hidden, registers, warps, streamed=scope == 3)
            assert bytes_of(kernel, forward, scope, hidden, registers, warps) == expected


def strides():
    return (0, 0, 0, 0)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_few_channels(geometry):
    in_channels, kernel, stride, dilation, pool, tile = geometry
    window = (*kernel, *stride, 0, 0, *dilation)
    source = (None, strides(), in_channels, 100, 100)
    for name, dtype, channels, save in STEM:
        parameters = (
            source, window, (1, *pool), None, None, None, None, (None, None, None, 0, 0.0), strides(), strides(), strides(),
            channels, 50, 50, 25, 25, *tile,
        )  # fmt: skip
        shape = (channels, in_channels, *kernel)
        expected = conv.stem_shared_bytes(shape, stride, dilation, pool, dtype.itemsize, save, tile)
        assert bytes_of(name, parameters) == expected
    for name, dtype, channels in WEIGHTS:
        tail = (*[None] * 4, *[strides()] * 4, 0, 0.0, (1, *pool), 1, channels, 50, 50, 25, 25)
        expected = conv.stem_gradient_shared_bytes(
            (channels, in_channels, *kernel), stride, dilation, dtype.itemsize, tile
        )
        assert bytes_of(name, (source, window, tail, None, *tile)) == expected


@pytest.mark.parametrize("kernel", DECODE)
def test_decode(kernel):
    cache, head_dim = kernel.split("::")[-1].rstrip(">").split(", ")
    assert bytes_of(kernel) == decode_shared_bytes(2 if cache == "as_query" else 1, int(head_dim))


@pytest.mark.parametrize("kernel", STEP)
def test_conv_step(kernel):
    size = 4 if "float" in kernel else 2
    for rows, channels, taps, groups, gated, share in (
        (128, 64, 2, 1, True, 64), (9, 6, 5, 3, False, 16), (40, 8, 2, 2, True, 16), (35, 35, 4, 35, False, 16),
        (0, 3, 2, 1, False, 16),
    ):  # fmt: skip
        pointers = (None, 0, 0, *[None] * 13)
        numbers = (1, channels, rows, taps, 1, groups, 0, 0, share, gated, 0, 0.0)
        for sequences in (1, 4):
            expected = conv_step.shared_bytes(rows, channels, taps, groups, gated, share, sequences, size)
            assert bytes_of(kernel, (*pointers, *numbers), sequences) == expected
