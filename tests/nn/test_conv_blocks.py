"""Fused blocks against the layers they stand for, and streaming against the whole sequence."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bigmodel_kernels import nn as bnn
from bigmodel_kernels.testing import make

TAILS = [(None, None), ("relu", ("max", 2)), ("gelu", ("avg", 2)), ("silu", ("max", 3, 2)), ("tanh_sigmoid", None)]


def stock_tail(y, activation, pool, axes):
    if activation == "tanh_sigmoid":
        first, second = y.chunk(2, 1)
        y = first.tanh() * second.sigmoid()
    elif activation is not None:
        y = getattr(F, activation)(y)
    if pool is not None:
        y = getattr(F, f"{pool[0]}_pool{axes}d")(y, *pool[1:])
    return y


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize(("activation", "pool"), TAILS)
@pytest.mark.parametrize("axes", [1, 2])
def test_block(axes, activation, pool, norm, training, backend):
    block = (bnn.ConvBlock1d if axes == 1 else bnn.ConvBlock2d)(
        3, 6, 3, stride=1, padding=1, norm=norm, activation=activation, pool=pool
    )
    block.conv.backend = backend
    conv = (nn.Conv1d if axes == 1 else nn.Conv2d)(3, 6, 3, padding=1)
    conv.load_state_dict(block.conv.state_dict())
    batch_norm = (nn.BatchNorm1d if axes == 1 else nn.BatchNorm2d)(6) if norm else nn.Identity()
    for m in (block, batch_norm):
        for p in m.buffers():
            if p.is_floating_point():
                p.copy_(torch.linspace(0.5, 1.5, 6))
        m.train(training)
    x = make(4, 3, *[10] * axes)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = stock_tail(batch_norm(conv(a)), activation, pool, axes)
    found = block(b)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    g = torch.randn_like(expected)
    expected.backward(g)
    found.backward(g)
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(block.conv.weight.grad, conv.weight.grad, rtol=1e-3, atol=1e-4)
    if norm:
        torch.testing.assert_close(block.norm.weight.grad, batch_norm.weight.grad, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(block.norm.running_mean, batch_norm.running_mean)


def test_block_state_dict_and_errors():
    assert list(bnn.ConvBlock2d(1, 2, 3, norm="batch", bias=False).state_dict()) == [
        "conv.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked",
    ]  # fmt: skip
    for options, message in (
        ({"norm": "layer"}, "norm must be"),
        ({"activation": "swish"}, "activation must be"),
        ({"pool": ("min", 2)}, "pool must be"),
        ({"pool": 2}, "pool must be"),
    ):
        with pytest.raises(ValueError, match=message):
            bnn.ConvBlock2d(1, 2, 3, **options)
    with pytest.raises(ValueError, match="activation must be"):
        bnn.CausalConv1d(1, 2, 3, activation="swish")


@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("kernel_size", [1, 2, 5])
@pytest.mark.parametrize("gated", [False, True])
def test_streaming_equals_the_whole_sequence(gated, kernel_size, dilation):
    layer = (
        bnn.GatedCausalConv1d(3, 4, kernel_size, dilation=dilation)
        if gated
        else bnn.CausalConv1d(3, 4, kernel_size, dilation=dilation, activation="relu")
    )
    x = make(2, 3, 17)
    whole = layer(x)
    assert whole.shape == (2, 4, 17)
    state, columns = None, []
    for t in range(17):
        y, state = layer.step(x[..., t], state)
        columns.append(y)
    torch.testing.assert_close(torch.stack(columns, -1), whole, rtol=1e-5, atol=1e-6)
    assert state.ring.shape == (2, dilation * (kernel_size - 1), 3)
    assert int(state.position) == 17


@pytest.mark.parametrize("gated", [False, True])
def test_causal_is_a_left_padded_convolution(gated):
    layer = bnn.GatedCausalConv1d(3, 4, 3, dilation=2) if gated else bnn.CausalConv1d(3, 4, 3, dilation=2)
    x = make(2, 3, 15)
    y = F.conv1d(F.pad(x, (4, 0)), layer.weight, layer.bias, dilation=2)
    expected = y[:, :4].tanh() * y[:, 4:].sigmoid() if gated else y
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    later = x.clone()
    later[..., 8:] += 1  # what comes later changes nothing before it
    assert torch.equal(layer(later)[..., :8], layer(x)[..., :8])


def test_step_errors():
    layer = bnn.CausalConv1d(3, 4, 3)
    with pytest.raises(RuntimeError, match="x_t must have shape"):
        layer.step(make(2, 4))
    with pytest.raises(RuntimeError, match="x_t must have shape"):
        layer.step(make(2, 3, 1))
    with pytest.raises(RuntimeError, match="state must have a ring of shape"):
        layer.step(make(2, 3), bnn.CausalConv1d(3, 4, 2).initial_state(2))


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("innermost", [True, False])
def test_wavenet_layer(innermost, residual):
    layer = bnn.WaveNetLayer(5, 6, 7, kernel_size=3, dilation=2, residual=residual)
    parts = {"conv": nn.Conv1d(5, 12, 3, dilation=2), "skip": nn.Conv1d(6, 7, 1)}
    twin = nn.ModuleDict(parts | ({"out": nn.Conv1d(6, 5, 1)} if residual else {}))
    twin.load_state_dict(layer.state_dict())
    x, total = make(2, 5, 21), make(2, 7, 21, seed=1)
    if innermost:
        x, total = (t.mT.contiguous().mT for t in (x, total))
    first, second = twin["conv"](F.pad(x, (4, 0))).chunk(2, 1)
    a = first.tanh() * second.sigmoid()
    out, skip = layer(x, total)
    torch.testing.assert_close(skip, total + twin["skip"](a), rtol=1e-5, atol=1e-5)
    if residual:
        torch.testing.assert_close(out, x + twin["out"](a), rtol=1e-5, atol=1e-5)
    else:
        assert out is None
    state = None
    with torch.no_grad():
        for t in range(21):
            y, column, state = layer.step(x[..., t], state, total[..., t])
            torch.testing.assert_close(column, skip[..., t], rtol=1e-5, atol=1e-5)
            assert (y is None) is not residual
            if residual:
                torch.testing.assert_close(y, out[..., t], rtol=1e-5, atol=1e-5)


def test_block_compiles_in_training_and_in_eval():
    block = bnn.ConvBlock2d(3, 8, 3, padding=1, norm="batch", activation="relu", pool=("max", 2))
    x = make(2, 3, 8, 8)
    for training in (True, False):
        block.train(training)
        torch._dynamo.reset()
        compiled = torch.compile(block, fullgraph=True)
        torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-5)
        compiled(x).sum().backward()


def test_steps_compile():
    layer, x = bnn.WaveNetLayer(4, dilation=2), make(2, 4, 6)
    expected, _ = layer(x)
    step = torch.compile(layer.step, fullgraph=True)
    state = layer.initial_state(2)
    with torch.no_grad():
        for t in range(6):
            out, _, state = step(x[..., t].contiguous(), state)
            torch.testing.assert_close(out, expected[..., t], rtol=1e-5, atol=1e-5)
