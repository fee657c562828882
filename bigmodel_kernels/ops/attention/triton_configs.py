"""Tile sizes of the Triton attention kernels, by kernel, GPU, element size and head dimension.

Nothing is tuned at the first call: the table is read. Its rows were chosen by what the compiler reports (registers, spills,
shared memory, instructions per pair of query and key), which tests/ops/test_attention_triton_compile.py keeps within
tests/ops/attention_triton_budget.json; they have not been timed on a GPU.
"""

from __future__ import annotations

from bigmodel_kernels import _tuned

HEAD_DIMS = (64, 128, 256)  # rows: up to
# GPU -> kernel -> head dimension up to -> (BLOCK_M, BLOCK_N, num_warps, num_stages), for 16-bit elements. A fifth number, 1,
# says that tiles are brought by the copy engine (TMA) where the tensors allow it.
# Shared memory: 227 KB on sm_90, 163 KB on sm_80, 99 KB on sm_86, whose row also serves any other GPU.
HALF = {
    "sm_90": {
        "forward": {64: (128, 128, 8, 3, 1), 128: (128, 128, 8, 2, 1), 256: (128, 32, 8, 2)},
        "query": {64: (128, 64, 8, 3, 1), 128: (128, 64, 8, 2, 1), 256: (128, 32, 8, 2)},
        "key": {64: (32, 128, 8, 3, 1), 128: (32, 128, 8, 2, 1), 256: (64, 32, 8, 2)},
        "mask": {64: (64, 64, 4, 1), 128: (64, 64, 4, 1), 256: (64, 64, 8, 1)},
    },
    "sm_80": {
        "forward": {64: (128, 32, 4, 3), 128: (128, 32, 8, 2), 256: (64, 64, 8, 2)},
        "query": {64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 1)},
        "key": {64: (32, 128, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)},
        "mask": {64: (64, 64, 4, 1), 128: (64, 64, 4, 1), 256: (32, 64, 8, 1)},
    },
    "sm_86": {
        "forward": {64: (128, 32, 4, 3), 128: (128, 32, 8, 2), 256: (64, 32, 8, 2)},
        "query": {64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 1)},
        "key": {64: (32, 128, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
        "mask": {64: (64, 64, 4, 1), 128: (64, 64, 4, 1), 256: (32, 64, 8, 1)},
    },
}
# The same without GPU: float32 products in IEEE arithmetic use no matrix units, and are alike on all of them.
SINGLE = {
    "forward": {64: (64, 32, 8, 2), 128: (32, 32, 8, 1), 256: (32, 32, 8, 1)},
    "query": {64: (32, 32, 8, 1), 128: (32, 16, 8, 1), 256: (16, 16, 8, 1)},
    "key": {64: (32, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    "mask": {64: (32, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
}
# With dropout, where its random numbers would not leave enough registers for the tiles above.
HALF_DROPOUT = {
    "sm_90": {
        "forward": {128: (128, 64, 8, 2)},
        "query": {256: (128, 32, 8, 3)},
        "key": {128: (16, 128, 8, 3), 256: (32, 32, 8, 1)},
    },
    "sm_80": {
        "query": {64: (128, 32, 8, 2)},
        "key": {64: (16, 128, 8, 2), 128: (32, 32, 4, 2), 256: (32, 32, 8, 1)},
        "mask": {128: (32, 64, 4, 1)},
    },
    "sm_86": {"query": {64: (128, 32, 8, 2)}, "key": {64: (16, 128, 8, 2)}},
}
SINGLE_DROPOUT = {"forward": {64: (32, 32, 8, 2)}, "key": {64: (16, 32, 8, 1)}}
# By op, for tiles of 16-bit elements that come by pointers although the tables say otherwise and would spill: of sequences laid
# end to end, and of tensors that the copy engine cannot read, whose elements are read one by one.
HALF_POINTERS = {
    "attention": {
        "sm_90": {"forward": {128: (64, 64, 8, 2)}, "query": {128: (64, 64, 8, 2)}, "key": {128: (16, 64, 8, 2)}}
    },
    "attention_varlen": {"sm_90": {"key": {128: (16, 128, 8, 3)}}},
}
DESCRIBED = ("forward", "query", "key")  # the kernels that know descriptors
INTERPRETER = (32, 32, 4, 1)


@_tuned.cached
def config(
    gpu: str, device: int | None, kernel: str, element_size: int, head_dim: int, dropout: bool, pointers: bool = False,
    op: str = "attention",
) -> dict[str, int]:  # fmt: skip
    """The launch constants of a kernel on a GPU (see _triton.gpu) and device; head_dim is the larger of D and Dv.

    `pointers`: the tiles come by pointers, whatever the table says. Each op has rows of its own to be tuned.
    """
    row = next(d for d in HEAD_DIMS if d >= head_dim)
    if gpu == "interpreter":
        m, n, warps, stages, *descriptors = INTERPRETER
    else:
        rows, other = (HALF[gpu], HALF_DROPOUT[gpu]) if element_size == 2 else (SINGLE, SINGLE_DROPOUT)
        if pointers and element_size == 2:
            instead = HALF_POINTERS[op].get(gpu, {})
            rows = {name: of_dim | instead.get(name, {}) for name, of_dim in rows.items()}
        m, n, warps, stages, *descriptors = (dropout and other.get(kernel, {}).get(row)) or rows[kernel][row]
    sizes = {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
    if kernel in DESCRIBED:
        sizes["DESCRIPTORS"] = int(descriptors == [1] and not pointers)
    words = (("dropout", dropout), ("pointers", pointers and op == "attention"))
    kind = " ".join(word for word, is_so in words if is_so)
    return _tuned.choose(_tuned.Row(op, kernel, f"{8 * element_size}-bit", row, kind), device, sizes)
