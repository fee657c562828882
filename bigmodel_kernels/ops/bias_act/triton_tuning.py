"""The calls and the candidates by which `python -m bigmodel_kernels tune` measures the Triton kernels of bias_act."""

from collections.abc import Iterator
from functools import partial

import torch

from bigmodel_kernels.ops.bias_act.op import bias_act
from bigmodel_kernels.testing import make
from bigmodel_kernels.tune import Problem, grid

ROWS, COLUMNS = 8192, (128, 4096)


def problems(dtype: torch.dtype, device: str, quick: bool) -> Iterator[Problem]:
    for columns in COLUMNS[1:] if quick else COLUMNS:
        x, bias = make(ROWS, columns, dtype=dtype).to(device), make(columns, dtype=dtype, seed=1).to(device)
        changes = grid(BLOCK_R=(1, 2, 4, 8, 16), BLOCK_C=(128, 256, 512, 1024), num_warps=(4, 8))
        for kernel in ("forward", "backward"):
            wanted = () if kernel == "forward" else (0, 1)
            run = partial(bias_act, activation="gelu")
            yield Problem.of("bias_act", kernel, f"{kernel}_kernel", run, [x, bias], changes, wanted)
