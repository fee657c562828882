"""What backend "auto" chooses for bmk.conv on the CPU, where the choice was measured or PyTorch's own goes wrong."""

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels import _cpu
from bigmodel_kernels.testing import make


def test_auto_trains_kernels_taller_than_the_image_on_our_kernels():
    """PyTorch's backward of this one was seen not to return."""
    x, weight = make(1, 2, 21, 24), make(3, 2, 41, 11, requires_grad=True)
    assert bmk.explain(bmk.conv, x, weight, stride=2, padding=(20, 5)).backend == "cpu"
    bmk.conv(x, weight, stride=2, padding=(20, 5)).sum().backward()
    expected = torch.autograd.grad(bmk.conv(x.double(), weight.double(), stride=2, padding=(20, 5)).sum(), weight)[0]
    torch.testing.assert_close(weight.grad, expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "activation", "backend"),
    [(28, None, "cpu"), (28, "relu", "cpu"), (14, "relu", "cpu"), (14, None, "torch")],
)
def test_auto_takes_depthwise_layers_that_are_one_pass_over_memory(size, activation, backend):
    x = make(2, 64, size, size).contiguous(memory_format=torch.channels_last)
    options = {"padding": 1, "groups": 64, "activation": activation}
    assert bmk.explain(bmk.conv, x, make(64, 1, 3, 3), **options).backend == backend
    assert bmk.explain(bmk.conv, x, make(64, 1, 3, 3, requires_grad=True), **options).backend == "torch"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_trains_narrow_strided_pointwise_layers_in_channels_last_on_our_kernels(dtype):
    """PyTorch's gradient of these weights was seen to read and write past the channels, which ends the process now and then."""
    x = make(2, 8, 56, 56, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = make(16, 8, 1, 1, dtype=dtype, requires_grad=True)
    assert bmk.explain(bmk.conv, x, weight, stride=2).backend == "cpu"
    bmk.conv(x, weight, stride=2).sum().backward()
    expected = x.double()[:, :, ::2, ::2].sum((0, 2, 3)).expand(16, 8)
    torch.testing.assert_close(
        weight.grad[:, :, 0, 0].double(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-2
    )


@pytest.mark.skipif(not _cpu.dot_products(), reason="as measured where the CPU has AVX512-BF16")
@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "last", "inference", "training"),
    [
        ((2, 64, 28, 28), 3, 1, False, "cpu", "torch"),
        ((2, 64, 28, 28), 3, 2, True, "torch", "cpu"),
        ((2, 64, 28, 28), 5, 1, True, "torch", "cpu"),
        ((2, 64, 28, 28), 3, 1, True, "torch", "torch"),
    ],
)
def test_auto_takes_depthwise_layers_in_bfloat16_where_they_are_ahead(shape, kernel, stride, last, inference, training):
    x = make(*shape, dtype=torch.bfloat16).contiguous(
        memory_format=torch.channels_last if last else torch.contiguous_format
    )
    weight, options = (
        make(64, 1, kernel, kernel, dtype=torch.bfloat16),
        {"stride": stride, "padding": kernel // 2, "groups": 64},
    )
    assert bmk.explain(bmk.conv, x, weight, **options).backend == inference
    assert bmk.explain(bmk.conv, x, weight.requires_grad_(), **options).backend == training


@pytest.mark.parametrize(("size", "backend"), [(8, "torch"), (32, "cpu")])
def test_auto_leaves_kernels_that_mostly_meet_padding(size, backend):
    assert bmk.explain(bmk.conv, make(4, 16, size, size), make(64, 16, 7, 7), padding=3).backend == backend


def test_auto_and_explain():
    assert set(bmk.explain(bmk.conv, make(1, 2, 8, 8), make(3, 2, 3, 3)).reasons) == {"cpu", "cuda", "triton", "torch"}
    half = make(1, 2, 8, 8, dtype=torch.float16), make(3, 2, 3, 3, dtype=torch.float16)
    assert bmk.explain(bmk.conv, *half).backend == "torch"
    assert bmk.conv(*half).dtype == torch.float16
    with pytest.raises(RuntimeError, match="float16"):
        bmk.conv(*half, backend="cpu")
    with pytest.raises(RuntimeError, match="window of 256"):
        bmk.conv(make(1, 1, 20, 20), make(2, 1, 3, 3), pool=("max", 16), backend="cpu")
    with pytest.raises(RuntimeError, match="groups is 2"):
        bmk.conv(make(1, 2, 8), make(4, 1, 3), groups=2, activation="tanh_sigmoid", backend="cpu")
