"""The calls and the candidates by which `python -m bigmodel_kernels tune` measures the Triton kernels of WaveNet's layer."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bigmodel_kernels.ops.gated_conv.op import gated_conv
from bigmodel_kernels.ops.gated_conv.triton_configs import TABLE
from bigmodel_kernels.testing import make
from bigmodel_kernels.tune import Problem, grid

BATCH, LENGTH, DILATION = 4, 16000, 16


def layer(x: Tensor, weight: Tensor, out_weight: Tensor, *, backend: str) -> Tensor:
    return gated_conv(x, weight, None, out_weight, dilation=DILATION, backend=backend)[0]


def problems(dtype: torch.dtype, device: str, quick: bool) -> Iterator[Problem]:
    steps, stages = ((32,), (3,)) if quick else ((16, 32, 64), (2, 3, 4))
    changes = grid(BLOCK_M=(32, 64, 128), BLOCK_K=steps, num_warps=(4, 8, 16), num_stages=stages)
    for kernel, by_size in TABLE.items():
        for values in by_size[dtype.itemsize]:
            shapes = (BATCH, LENGTH, values), (2 * values, values, 2), (values, values, 1)
            x, *weights = (make(*s, dtype=dtype, seed=i).to(device) for i, s in enumerate(shapes))
            tensors = [x.transpose(1, 2), *(w / values**0.5 for w in weights)]
            wanted = () if kernel == "forward" else (0,)
            yield Problem.of("gated_conv", kernel, f"{kernel}_kernel", layer, tensors, changes, wanted)
