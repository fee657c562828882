"""Shared memory of the kernels whose plans are fixed in C++."""


def decode_shared_bytes(element_size: int, head_dim: int) -> int:
    """As DecodeStage of csrc/cuda/attention_decode.cuh, for caches of this element size: of a block of 4 warps."""
    stages, scales = (2, 0) if element_size == 2 else (4, 2 * 16 * 4)
    return 4 * stages * (2 * 16 * head_dim * element_size + scales)
