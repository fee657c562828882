"""The calls and the candidates by which `python -m bigmodel_kernels tune` measures the Triton kernels of convolution."""

from collections.abc import Iterator
from functools import partial

import torch

from bigmodel_kernels.ops.conv.op import conv
from bigmodel_kernels.ops.conv.triton_configs import TABLE
from bigmodel_kernels.testing import make
from bigmodel_kernels.tune import Problem, grid

IMAGES, CHANNELS, SIZE = 16, 64, 56
FUNCTIONS = {
    "product": "product_kernel",
    "gather": "product_kernel",
    "weights": "weights_kernel",
    "direct": "direct_kernel",
    "direct_weights": "direct_weights_kernel",
    "image": "spread_kernel",
}


def problems(dtype: torch.dtype, device: str, quick: bool) -> Iterator[Problem]:
    for kernel, function in FUNCTIONS.items():
        warps = (4, 8)
        if kernel in ("product", "gather", "weights"):
            steps, stages = ((32,), (3,)) if quick else ((16, 32, 64), (2, 3, 4))
            changes = grid(BLOCK_M=(64, 128), BLOCK_K=steps, num_warps=warps, num_stages=stages)
        else:
            changes = grid(BLOCK_M=(16, 32, 64), BLOCK_N=(32, 64), num_warps=warps)
        direct = kernel.startswith("direct")
        for columns in TABLE[kernel][dtype.itemsize]:
            x = make(IMAGES, columns if direct else CHANNELS, SIZE, SIZE, dtype=dtype).to(device)
            if kernel != "gather":
                x = x.contiguous(memory_format=torch.channels_last)
            weight = make(columns, 1 if direct else CHANNELS, 3, 3, dtype=dtype, seed=1).to(device) / 24
            run = partial(conv, padding=1, groups=columns if direct else 1)
            if kernel == "image":
                run = partial(run, activation="silu", pool=("max", 3, 2))
            wanted = {"weights": (1,), "direct_weights": (1,), "image": (0,)}.get(kernel, ())
            yield Problem.of("conv", kernel, function, run, [x, weight], changes, wanted)
