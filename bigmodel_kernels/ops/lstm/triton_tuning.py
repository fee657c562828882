"""The calls and the candidates by which `python -m bigmodel_kernels tune` measures the Triton kernels of a whole LSTM layer."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bigmodel_kernels.ops.lstm.op import lstm
from bigmodel_kernels.testing import make
from bigmodel_kernels.tune import Problem, grid

STEPS, BATCH = 128, 64
HIDDEN = (16, 32, 64, 128)


def _layer(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor, backend: str) -> Tensor:
    return lstm(x, (h, c), list(weights), backend=backend)[0]


def problems(dtype: torch.dtype, device: str, quick: bool) -> Iterator[Problem]:
    rows = (16, 32) if dtype.itemsize == 2 else (1, 2, 4)
    changes = grid(BLOCK_B=rows[:1] if quick else rows, num_warps=(1, 2, 4, 8, 16))
    for hidden in HIDDEN:
        shapes = (
            (STEPS, BATCH, hidden),
            (1, BATCH, hidden),
            (1, BATCH, hidden),
            (4 * hidden, hidden),
            (4 * hidden, hidden),
        )
        tensors = [
            make(*shape, dtype=dtype, seed=i).to(device)
            for i, shape in enumerate((*shapes, (4 * hidden,), (4 * hidden,)))
        ]
        tensors[3:] = [t / hidden**0.5 for t in tensors[3:]]
        for kernel in ("forward", "backward"):
            wanted = () if kernel == "forward" else (0, 1, 2, 3, 4, 5, 6)
            yield Problem.of("lstm", kernel, f"{kernel}_kernel", _layer, tensors, changes, wanted)
