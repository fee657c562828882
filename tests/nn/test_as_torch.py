"""What is done to the layers of torch.nn besides calling them, done to ours."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import bigmodel_kernels as bmk
from bigmodel_kernels.testing import make

LAYERS = {  # constructor arguments, shapes of the input
    "Linear": ((6, 4), [(5, 6)]),
    "RMSNorm": ((6,), [(5, 6)]),
    "Conv1d": ((4, 6, 3), [(2, 4, 9)]),
    "Conv2d": ((4, 6, 3, 2), [(2, 4, 9, 8)]),
    "ConvTranspose1d": ((4, 6, 3), [(2, 4, 9)]),
    "ConvTranspose2d": ((4, 6, 3, 2), [(2, 4, 5, 6)]),
    "LSTM": ((5, 7, 2), [(6, 3, 5)]),
    "LSTMCell": ((5, 7), [(3, 5)]),
    "MultiheadAttention": ((8, 2), [(6, 3, 8)] * 3),
    "TransformerEncoderLayer": ((8, 2, 12, 0.0), [(6, 3, 8)]),
    "TransformerDecoderLayer": ((8, 2, 12, 0.0), [(6, 3, 8)] * 2),
    "Transformer": ((8, 2, 1, 1, 12, 0.0), [(6, 3, 8)] * 2),
}


def layers(name):
    """Torch's layer, ours with its weights, and their inputs."""
    arguments, shapes = LAYERS[name]
    torch.manual_seed(0)
    stock, ours = getattr(nn, name)(*arguments), getattr(bmk.nn, name)(*arguments)
    ours.load_state_dict(stock.state_dict())
    return stock, ours, [make(*shape, seed=i) for i, shape in enumerate(shapes)]


def first(results):
    return results if isinstance(results, torch.Tensor) else first(results[0])


def gradients(layer, results):
    return torch.autograd.grad(first(results).square().sum(), list(layer.parameters()), allow_unused=True)


@pytest.mark.parametrize("name", LAYERS)
def test_fx_takes_a_layer_as_a_whole(name):
    stock, ours, inputs = layers(name)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = ours

        def forward(self, a, b=None, c=None):
            return self.layer(*(a, b, c)[: len(inputs)])

    unused = {key: None for key in ("b", "c")[len(inputs) - 1 :]}
    graph = torch.fx.symbolic_trace(Model(), concrete_args=unused)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["layer"]
    torch.testing.assert_close(first(graph(*inputs)), first(stock(*inputs)))


@pytest.mark.parametrize("name", ["Linear", "RMSNorm", "Conv1d", "Conv2d"])
def test_fx_looks_into_the_layer_it_is_given_and_into_a_subclass(name):
    stock, ours, inputs = layers(name)
    torch.testing.assert_close(torch.fx.symbolic_trace(ours)(*inputs), stock(*inputs))

    class Doubled(type(ours)):
        def forward(self, x):
            return super().forward(2 * x) + 1

    ours.__class__ = Doubled
    torch.testing.assert_close(torch.fx.symbolic_trace(nn.Sequential(ours))(*inputs), stock(2 * inputs[0]) + 1)


@pytest.mark.parametrize("name", LAYERS)
def test_jit_trace(name):
    stock, ours, inputs = layers(name)
    traced = torch.jit.trace(ours.eval(), tuple(inputs), check_trace=False)
    torch.testing.assert_close(first(traced(*inputs)), first(stock.eval()(*inputs)))


OF_OUR_OWN = {
    "ConvBlock2d": (4, 6, 3),
    "CausalConv1d": (4, 6, 3),
    "GatedCausalConv1d": (4, 6, 3),
    "WaveNetLayer": (4,),
    "LayerNormLSTM": (5, 7),
}


@pytest.mark.parametrize("name", [*LAYERS, *OF_OUR_OWN])
def test_jit_script_says_what_to_use_instead(name):
    arguments = LAYERS[name][0] if name in LAYERS else OF_OUR_OWN[name]
    layer = getattr(bmk.nn, name)(*arguments)
    model = nn.Sequential(nn.Identity(), layer)
    stock = f"or torch.nn.{name}" if name in LAYERS else r"torch.compile \("
    for scripted in (layer, model):
        with pytest.raises(RuntimeError, match=f"bigmodel_kernels.nn.{name}, .* use torch.jit.trace or .*{stock}"):
            torch.jit.script(scripted)
    assert model[1] is layer


