"""The calls and the candidates by which `python -m bigmodel_kernels tune` measures the Triton kernels of cross-entropy."""

from collections.abc import Iterator
from functools import partial

import torch

from bigmodel_kernels.ops.cross_entropy.op import cross_entropy
from bigmodel_kernels.testing import make
from bigmodel_kernels.tune import Problem, grid

ROWS, CLASSES = 4096, (1000, 50304)


def problems(dtype: torch.dtype, device: str, quick: bool) -> Iterator[Problem]:
    for classes in CLASSES[:1] if quick else CLASSES:
        logits = make(ROWS, classes, dtype=dtype).to(device)
        run = partial(cross_entropy, target=torch.arange(ROWS, device=device) % classes, reduction="none")
        changes = grid(BLOCK=(512, 1024, 2048, 4096, 8192), num_warps=(2, 4, 8, 16))
        for kernel in ("forward", "backward"):
            wanted = () if kernel == "forward" else (0,)
            yield Problem.of("cross_entropy", kernel, f"{kernel}_kernel", run, [logits], changes, wanted)
