"""The convolution layers against torch.nn's: parameters, results, gradients, errors, and the ways a layer is used."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bigmodel_kernels as bmk
from bigmodel_kernels import nn as bnn
from bigmodel_kernels.testing import make

# class name, channels and kernel, options, input shape
LAYERS = {
    "conv1d": ("Conv1d", (3, 8, 3), {"padding": 1}, (2, 3, 20)),
    "conv1d_stride": ("Conv1d", (4, 6, 5), {"stride": 2, "dilation": 2, "groups": 2}, (2, 4, 31)),
    "conv1d_same": ("Conv1d", (3, 5, 4), {"padding": "same", "bias": False}, (2, 3, 9)),
    "conv2d": ("Conv2d", (3, 8, 3), {"padding": 1}, (2, 3, 9, 10)),
    "conv2d_winograd": ("Conv2d", (32, 33, 3), {"padding": 1}, (2, 32, 7, 8)),
    "conv2d_stem": ("Conv2d", (3, 16, 7), {"stride": 2, "padding": 3, "bias": False}, (2, 3, 17, 18)),
    "conv2d_valid": ("Conv2d", (2, 4, (2, 3)), {"padding": "valid"}, (2, 2, 6, 7)),
    "conv2d_same": ("Conv2d", (2, 4, (2, 4)), {"padding": "same", "dilation": 2}, (2, 2, 6, 7)),
    "conv2d_depthwise": ("Conv2d", (6, 6, 3), {"padding": 1, "groups": 6}, (2, 6, 8, 8)),
    "conv2d_reflect": ("Conv2d", (2, 3, 3), {"padding": 1, "padding_mode": "reflect"}, (2, 2, 6, 6)),
    "conv1d_circular": ("Conv1d", (2, 3, 3), {"padding": 1, "padding_mode": "circular"}, (2, 2, 6)),
    "transposed1d": ("ConvTranspose1d", (3, 5, 4), {"stride": 3, "padding": 1, "output_padding": 1}, (2, 3, 7)),
    "transposed2d": ("ConvTranspose2d", (6, 4, 4), {"stride": 2, "padding": 1}, (2, 6, 5, 6)),
    "transposed2d_groups": ("ConvTranspose2d", (6, 4, 3), {"groups": 2, "dilation": 2}, (2, 6, 5, 6)),
}  # fmt: skip


def pair(name, dtype=torch.float32):
    kind, sizes, options, shape = LAYERS[name]
    stock = getattr(nn, kind)(*sizes, **options).to(dtype)
    ours = getattr(bnn, kind)(*sizes, **options).to(dtype)
    ours.load_state_dict(stock.state_dict())
    return stock, ours, make(*shape, dtype=dtype)


def close(a, b, **kwargs):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, **kwargs)


@pytest.mark.parametrize("backend", ["auto", "cpu", "torch"])
@pytest.mark.parametrize("name", LAYERS)
def test_result_gradients_and_parameters(name, backend):
    stock, ours, x = pair(name)
    assert isinstance(ours, type(stock))
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert repr(ours) == repr(stock)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = stock(a)
    with bmk.use_backend(backend):
        found = ours(b)
        close(found, expected)
        assert found.stride() == expected.stride()
        g = torch.randn_like(expected)
        expected.backward(g)
        found.backward(g)
    close(b.grad, a.grad)
    for p, q in zip(ours.parameters(), stock.parameters()):
        close(p.grad, q.grad)


@pytest.mark.parametrize("name", LAYERS)
def test_unbatched(name):
    stock, ours, x = pair(name)
    close(ours(x[0]), stock(x[0]))


@pytest.mark.parametrize("name", LAYERS)
def test_double_backward(name):
    stock, ours, x = pair(name, torch.float64)
    results = []
    for layer in (stock, ours):
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(layer(leaf).square().sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad(g.square().sum(), [leaf, layer.weight]))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["Conv2d", "ConvTranspose2d", "Conv1d", "ConvTranspose1d"])
@pytest.mark.parametrize(
    "x",
    [make(2, 5, 8, 8), make(8, 8), make(1, 2, 3, 8, 8), make(2, 3, 8, 8).double(), make(2, 3, 1, 1)],
    ids=["channels", "rank", "rank5", "dtype", "too_small"],
)
def test_wrong_input_raises_as_torch_does(kind, x):
    stock, ours = getattr(nn, kind)(3, 4, 3), getattr(bnn, kind)(3, 4, 3)
    try:
        stock(x)
    except Exception as error:
        with pytest.raises(type(error)):
            ours(x)
    else:
        assert ours(x).shape == stock(x).shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 2}, "in_channels must be divisible by groups"),
        ({"padding": "full"}, "Invalid padding string"),
        ({"padding": "same", "stride": 2}, "padding='same' is not supported for strided"),
    ],
)
def test_constructor_errors_are_torchs(options, message):
    for module in (nn, bnn):
        with pytest.raises(ValueError, match=message):
            module.Conv2d(3, 4, 3, **options)


def test_transposed_output_size():
    stock, ours, x = pair("transposed2d")
    close(ours(x, output_size=[11, 13]), stock(x, output_size=[11, 13]))
    with pytest.raises(ValueError, match="requested an output size"):
        ours(x, output_size=[50, 50])


def test_a_view_of_the_output_works_as_with_torch():
    layer = bnn.Conv2d(1, 32, 3, padding=1)
    assert layer(make(4, 1, 28, 28)).view(-1, 32 * 28 * 28).shape == (4, 32 * 784)
    last = layer.to(memory_format=torch.channels_last)(make(4, 1, 28, 28).to(memory_format=torch.channels_last))
    assert (
        last.stride()
        == nn.Conv2d(1, 32, 3, padding=1)
        .to(memory_format=torch.channels_last)(make(4, 1, 28, 28).to(memory_format=torch.channels_last))
        .stride()
    )


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_an_in_place_activation_may_follow(backend):
    """nn.ReLU(inplace=True) after a layer is common: the layer must not need its own output for the gradient."""
    stock, ours, x = pair("conv2d")
    ours.backend = backend
    F.relu_(stock(x)).sum().backward()
    F.relu_(ours(x)).sum().backward()
    close(ours.weight.grad, stock.weight.grad)


def test_an_output_that_the_gradient_reads_is_protected():
    x, w = make(1, 2, 6, 6), make(3, 2, 3, 3, requires_grad=True)
    out = bmk.conv(x, w, activation="sigmoid", backend="cpu")
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_deepcopy_functional_call_and_pickle(tmp_path):
    _, ours, x = pair("conv2d")
    ours.backend = "cpu"
    twin = copy.deepcopy(ours)
    assert twin.backend == "cpu"
    close(twin(x), ours(x))
    doubled = {k: 2 * v for k, v in ours.state_dict().items()}
    close(torch.func.functional_call(ours, doubled, (x,)), 2 * ours(x))
    torch.save(ours, tmp_path / "layer.pt")
    close(torch.load(tmp_path / "layer.pt", weights_only=False)(x), ours(x))


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "transposed2d"])
def test_autocast(name):
    stock, ours, x = pair(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = stock(x), ours(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["conv1d_same", "conv2d", "transposed2d"])
def test_compiles_in_training(name):
    stock, ours, x = pair(name)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True)
    for size in (2, 3):
        batch = x[:1].expand(size, *x.shape[1:]).contiguous()
        close(compiled(batch), stock(batch))
        compiled(batch).square().sum().backward()
        stock(batch).square().sum().backward()
    close(ours.weight.grad, stock.weight.grad)
