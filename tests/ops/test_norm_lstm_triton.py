"""The Triton kernels of an LSTM with layer norm: interpreted against float64, compiled for GPUs not at hand."""

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.ops.norm_lstm import triton_kernels, triton_step
from tests.ops.test_norm_lstm import check, run, tensors
from tests.triton_aot import compiling
from tests.triton_interpreter import interpreted

SIZES = [(1, 1, 4), (1, 5, 3), (3, 2, 15), (4, 3, 16), (2, 9, 17), (5, 8, 33), (20, 4, 100), (3, 1, 260)]


def check_sizes(size, dtype):
    check([tensors(size, dtype, seed) for seed in range(3)], dtype, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_float64(size, dtype):
    interpreted(check_sizes, size, dtype)


def check_saturated():
    check([tensors((6, 4, 20), scale=60.0)], torch.float32, "triton")


def test_saturated_gates():
    interpreted(check_saturated)


def check_results_alone():
    a, h, c, *rest = tensors((4, 3, 10), torch.float32)[:7]
    expected, _ = run(tensors((4, 3, 10), torch.float32), "triton", torch.float32)
    output, states = bmk.norm_lstm(a, (h, c), *rest, eps=1e-5, eps_c=1e-4, backend="triton")
    assert all(torch.equal(x, y) for x, y in zip((output, *states), expected.values()))
    a[1, 1] = float("nan")
    spoiled, _ = bmk.norm_lstm(a, (h, c), *rest, eps=1e-5, eps_c=1e-4, backend="triton")
    assert torch.equal(spoiled[:, [0, 2]], output[:, [0, 2]])
    assert spoiled[1:, 1].isnan().all()
    results, grads = run(tensors((2, 0, 4), torch.float32), "triton", torch.float32)
    assert results["output"].shape == (2, 0, 4)
    assert not grads["w"].any()


def test_nothing_saved_a_nan_and_an_empty_batch():
    interpreted(check_results_alone)


@pytest.mark.parametrize("hidden", [64, 1024, triton_step.LARGEST_HIDDEN])
@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
def test_kernels_compile_within_their_budget(gpu, hidden, monkeypatch):
    a, h, c, *rest, d_output, d_h, d_c = (t.bfloat16() for t in tensors((2, 1, hidden)))
    args = (a, h, c, *rest, 1e-5, 1e-4, True)
    with compiling(gpu, monkeypatch) as binaries:
        output, _, _, *saved = triton_kernels.fwd(*args)
        triton_kernels.bwd(d_output, d_h, d_c, output, *saved, *args)
    assert len(binaries) == 2
    for binary in binaries:
        assert binary.spills == 0, binary
        assert binary.registers <= 128, binary
        assert binary.shared <= 1 << 10, binary
