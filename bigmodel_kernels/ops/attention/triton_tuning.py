"""The calls and the candidates by which `python -m bigmodel_kernels tune` measures the Triton kernels of attention."""

from collections.abc import Iterator
from functools import partial

import torch

from bigmodel_kernels.ops.attention.op import attention
from bigmodel_kernels.ops.attention.triton_configs import DESCRIBED, HEAD_DIMS
from bigmodel_kernels.testing import make
from bigmodel_kernels.tune import Problem, grid

BATCH, HEADS, LENGTH = 2, 8, 1024
TILES = {
    2: ((128, 128), (128, 64), (128, 32), (64, 128), (64, 64), (32, 128)),
    4: ((64, 32), (32, 32), (32, 16), (16, 16)),
}
QUICK_HEAD_DIMS, QUICK_TILES = (64, 128), 3


def problems(dtype: torch.dtype, device: str, quick: bool) -> Iterator[Problem]:
    size = dtype.itemsize
    copies = (1, 0) if size == 2 and device != "cpu" and torch.cuda.get_device_capability() >= (9, 0) else (0,)
    tiles = TILES[size][: QUICK_TILES if quick else None]
    others = grid(num_warps=(8,) if quick else (4, 8), num_stages=(2,) if quick else (2, 3), DESCRIPTORS=copies)
    changes = [{"BLOCK_M": m, "BLOCK_N": n, **other} for m, n in tiles for other in others]
    for head_dim in QUICK_HEAD_DIMS if quick else HEAD_DIMS:
        q, k, v = (make(BATCH, HEADS, LENGTH, head_dim, dtype=dtype, seed=i).to(device) for i in range(3))
        for kernel in DESCRIBED:
            wanted = () if kernel == "forward" else (0, 1, 2)
            causal = partial(attention, is_causal=True)
            yield Problem.of("attention", kernel, f"{kernel}_kernel", causal, [q, k, v], changes, wanted)
