"""Tile sizes of the Triton kernels of WaveNet's layer, by element size and number of values (D).

Nothing is tuned at the first call: the table is read. It was chosen by what the compiler reports for each row (no spills in
loops, shared memory within the GPU's limit, checked by tests/ops/test_gated_conv_triton.py), and has not been timed on a GPU.
"""

from __future__ import annotations

from bigmodel_kernels import _tuned

# kernel -> bytes per element -> values up to -> (time steps, channels of a step of a product, num_warps, num_stages).
# forward has all values in one program: more than its last row's go as three convolutions. gradient has as many as its row says.
TABLE = {
    "forward": {
        2: {64: (64, 32, 4, 2), 128: (64, 32, 8, 3), 256: (64, 16, 16, 2)},
        4: {32: (32, 16, 4, 2), 64: (32, 16, 8, 2)},
    },
    "gradient": {2: {64: (64, 16, 8, 3)}, 4: {32: (32, 16, 4, 2)}},
}
INTERPRETER = (128, 64, 4, 1)  # its time goes by operations, not by their size


@_tuned.cached
def config(gpu: str, device: int | None, kernel: str, element_size: int, values: int) -> dict[str, int] | None:
    """The launch constants; None where no row has so many values, and the kernel needs them all."""
    rows = TABLE[kernel][element_size]
    row = min((d for d in rows if d >= values), default=max(rows))
    if row < values and kernel == "forward":
        return None
    steps, channels, warps, stages = INTERPRETER if gpu == "interpreter" else rows[row]
    sizes = {"BLOCK_M": steps, "BLOCK_D": row, "BLOCK_K": channels, "num_warps": warps, "num_stages": stages}
    return _tuned.choose(_tuned.Row("gated_conv", kernel, f"{8 * element_size}-bit", row), device, sizes)
