"""Which backend a call gets on which GPU, and which CUDA kernel: from properties alone, with tensors that hold nothing."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import bigmodel_kernels as bmk
from bigmodel_kernels import _gpu, _registry
from bigmodel_kernels._gpu import A100, H100, L40S, Gpu
from bigmodel_kernels.ops.attention_decode.cuda import splits_for
from bigmodel_kernels.ops.lstm.cuda_plan import BACKWARD, FORWARD, LARGEST_CLUSTER, plan

TURING = Gpu((7, 5), 72, 64 << 10)
GPUS = {"sm_80": A100, "sm_89": L40S, "sm_90": H100}


@pytest.fixture
def on(monkeypatch):
    """on(gpu): as if every backend had its kernels, and tensors on "cuda" were on that GPU."""

    def on(gpu):
        availability = _registry.availability
        monkeypatch.setattr(_gpu, "properties", lambda device: gpu)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(
            _registry, "availability", lambda op, b: None if b == "cuda" else availability(op, b)
        )  # fmt: skip

    return on


def lstm_call(hidden, dtype=torch.bfloat16, requires_grad=False, **options):
    with FakeTensorMode():
        x = torch.empty(10, 4, 16, dtype=dtype, device="cuda")
        shapes = [(4 * hidden, 16), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,)]
        weights = [torch.empty(s, dtype=dtype, device="cuda", requires_grad=requires_grad) for s in shapes]
        return bmk.explain(bmk.lstm, x, None, weights, **options)


@pytest.mark.parametrize("gpu", GPUS)
def test_auto_keeps_to_pytorch_until_measured(gpu, on):
    on(GPUS[gpu])
    found = lstm_call(256)
    assert found.backend == "torch"
    assert "can run this" in found.reasons["cuda"]


def step_call(channels, kernel, batch=1, dtype=torch.bfloat16, backend="auto"):
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(batch, channels, dtype=dtype, device="cuda")
        weight = torch.empty(2 * channels, channels, kernel, dtype=dtype, device="cuda")
        mix = [torch.empty(channels, channels, 1, dtype=dtype, device="cuda"), None] * 2
        state = bmk.ConvState.start(batch, channels, kernel, 4, x)
        options = {"dilation": 4, "activation": "tanh_sigmoid", "backend": backend}
        return bmk.explain(bmk.conv_step, x, state, weight, None, *mix, **options)


@pytest.mark.parametrize("gpu", GPUS)
def test_a_step_of_a_convolution(gpu, on):
    on(GPUS[gpu])
    found = step_call(64, 2)
    assert found.backend == "torch"
    assert "can run this" in found.reasons["cuda"]
    assert step_call(256, 3, batch=7, backend="cuda").backend == "cuda"
    fits = step_call(8192, 8)
    assert ("do not fit in shared memory" in fits.reasons["cuda"]) == (gpu == "sm_89")


@pytest.mark.parametrize("gpu", GPUS)
def test_asked_for(gpu, on):
    on(GPUS[gpu])
    assert lstm_call(256, backend="cuda").backend == "cuda"
    with bmk.use_backend("cuda"):
        assert lstm_call(256, requires_grad=True).backend == "cuda"


@pytest.mark.parametrize(
    ("gpu", "hidden", "options", "reason"),
    [
        (TURING, 64, {}, "compute capability (7, 5)"),
        (H100, 64, {"dtype": torch.float64}, "float32, float16 and bfloat16"),
        (A100, 800, {"dtype": torch.float32, "requires_grad": True}, "800 units do not fit"),
        (L40S, 4096, {}, "4096 units do not fit"),
        (H100, 2000, {"requires_grad": True}, "2000 units do not fit"),
    ],
)
def test_reasons_against(gpu, hidden, options, reason, on):
    on(gpu)
    assert reason in lstm_call(hidden, **options).reasons["cuda"]


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("hidden", [1, 8, 32, 33, 64, 65, 128])
def test_one_block_up_to_128_units(hidden, gpu):
    for kernel in (FORWARD[2], BACKWARD[2], *((FORWARD[4], BACKWARD[4]) if hidden <= 64 else ())):
        found = plan(kernel, hidden, 2, GPUS[gpu])
        assert found.scope == "block"
        assert kernel.blocks(hidden, found.warps) == 1


@pytest.mark.parametrize("hidden", [129, 200, 256, 384, 512])
def test_a_cluster_beyond_on_hopper_alone(hidden):
    assert plan(FORWARD[2], hidden, 1, H100).scope == "cluster"
    assert plan(FORWARD[2], hidden, 1, A100).scope == "grid"


def test_weights_are_streamed_where_there_is_no_room():
    assert plan(BACKWARD[2], 768, 1, H100).scope == "grid"
    assert plan(BACKWARD[2], 1024, 1, H100).scope == "streamed"
    assert plan(FORWARD[2], 1024, 1, H100).scope == "grid"
    assert plan(FORWARD[2], 4096, 1, H100).scope == "streamed"
    assert plan(FORWARD[4], 1024, 1, A100).scope == "streamed"


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kernels", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_every_plan_fits_its_gpu(kernels, size, gpu):
    gpu, kernel = GPUS[gpu], kernels[size]
    for hidden in range(1, 1300):
        for directions in (1, 2):
            found = plan(kernel, hidden, directions, gpu)
            if found is None:
                assert hidden > 128
                continue
            blocks = kernel.blocks(hidden, found.warps)
            assert blocks * found.warps * kernel.units >= hidden
            streamed = found.scope == "streamed"
            assert kernel.shared_bytes(hidden, found.registers, found.warps, streamed) <= gpu.shared_bytes
            assert found.warps <= (16 if kernel is FORWARD[2] and found.scope == "block" else 8)
            if found.scope == "cluster":
                assert blocks <= LARGEST_CLUSTER
            if found.scope in ("grid", "streamed"):
                assert blocks * directions <= gpu.multiprocessors


def test_splits_fill_the_gpu_and_leave_work_for_every_warp():
    assert splits_for(8, 8192, 132) == 33
    assert splits_for(8, 200, 132) == 2
    assert splits_for(1000, 8192, 132) == 1
    assert splits_for(1, 1, 132) == 1
