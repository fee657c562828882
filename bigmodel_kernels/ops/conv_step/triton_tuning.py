"""The calls and the candidates by which `python -m bigmodel_kernels tune` measures the Triton kernel of conv_step."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bigmodel_kernels.ops.conv_step.op import ConvState, conv_step
from bigmodel_kernels.ops.conv_step.triton_configs import TABLE
from bigmodel_kernels.testing import make
from bigmodel_kernels.tune import Problem, grid

SEQUENCES, KERNEL, DILATION = 8, 2, 16


def step(x_t: Tensor, weight: Tensor, *mix: Tensor, activation: str, backend: str) -> Tensor:
    """The first result of a first step."""
    state = ConvState.start(x_t.shape[0], x_t.shape[1], KERNEL, DILATION, x_t)
    return conv_step(x_t, state, weight, None, *mix, dilation=DILATION, activation=activation, backend=backend)[0]


def problems(dtype: torch.dtype, device: str, quick: bool) -> Iterator[Problem]:
    warps = (4, 8) if quick else (2, 4, 8, 16)
    for kernel, sizes in TABLE.items():
        for size in sizes:
            mixed = kernel == "mixed"
            channels = size if mixed else size // KERNEL
            rows = 2 * channels if mixed else max(64, channels)
            shapes = [(SEQUENCES, channels), (rows, channels, KERNEL)] + [(channels, channels, 1)] * mixed
            tensors = [make(*s, dtype=dtype, seed=i).to(device) / (s[1] * i + 1) for i, s in enumerate(shapes)]
            changes = grid(BLOCK_K=(16, 32, 64, 128, 256), num_warps=warps)
            if not mixed:
                changes = grid(BLOCK_R=(8, 16, 32, 64, 128), num_warps=warps)
            run = partial(step, activation="tanh_sigmoid" if mixed else "relu")
            yield Problem.of("conv_step", kernel, "step_kernel", run, tensors, changes)
