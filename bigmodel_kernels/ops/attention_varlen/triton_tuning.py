"""The calls and the candidates by which `python -m bigmodel_kernels tune` measures the Triton kernels of attention_varlen."""

from collections.abc import Iterator
from functools import partial

import torch

from bigmodel_kernels.ops.attention.triton_configs import DESCRIBED, HEAD_DIMS
from bigmodel_kernels.ops.attention.triton_tuning import QUICK_HEAD_DIMS, QUICK_TILES, TILES
from bigmodel_kernels.ops.attention_varlen.op import attention_varlen
from bigmodel_kernels.testing import make
from bigmodel_kernels.tune import Problem, grid

HEADS, LENGTHS = 8, (1800, 100, 700, 1400, 96)  # of the sequences


def problems(dtype: torch.dtype, device: str, quick: bool) -> Iterator[Problem]:
    tiles = TILES[dtype.itemsize][: QUICK_TILES if quick else None]
    others = grid(num_warps=(8,) if quick else (4, 8), num_stages=(2,) if quick else (2, 3))
    changes = [{"BLOCK_M": m, "BLOCK_N": n, **other} for m, n in tiles for other in others]
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).to(device)
    options = {name: ends for name in ("cu_seqlens_q", "cu_seqlens_k")}
    options |= {name: max(LENGTHS) for name in ("max_seqlen_q", "max_seqlen_k")}
    causal = partial(attention_varlen, is_causal=True, **options)
    for head_dim in QUICK_HEAD_DIMS if quick else HEAD_DIMS:
        q, k, v = (make(sum(LENGTHS), HEADS, head_dim, dtype=dtype, seed=i).to(device) for i in range(3))
        for kernel in DESCRIBED:
            wanted = () if kernel == "forward" else (0, 1, 2)
            yield Problem.of("attention_varlen", kernel, f"{kernel}_kernel", causal, [q, k, v], changes, wanted)
