"""Tile sizes of the Triton attention kernels, by kernel, GPU, element size and head dimension.

Nothing is tuned at the first call: the table is read. It was chosen by what the compiler reports for each row (registers
without spills in the loops, shared memory within the GPU's limit, checked by tests/ops/test_attention_triton_aot.py), and
has not been timed on a GPU.
"""

from __future__ import annotations

import functools

from bigmodel_kernels import _triton

# GPU -> kernel -> bytes per element -> head dimension up to -> (BLOCK_M, BLOCK_N, num_warps, num_stages)
# sm_90: 227 KB of shared memory; sm_80: 163 KB; sm_86, also for any other GPU: 99 KB.
TABLE = {
    "sm_90": {
        "forward": {
            2: {64: (128, 128, 8, 3), 128: (128, 128, 8, 2), 256: (128, 64, 8, 2)},
            4: {64: (64, 64, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 1)},
        },
        "query": {
            2: {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (64, 64, 8, 1)},
            4: {64: (64, 32, 8, 2), 128: (32, 32, 8, 1), 256: (16, 32, 8, 1)},
        },
        "key": {
            2: {64: (64, 128, 8, 3), 128: (64, 128, 8, 2), 256: (32, 64, 8, 1)},
            4: {64: (32, 64, 8, 2), 128: (32, 32, 8, 1), 256: (32, 16, 8, 1)},
        },
        "mask": {
            2: {64: (64, 64, 4, 1), 128: (64, 64, 4, 1), 256: (64, 64, 8, 1)},
            4: {64: (32, 32, 4, 1), 128: (32, 32, 4, 1), 256: (32, 32, 8, 1)},
        },
    },
}
TABLE["sm_80"] = TABLE["sm_86"] = TABLE["sm_90"]
INTERPRETER = {"forward": (32, 32, 4, 1), "query": (32, 32, 4, 1), "key": (32, 32, 4, 1), "mask": (32, 32, 4, 1)}
DROPOUT_KEYS = 64  # one call of Philox serves keys of a block of 64


@functools.cache
def gpu(device: int | None) -> str:
    if device is None:
        return "interpreter"
    capability = _triton.capability(device)
    return {9: "sm_90", 10: "sm_90"}.get(capability[0], "sm_80" if capability in ((8, 0), (8, 7)) else "sm_86")


@functools.cache
def config(name: str, kernel: str, element_size: int, head_dim: int, dropout: bool) -> dict[str, int]:
    """The launch constants of a kernel; head_dim is the larger of D and Dv."""
    if name == "interpreter":
        m, n, warps, stages = INTERPRETER[kernel]
    else:
        by_dim = TABLE[name][kernel][element_size]
        m, n, warps, stages = by_dim[min(d for d in by_dim if d >= head_dim)]
    if dropout and n % DROPOUT_KEYS:
        m, n = max(16, m * n // DROPOUT_KEYS), DROPOUT_KEYS
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
