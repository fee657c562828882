"""Which CUDA kernel runs the steps of an LSTM layer, on how many blocks and warps: from the sizes and the GPU's properties alone.

The recurrent weights stay in registers and shared memory for the whole sequence. Up to 128 units one block holds them; beyond,
the blocks of a cluster (sm_90) or blocks anywhere on the GPU share them and hand each other what a step made
(csrc/cuda/lstm_exchange.cuh). Not measured on a GPU: the rule is what fits, fewest blocks that wait for each other first.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from bigmodel_kernels._gpu import Gpu

ROWS = 8  # of the batch, to a block
LARGEST_BLOCK = 128  # units that one block holds
LARGEST_CLUSTER = 8  # blocks, which every GPU that has clusters can place
WORD_TILE_BYTES = 2 * 256  # both slots of the words of 16 elements of depth
FRAGMENT_BYTES = 512  # of a tile of weights, a warp's
BIAS_BYTES = 16  # of a unit


@dataclass(frozen=True)
class Kernel:
    """What csrc/cuda/lstm_forward.cuh and lstm_backward.cuh fix."""

    units: int  # of a warp
    tiles: int  # of a warp
    registers: tuple[tuple[int, int, int], ...]  # one block: (units up to, tiles of the depth in registers, most warps)
    shared_registers: int  # tiles of the depth in registers where blocks share the weights
    depth_per_16_units: int

    def depth_tiles(self, hidden: int, registers: int) -> int:
        tiles = -(-hidden // 16) * self.depth_per_16_units
        return max(registers, tiles + tiles % 2)

    def shared_bytes(self, hidden: int, registers: int, warps: int) -> int:
        depth = self.depth_tiles(hidden, registers)
        bias = BIAS_BYTES * self.units * warps if self is FORWARD else 0
        return depth * WORD_TILE_BYTES + (depth - registers) * self.tiles * warps * FRAGMENT_BYTES + bias

    def blocks(self, hidden: int, warps: int) -> int:
        return -(-hidden // (self.units * warps))


FORWARD = Kernel(8, 2, ((32, 2, 16), (64, 4, 16), (128, 8, 16)), 16, 1)
BACKWARD = Kernel(16, 1, ((32, 8, 8), (64, 16, 8), (128, 24, 8)), 24, 4)


@dataclass(frozen=True)
class Plan:
    """A launch: `scope` is block, cluster or grid; `registers` tiles of the weights' depth are kept in registers."""

    scope: str
    registers: int
    warps: int


@functools.cache
def plan(kernel: Kernel, hidden: int, directions: int, gpu: Gpu) -> Plan | None:
    """None where the weights do not fit on the GPU's multiprocessors."""
    for largest, registers, _ in kernel.registers:
        if hidden <= largest:
            return Plan("block", registers, kernel.blocks(hidden, 1))
    registers = kernel.shared_registers
    fitting = [w for w in (4, 5, 6, 7, 8, 3, 2, 1) if kernel.shared_bytes(hidden, registers, w) <= gpu.shared_bytes]
    if gpu.capability[0] == 9:
        for warps in fitting:
            if kernel.blocks(hidden, warps) <= LARGEST_CLUSTER:
                return Plan("cluster", registers, warps)
    for warps in fitting:
        if kernel.blocks(hidden, warps) * directions <= gpu.multiprocessors:
            return Plan("grid", registers, warps)
    return None
