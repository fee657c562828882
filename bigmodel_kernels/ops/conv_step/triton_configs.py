"""Tile sizes of the Triton kernel of conv_step, by the way it is used.

Nothing is tuned at the first call: the table is read. It was chosen by what the compiler reports for each row (no spills, whole
vectors loaded, checked by tests/ops/test_conv_step.py), and has not been timed on a GPU.
"""

from __future__ import annotations

from bigmodel_kernels import _tuned

# mixed, by the number of values up to: all values are in one program; (values, inputs at a time, num_warps).
# rows, by the inputs of a value up to: (values of a program, inputs at a time, num_warps).
TABLE = {
    "mixed": {64: (64, 128, 8), 128: (128, 64, 8), 256: (256, 32, 8)},
    "rows": {8: (256, 8, 4), 64: (64, 64, 4), 256: (16, 256, 4)},
}
MOST_VALUES = max(TABLE["mixed"])


@_tuned.cached
def config(device: int | None, kernel: str, element_size: int, size: int) -> dict[str, int]:
    """The launch constants for so many values (mixed) or inputs (rows); inputs past the last row are read by it, too."""
    rows = TABLE[kernel]
    row = min((s for s in rows if s >= size), default=max(rows))
    values, inputs, warps = rows[row]
    sizes = {"BLOCK_R": values, "BLOCK_K": inputs, "num_warps": warps}
    return _tuned.choose(_tuned.Row("conv_step", kernel, f"{8 * element_size}-bit", row), device, sizes)
