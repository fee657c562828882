"""Every row of the table of configurations compiled for sm_80 and sm_90: registers, spills, shared memory, instructions."""

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels import _triton
from bigmodel_kernels.ops.conv import triton_configs, triton_kernels
from bigmodel_kernels.ops.conv.triton_tuning import FUNCTIONS
from tests.triton_aot import SHARED_LIMIT, compiling

REGISTERS = {
    "product": 200,
    "gather": 208,
    "weights": 240,
    "direct": 168,
    "direct_weights": 128,
    "image": 160,
}  # budget
MATRIX_UNITS = {"sm_80": "HMMA", "sm_90": "HGMMA"}
ROWS = [
    (gpu, kernel, size, columns)
    for gpu in MATRIX_UNITS
    for kernel, by_size in triton_configs.TABLE.items()
    for size, rows in by_size.items()
    for columns in rows
]


def run(kernel, dtype, columns):
    """Calls the launchers so that they launch `kernel` for so many output channels."""
    direct = kernel.startswith("direct")
    channels = columns if direct else 64
    x = torch.empty(2, channels, 16, 16, dtype=dtype)
    if kernel != "gather":
        x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.empty(columns, 1 if direct else channels, 3, 3, dtype=dtype)
    options = {"padding": 1, "groups": columns if direct else 1}
    needs = [0, int("weights" in kernel), 0, 0, 0, int(kernel == "image")]
    if kernel == "image":
        options |= {"activation": "silu", "pool": ("max", 3, 2)}
    if kernel in ("product", "gather"):
        options |= {"activation": "gelu"}
    args = bmk.conv.prepare(x.requires_grad_(), weight, torch.empty(columns, dtype=dtype), **options)
    with torch.no_grad():
        out, index, pre = triton_kernels.fwd(*args)
        if any(needs):
            triton_kernels.bwd(torch.empty_like(out), out, index, pre, needs, *args)


@pytest.mark.parametrize(("gpu", "kernel", "size", "columns"), ROWS)
def test_rows_compile_within_budget(gpu, kernel, size, columns, monkeypatch):
    """16-bit rows in bfloat16 for sm_80 and in float16 for sm_90; float32 rows in IEEE arithmetic and in TF32."""
    dtype = torch.float32 if size == 4 else torch.bfloat16 if gpu == "sm_80" else torch.float16
    monkeypatch.setattr(_triton, "precision", lambda dtype, *switches: "ieee" if gpu == "sm_80" else "tf32")
    with compiling(gpu, monkeypatch, only=FUNCTIONS[kernel]) as found:
        run(kernel, dtype, columns)
    assert found
    expected = triton_configs.config(gpu, None, kernel, size, columns)
    for binary in found:
        assert all(binary.constants[key] == expected[key] for key in ("BLOCK_M", "BLOCK_N", "num_warps")), binary
        assert binary.spills == 0, binary
        assert binary.shared <= SHARED_LIMIT["sm_86"], binary  # whose rows these are, too
        assert binary.registers <= REGISTERS[kernel], binary
        if kernel in ("product", "gather", "weights"):
            products = MATRIX_UNITS[gpu] in binary.sass or (size == 4 and "HMMA" in binary.sass)
            assert products == (size == 2 or gpu == "sm_90"), binary
        if kernel == "product":
            assert "LDGSTS" in binary.sass, binary  # asynchronous copies: the loads were seen to be whole vectors


@pytest.mark.parametrize("gpu", MATRIX_UNITS)
@pytest.mark.parametrize("case", ["stem", "wavenet", "transposed"])
def test_layers_compile_within_budget(case, gpu, monkeypatch):
    """Forward and all gradients of the layers that differ most from the table's: few channels, gated, by phases."""
    x, weight, options = {
        "stem": ((2, 3, 32, 32), (64, 3, 7, 7), {"stride": 2, "padding": 3, "activation": "relu", "pool": ("max", 2)}),
        "wavenet": ((2, 64, 64), (128, 64, 2), {"padding": "causal", "dilation": 4, "activation": "tanh_sigmoid"}),
        "transposed": ((2, 32, 8, 8), (32, 32, 4, 4), {"transposed": True, "stride": 2, "padding": 1}),
    }[case]
    x, weight = torch.empty(x, dtype=torch.float16), torch.empty(weight, dtype=torch.float16)
    args = bmk.conv.prepare(x.requires_grad_(), weight, torch.empty(max(weight.shape[:2])).half(), **options)
    with compiling(gpu, monkeypatch) as found, torch.no_grad():
        out, index, pre = triton_kernels.fwd(*args)
        triton_kernels.bwd(torch.empty_like(out), out, index, pre, [1, 1, 1, 0, 0, 0], *args)
    for binary in found:
        assert binary.spills == 0, binary
        assert binary.shared <= SHARED_LIMIT["sm_86"], binary
        if binary.name in ("product_kernel", "weights_kernel"):
            assert MATRIX_UNITS[gpu] in binary.sass, binary
