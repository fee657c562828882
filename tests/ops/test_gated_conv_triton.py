"""The Triton kernels of WaveNet's layer: the error rule in the interpreter, rows of the table compiled within a budget."""

from unittest import mock

import pytest
import torch

from bigmodel_kernels import _triton
from bigmodel_kernels.ops.gated_conv import layout, triton_kernels
from bigmodel_kernels.ops.gated_conv.triton_configs import TABLE
from bigmodel_kernels.testing import make
from tests.ops.fused import DTYPES, check
from tests.ops.test_gated_conv import problem, test_opcheck
from tests.triton_aot import SHARED_LIMIT, compiling
from tests.triton_interpreter import interpreted

MATRIX_UNITS = {"sm_80": "HMMA", "sm_90": "HGMMA"}
# Registers of a thread, for sm_80 and sm_90, Triton 3.6 and 3.7.
BUDGET = 248


def check_problem(sizes, parts, layout, dtype):
    check(*problem(sizes, parts, layout=layout), dtype, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("sizes", "parts", "layout"),
    [
        ("wavenet", "everything", "contiguous"),
        ("odd", "everything", "innermost"),
        ("wide", "everything", "innermost"),  # float32: three convolutions
        ("long dilation", "everything", "contiguous"),
        ("few steps", "no biases", "innermost"),
        ("odd", "no skip", "sliced"),
        ("odd", "no out", "expanded"),
        ("one step", "no out", "contiguous"),
        ("few steps", "no sum", "innermost"),
    ],
)
def test_matches_float64(sizes, parts, layout, dtype):
    interpreted(check_problem, sizes, parts, layout, dtype)


def test_operators():
    interpreted(test_opcheck, "triton")


def check_far(stride):
    """x laid out past 2^31 elements, in memory of which only what is touched is ever backed."""
    _, tensors = problem("odd")
    x, *rest = (t.half() for t in tensors)
    far = torch.empty(sum((n - 1) * s for n, s in zip(x.shape, stride)) + 1, dtype=x.dtype).as_strided(x.shape, stride)
    args = (*rest, 2, True)
    upstream = make(*x.shape, dtype=x.dtype, seed=70), make(*rest[-1].shape, dtype=x.dtype, seed=71)
    results = []
    for source in (x, far.copy_(x)):
        with mock.patch.object(layout, "is_innermost", return_value=False):
            results.append(
                (*triton_kernels.fwd(source, *args), *triton_kernels.bwd(*upstream, None, True, True, source, *args))
            )
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("stride", [(2**31 + 64, 50, 1), (250, 2**31 + 64, 1), (5, 1, 2**26)], ids=str)
def test_offsets_beyond_32_bits(stride):
    interpreted(check_far, stride)


ROWS = [(kernel, size, d, True) for kernel, by_size in TABLE.items() for size, rows in by_size.items() for d in rows]
ROWS += [("forward", 2, 64, False), ("gradient", 2, 64, False)]


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("kernel", "size", "values", "innermost"), ROWS)
def test_rows_compile_within_budget(kernel, size, values, innermost, gpu, monkeypatch):
    """16-bit rows in bfloat16 for sm_80 and in float16 for sm_90; float32 rows in IEEE arithmetic and in TF32."""
    dtype = torch.float32 if size == 4 else torch.bfloat16 if gpu == "sm_80" else torch.float16
    monkeypatch.setattr(_triton, "precision", lambda dtype, *switches: "ieee" if gpu == "sm_80" else "tf32")

    def tensor(*shape):
        return torch.empty(shape, dtype=dtype)

    x = tensor(2, 256, values).transpose(1, 2) if innermost else tensor(2, values, 256)
    one, bias = tensor(values, values, 1), tensor(values)
    args = [x, tensor(2 * values, values, 2), tensor(2 * values), one, bias, one, bias, x, 4, True]
    with compiling(gpu, monkeypatch, only=f"{kernel}_kernel") as found:
        triton_kernels.fwd(*args)
        triton_kernels.bwd(x, x, None, True, True, *args)
    (binary,) = found
    assert binary.constants["BLOCK_D"] == values, binary
    assert binary.spills == 0, binary
    assert binary.shared <= SHARED_LIMIT["sm_86"], binary  # whose rows these are, too
    assert binary.registers <= BUDGET, binary
    products = MATRIX_UNITS[gpu] in binary.sass or (size == 4 and "HMMA" in binary.sass)
    assert products == (size == 2 or gpu == "sm_90"), binary
    if size == 2 and innermost:
        assert "LDGSTS" in binary.sass, binary  # asynchronous copies: the loads were seen to be whole vectors
