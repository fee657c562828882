"""Tile sizes of the Triton sequence kernels, forward and backward, by GPU, arithmetic and hidden size.

Nothing is tuned at the first call: the table is read. Its rows were chosen by what the compiler reports (no spills, shared
memory within the GPU's limit), which tests/ops/test_lstm_triton.py checks, and have not been timed on a GPU. Hidden sizes past
the last row go step by step.

IEEE float32 has one row of the batch per program: rows do not share what is read from shared memory, which is the floor of a
step there, so more of them would only make it longer. Matrix units take 16 rows.
"""

from __future__ import annotations

import torch

from bigmodel_kernels import _tuned

# GPU -> arithmetic -> hidden size up to -> (BLOCK_B, num_warps)
TABLE = {
    "sm_86": {  # 99 KB of shared memory; also for any other GPU
        "ieee": {16: (1, 1), 32: (1, 1), 64: (1, 2)},
        "tf32": {16: (16, 1), 32: (16, 2), 64: (16, 8)},
        "16-bit": {16: (16, 1), 32: (16, 2), 64: (16, 4)},
    },
    "interpreter": {
        "ieee": {16: (4, 1), 32: (4, 1), 64: (4, 1)},
        "16-bit": {16: (4, 1), 32: (4, 1), 64: (4, 1), 128: (4, 1)},
    },
}
# 163 and 227 KB
TABLE["sm_80"] = TABLE["sm_86"] | {"16-bit": TABLE["sm_86"]["16-bit"] | {128: (16, 16)}}
TABLE["sm_90"] = TABLE["sm_80"]


@_tuned.cached
def config(
    gpu: str, device: int | None, kernel: str, dtype: torch.dtype, precision: str, hidden: int
) -> dict[str, int] | None:
    """The launch constants of a sequence kernel, forward or backward; None where the weights do not fit on chip."""
    arithmetic = precision if dtype == torch.float32 else "16-bit"
    by_hidden = TABLE[gpu][arithmetic]
    block_h = next((h for h in by_hidden if h >= hidden), None)
    if block_h is None:
        return None
    rows, warps = by_hidden[block_h]
    sizes = {"BLOCK_B": rows, "BLOCK_H": block_h, "num_warps": warps, "num_stages": 1}
    return _tuned.choose(_tuned.Row("lstm", kernel, arithmetic, block_h), device, sizes)
