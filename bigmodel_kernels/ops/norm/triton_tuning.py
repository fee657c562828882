"""The calls and the candidates by which `python -m bigmodel_kernels tune` measures the Triton kernels of normalisation."""

from collections.abc import Iterator

import torch

from bigmodel_kernels.ops.norm.op import layer_norm
from bigmodel_kernels.testing import make
from bigmodel_kernels.tune import Problem, grid

ROWS, COLUMNS = 8192, (256, 1024, 4096)


def problems(dtype: torch.dtype, device: str, quick: bool) -> Iterator[Problem]:
    for columns in COLUMNS[:2] if quick else COLUMNS:
        x, weight, bias = (
            make(*s, dtype=dtype, seed=i).to(device) for i, s in enumerate(((ROWS, columns), (columns,), (columns,)))
        )
        changes = grid(BLOCK_R=(1, 2, 4, 8), num_warps=(4, 8, 16))
        for kernel in ("forward", "backward"):
            wanted = () if kernel == "forward" else (0, 1, 2)
            yield Problem.of("norm", kernel, f"{kernel}_kernel", layer_norm, [x, weight, bias], changes, wanted)
