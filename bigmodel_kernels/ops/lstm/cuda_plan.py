"""Which CUDA kernel runs the steps of an LSTM layer, on how many blocks and warps: from the sizes and the GPU's properties alone.

The recurrent weights stay in registers and shared memory for the whole sequence, as long as the GPU has room. Up to 128 units
(float32: 64) one block holds them; beyond, the blocks of a cluster (sm_90) or blocks anywhere on the GPU share them and hand each
other what a step made (csrc/cuda/lstm_exchange.cuh). Where there is no room, all but a few are read from L2 in every step. Not
measured on a GPU: the rule is what fits, fewest blocks that wait for each other first.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from bigmodel_kernels._gpu import Gpu

ROWS = 8  # of the batch, to a block
LARGEST_CLUSTER = 8  # blocks, which every GPU that has clusters can place
WARP, TILE = 32, 16  # lanes; rows and depth of a tile of weights
BIAS_BYTES = 16  # of a unit
# Tiles of the depth in registers where the others are streamed: the rest of the registers holds what is on its way.
STREAMED_REGISTERS = 8
MOST_WARPS = 8


@dataclass(frozen=True)
class Kernel:
    """What csrc/cuda/lstm_forward.cuh and lstm_backward.cuh fix for an element size. Depth is counted in tiles of 16."""

    element_size: int
    units: int  # of a warp
    tiles: int  # of a warp
    one_block: tuple[tuple[int, int], ...]  # (units up to, tiles of the depth in registers)
    registers: int  # tiles of the depth in registers where blocks share the weights
    depth_per_16_units: int
    bias: bool = False

    def depth_tiles(self, hidden: int, registers: int) -> int:
        tiles = -(-hidden // TILE) * self.depth_per_16_units
        return max(registers, tiles + tiles % 2)

    def words(self, hidden: int, registers: int) -> int:
        """Of 4 bytes, in each of the two slots."""
        return self.depth_tiles(hidden, registers) * TILE * ROWS * self.element_size // 4

    def shared_bytes(self, hidden: int, registers: int, warps: int, streamed: bool = False) -> int:
        rest = 0 if streamed else self.depth_tiles(hidden, registers) - registers
        weights = rest * self.tiles * warps * TILE * TILE * self.element_size
        return 2 * 4 * self.words(hidden, registers) + weights + BIAS_BYTES * self.units * warps * self.bias

    def blocks(self, hidden: int, warps: int) -> int:
        return -(-hidden // (self.units * warps))


FORWARD = {
    2: Kernel(2, 8, 2, ((32, 2), (64, 4), (128, 8)), 16, 1, bias=True),
    4: Kernel(4, 8, 2, ((32, 2), (64, 4)), 8, 1, bias=True),
}
BACKWARD = {2: Kernel(2, 16, 1, ((32, 8), (64, 16), (128, 24)), 24, 4), 4: Kernel(4, 16, 1, ((32, 8), (64, 16)), 16, 4)}


@dataclass(frozen=True)
class Plan:
    """A launch: `scope` is block, cluster, grid or streamed; `registers` tiles of the weights' depth are kept in registers."""

    scope: str
    registers: int
    warps: int


@functools.cache
def plan(kernel: Kernel, hidden: int, directions: int, gpu: Gpu) -> Plan | None:
    """None where not even what the blocks hand each other fits."""
    for largest, registers in kernel.one_block:
        if hidden <= largest:
            return Plan("block", registers, kernel.blocks(hidden, 1))
    registers = kernel.registers
    fitting = [w for w in (4, 5, 6, 7, 8, 3, 2, 1) if kernel.shared_bytes(hidden, registers, w) <= gpu.shared_bytes]
    if gpu.capability[0] == 9:
        for warps in fitting:
            if kernel.blocks(hidden, warps) <= LARGEST_CLUSTER:
                return Plan("cluster", registers, warps)
    for warps in fitting:
        if kernel.blocks(hidden, warps) * directions <= gpu.multiprocessors:
            return Plan("grid", registers, warps)
    for warps in range(1, MOST_WARPS + 1):  # the fewest: the more blocks, the more loads under way
        fits = kernel.shared_bytes(hidden, STREAMED_REGISTERS, warps, streamed=True) <= gpu.shared_bytes
        if fits and kernel.blocks(hidden, warps) * directions <= gpu.multiprocessors:
            return Plan("streamed", STREAMED_REGISTERS, warps)
    return None
