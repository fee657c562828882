"""Tile sizes of the Triton kernel of attention_decode, by element size and head dimension.

Nothing is tuned at the first call: the table is read. Its rows were chosen by what the compiler reports (no spills, shared memory
within every GPU's limit), which tests/ops/test_attention_decode_triton.py checks, and have not been timed on a GPU.
"""

from __future__ import annotations

from bigmodel_kernels import _tuned
from bigmodel_kernels.ops.attention.triton_configs import HEAD_DIMS

# Element size of the queries -> head dimension up to -> (BLOCK_N, num_warps, num_stages), on all GPUs. Its tiles have as many
# rows as a key head has queries, up to the last of HEIGHTS.
TABLE = {
    2: {64: (64, 4, 3), 128: (32, 4, 3), 256: (32, 4, 2)},
    4: {64: (32, 4, 2), 128: (32, 8, 2), 256: (16, 8, 2)},
}
# The same for caches of 8 bits.
TABLE_8_BITS = {
    2: {64: (64, 4, 3), 128: (32, 4, 3), 256: (32, 4, 2)},
    4: {64: (32, 4, 2), 128: (32, 8, 2), 256: (16, 8, 2)},
}
HEIGHTS = {2: (16, 32), 4: (16,)}
INTERPRETER = (32, 4, 1)


@_tuned.cached
def config(
    gpu: str, device: int | None, element_size: int, of_8_bits: bool, head_dim: int, rows: int
) -> dict[str, int]:
    """The launch constants of decode_kernel; `of_8_bits` are the caches, `rows` is how many queries a key head has."""
    row = next(d for d in HEAD_DIMS if d >= head_dim)
    table = TABLE_8_BITS if of_8_bits else TABLE
    n, warps, stages = INTERPRETER if gpu == "interpreter" else table[element_size][row]
    heights = HEIGHTS[element_size]
    block_m = next((m for m in heights if m >= rows), heights[-1])
    sizes = {"BLOCK_M": block_m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
    more = f"rows {block_m}{' caches of 8 bits' if of_8_bits else ''}"
    return _tuned.choose(_tuned.Row("attention_decode", "split", f"{8 * element_size}-bit", row, more), device, sizes)
