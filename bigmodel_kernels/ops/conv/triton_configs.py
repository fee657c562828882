"""Tile sizes of the Triton convolution kernels, by kernel, GPU, element size and number of output channels.

Nothing is tuned at the first call: the table is read. It was chosen by what the compiler reports for each row (no spills,
shared memory within the GPU's limit, checked by tests/ops/test_conv_triton_aot.py), and has not been timed on a GPU.
"""

from __future__ import annotations

import functools

from bigmodel_kernels import _tuned

# kernel -> bytes per element -> columns up to -> (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages)
# product: pixels, output channels, taps * channels; gather: the same kernel where elements are read or written one by one,
# because channels are few or not adjacent, and each has an address in registers. weights: taps * channels, narrow channels,
# pixels. direct_weights: pixels, channels, taps. direct and image, the kernels of triton_image.py: pixels, channels.
TABLE = {
    "product": {
        2: {16: (128, 16, 64, 4, 3), 32: (128, 32, 64, 4, 3), 64: (128, 64, 64, 8, 3), 128: (128, 128, 64, 8, 3)},
        4: {16: (64, 16, 32, 4, 2), 32: (64, 32, 32, 4, 2), 64: (64, 64, 16, 8, 2)},
    },
    "gather": {
        2: {16: (64, 16, 32, 4, 2), 32: (64, 32, 32, 4, 2), 64: (64, 64, 32, 8, 2)},
        4: {16: (64, 16, 32, 4, 2), 32: (64, 32, 16, 4, 2), 64: (64, 64, 16, 8, 2)},
    },
    "weights": {
        2: {16: (128, 16, 32, 4, 2), 32: (128, 32, 32, 4, 2), 64: (128, 64, 32, 8, 2)},
        4: {16: (64, 16, 32, 4, 2), 32: (64, 32, 16, 4, 2), 64: (64, 64, 16, 8, 2)},
    },
    "direct": {2: {64: (32, 64, 0, 4, 1)}, 4: {64: (32, 64, 0, 4, 1)}},
    "direct_weights": {2: {32: (16, 32, 8, 4, 1)}, 4: {32: (16, 32, 8, 4, 1)}},
    "image": {2: {64: (32, 64, 0, 4, 1)}, 4: {64: (32, 64, 0, 4, 1)}},
}
INTERPRETER = {  # its time goes by operations, not by their size
    "product": (256, 16, 32, 4, 1),
    "gather": (256, 16, 32, 4, 1),
    "weights": (64, 16, 256, 4, 1),
    "direct": (256, 16, 0, 4, 1),
    "direct_weights": (128, 16, 4, 4, 1),
    "image": (256, 16, 0, 4, 1),
}
SMALLEST_STEP = 32  # bytes of channels a step of the product reads at least, unless steps run across taps


@_tuned.cached
def config(gpu: str, device: int | None, kernel: str, element_size: int, columns: int) -> dict[str, int]:
    """The launch constants of a kernel on a GPU (see _triton.gpu) and device, for so many output channels."""
    rows = TABLE[kernel][element_size]
    row = min((c for c in rows if c >= columns), default=max(rows))
    m, n, k, warps, stages = INTERPRETER[kernel] if gpu == "interpreter" else rows[row]
    sizes = {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
    name = _tuned.Row("conv", kernel, f"{8 * element_size}-bit", row)
    return _tuned.choose(name, device, sizes | {"BLOCK_K": k} if k else sizes)


def product_config(
    gpu: str, device: int | None, element_size: int, columns: int, channels: int, taps: int, adjacent: bool, gated: bool
) -> dict[str, int]:
    """The launch constants of the implicit GEMM, FLAT included; `adjacent` tells of the channels of input and output."""
    kernel = "product" if adjacent and step(64, channels, taps * channels, element_size)[1] == 0 else "gather"
    sizes = dict(config(gpu, device, kernel, element_size, columns))
    sizes["BLOCK_K"], sizes["FLAT"] = step(sizes["BLOCK_K"], channels, taps * channels, element_size)
    if gated:  # two products share the registers
        sizes["BLOCK_N"] = max(16, sizes["BLOCK_N"] // 2)
    return sizes


@functools.cache
def step(block_k: int, channels: int, total: int, element_size: int) -> tuple[int, int]:
    """(BLOCK_K, FLAT): the largest step that divides the channels, or one across taps, FLAT being the channels then."""
    size = block_k
    while size > 16 and size * element_size > SMALLEST_STEP and channels % size:
        size //= 2
    if channels % size == 0:
        return size, 0
    return min(block_k, max(16, 1 << (total - 1).bit_length())), channels
