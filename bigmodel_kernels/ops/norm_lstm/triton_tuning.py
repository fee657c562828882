"""The calls and the candidates by which `python -m bigmodel_kernels tune` measures the Triton kernels of norm_lstm."""

from collections.abc import Iterator

import torch

from bigmodel_kernels.ops.norm_lstm.op import norm_lstm
from bigmodel_kernels.ops.norm_lstm.triton_step import LARGEST_HIDDEN
from bigmodel_kernels.testing import make
from bigmodel_kernels.tune import Problem, grid

STEPS, BATCH, SIZES = 4, 256, (64, 128, 256, 512, 1024, LARGEST_HIDDEN)


def _run(a, h, c, w, gain, gain_c, bias_c, *, backend: str) -> torch.Tensor:
    return norm_lstm(a, (h, c), w, gain, gain_c, bias_c, backend=backend)[0]


def problems(dtype: torch.dtype, device: str, quick: bool) -> Iterator[Problem]:
    for hidden in SIZES[::2] if quick else SIZES:
        rows = 4 * hidden
        shapes = [(STEPS, BATCH, rows), *[(BATCH, hidden)] * 2, (rows, hidden), (rows,), (hidden,), (hidden,)]
        tensors = [make(*shape, dtype=dtype, seed=i).to(device) for i, shape in enumerate(shapes)]
        tensors[3] *= hidden**-0.5
        for kernel in ("forward", "backward"):
            wanted = () if kernel == "forward" else tuple(range(len(tensors)))
            changes = grid(num_warps=(1, 2, 4, 8, 16))
            yield Problem.of("norm_lstm", kernel, f"{kernel}_kernel", _run, tensors, changes, wanted)