@pytest.mark.parametrize("name", LAYERS)
def test_meta_device(name):
    arguments, shapes = LAYERS[name]
    layer = getattr(bmk.nn, name)(*arguments, device="meta")
    result = first(layer(*(torch.empty(shape, device="meta") for shape in shapes)))
    stock = first(getattr(nn, name)(*arguments)(*(make(*shape) for shape in shapes)))
    assert result.is_meta
    assert result.shape == stock.shape


@pytest.mark.parametrize("name", LAYERS)
def test_copies(name):
    _, ours, inputs = layers(name)
    ours.backend = "torch"
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)):
        assert copied.backend == "torch"
        assert torch.equal(first(copied(*inputs)), first(ours(*inputs)))


@pytest.mark.parametrize("name", ["Linear", "Conv1d", "Conv2d"])
def test_a_parametrization_is_computed_once_a_call(name):
    """spectral_norm moves on with every time the weight is asked for."""
    stock, ours, inputs = layers(name)
    found = []
    for layer in (stock, ours):
        torch.manual_seed(1)
        nn.utils.parametrizations.spectral_norm(layer)
        found.append([layer(*inputs) for _ in range(2)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("name", ["Linear", "RMSNorm", "Conv2d", "ConvTranspose1d", "LSTMCell"])
def test_a_result_may_be_overwritten(name, backend):
    stock, ours, inputs = layers(name)
    ours.backend = backend
    found = []
    for layer in (stock, ours):
        result = layer(*inputs)
        first(result).mul_(2)
        found.append(gradients(layer, result))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_the_final_states_of_an_lstm_may_be_overwritten(backend):
    stock, ours, (x,) = layers("LSTM")
    ours.backend = backend
    found = []
    for layer in (stock, ours):
        _, (h, c) = layer(x)
        h.mul_(2), c.add_(1)
        found.append(torch.autograd.grad((h * c).sum(), list(layer.parameters())))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("name", LAYERS)
def test_writing_into_what_the_backward_needs_is_noticed(name, backend):
    _, ours, inputs = layers(name)
    ours.backend = backend
    inputs = [t.requires_grad_() for t in inputs]
    result = ours(*inputs)
    with torch.no_grad():
        for p in ours.parameters():
            p.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        torch.autograd.grad(first(result).sum(), inputs, allow_unused=True)


@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("name", ["Linear", "Conv1d", "LSTM", "LSTMCell"])
def test_batched_gradients(name, backend):
    stock, ours, inputs = layers(name)
    ours.backend = backend
    found = []
    for layer in (stock, ours):
        result = first(layer(*inputs))
        directions = torch.eye(result.numel())[:3].view(3, *result.shape)
        parameters = list(layer.parameters())
        found.append(torch.autograd.grad(result, parameters, directions, is_grads_batched=True))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_tensors_made_in_inference_mode():
    with torch.inference_mode():
        x = make(256, 256)
    layer = bmk.nn.RMSNorm(256)
    layer(x).sum().backward()
    expected = nn.RMSNorm(256)
    expected(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, expected.weight.grad)


def test_hooks_of_all_modules_hear_of_the_layers_of_a_transformer():
    heard = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: heard.append(type(module).__name__))
    try:
        _, ours, inputs = layers("TransformerEncoderLayer")
        ours(*inputs)
    finally:
        handle.remove()
    assert heard.count("Linear") == 2


@pytest.mark.parametrize("name", ["Linear", "RMSNorm"])
@pytest.mark.parametrize("junk", [None, 3, [1.0]], ids=str)
def test_what_is_no_tensor(name, junk):
    stock, ours, _ = layers(name)
    with pytest.raises(TypeError) as expected:
        stock(junk)
    with pytest.raises(TypeError) as found:
        ours(junk)
    assert str(found.value) == str(expected.value)
