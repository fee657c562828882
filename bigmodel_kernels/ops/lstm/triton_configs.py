"""Tile sizes of the Triton sequence kernels, by kernel, element size and hidden size; one table for every GPU from sm_80 on.

Nothing is tuned at the first call: the table is read. Its rows were chosen by what the compiler reports for sm_80 and sm_90
(no spills, shared memory below the 99 KB that every one of them has), which tests/ops/test_lstm_triton.py checks; they have
not been timed on a GPU. Hidden sizes past the last row go step by step.
"""

from __future__ import annotations

import functools

# kernel -> bytes per element -> hidden size up to -> (BLOCK_B, num_warps)
TABLE = {
    "forward": {2: {16: (16, 1), 32: (16, 2), 64: (16, 4), 128: (16, 8)}, 4: {16: (16, 4), 32: (16, 4), 64: (16, 8)}},
    "backward": {2: {16: (16, 1), 32: (16, 2), 64: (16, 4), 128: (16, 8)}, 4: {16: (16, 4), 32: (16, 4), 64: (16, 8)}},
}


@functools.cache
def config(kernel: str, element_size: int, hidden: int) -> dict[str, int] | None:
    """The launch constants of a sequence kernel; None where the weights do not fit on chip."""
    by_hidden = TABLE[kernel][element_size]
    block_h = next((h for h in by_hidden if h >= hidden), None)
    if block_h is None:
        return None
    rows, warps = by_hidden[block_h]
    return {"BLOCK_B": rows, "BLOCK_H": block_h, "num_warps": warps, "num_stages": 1}
