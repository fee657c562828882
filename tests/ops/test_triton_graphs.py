"""What torch.compile and torch.export see of a call on a GPU: one opaque operator, traced with fake tensors, no GPU needed; and
gradients of gradients and layers of several ops on the Triton backend."""

import copy

import pytest
import torch
from torch._subclasses import FakeTensorMode

import bigmodel_kernels as bmk
from bigmodel_kernels.testing import check_whole_model, make
from tests.triton_interpreter import interpreted


def _tensor(*shape):
    return torch.empty(shape, dtype=torch.float16, device="cuda")


def _lstm():
    weights = [_tensor(64, 8), _tensor(64, 16), _tensor(64), _tensor(64)]
    return lambda x, h, c: bmk.lstm(x, (h, c), weights)[0], [_tensor(5, 3, 8), _tensor(1, 3, 16), _tensor(1, 3, 16)]


CALLS = {  # name of the operation -> (function, its inputs), made where tensors are fake
    "attention": lambda: (lambda q, k, v: bmk.attention(q, k, v, is_causal=True), [_tensor(2, 4, 16, 32)] * 3),
    "conv": lambda: (
        lambda x, w: bmk.conv(x, w, padding=1, activation="relu"),
        [_tensor(2, 8, 9, 9), _tensor(4, 8, 3, 3)],
    ),
    "gated_conv": lambda: (
        lambda x, w, mix: bmk.gated_conv(x, w, None, mix)[0],
        [_tensor(2, 8, 9), _tensor(8, 8, 2), _tensor(8, 4, 1)],
    ),
    "conv_step": lambda: (
        lambda x, ring, position, w: bmk.conv_step(x, bmk.ConvState(ring, position), w, dilation=4)[0],
        [_tensor(2, 8), _tensor(2, 4, 8), torch.empty(1, dtype=torch.int64, device="cuda"), _tensor(6, 8, 2)],
    ),
    "lstm": _lstm,
    "lstm_cell": lambda: (
        lambda x, h, c: bmk.lstm_cell(x, (h, c), _tensor(64, 8), _tensor(64, 16))[0],
        [_tensor(3, 8), _tensor(3, 16), _tensor(3, 16)],
    ),
    "norm_lstm": lambda: (
        lambda a, h, c: bmk.norm_lstm(a, (h, c), _tensor(64, 16), *(_tensor(n) for n in (64, 16, 16)))[0],
        [_tensor(5, 3, 64), _tensor(3, 16), _tensor(3, 16)],
    ),
    "attention_varlen": lambda: (
        lambda q, k, v, ends: bmk.attention_varlen(q, k, v, ends, ends, 9, 9, is_causal=True),
        [*[_tensor(16, 4, 32)] * 3, torch.empty(4, dtype=torch.int32, device="cuda")],
    ),
    # By name: "auto" composes it of attention on a GPU.
    "attention_decode": lambda: (
        lambda q, k, v, lengths: bmk.attention_decode(q, k, v, lengths, backend="triton"),
        [_tensor(2, 4, 1, 32), *[_tensor(2, 2, 16, 32)] * 2, torch.empty(2, dtype=torch.int32, device="cuda")],
    ),
    "linear": lambda: (
        lambda x, w, b: bmk.linear(x, w, b, activation="gelu"),
        [_tensor(3, 8), _tensor(6, 8), _tensor(6)],
    ),
    "norm": lambda: (lambda x, w: bmk.layer_norm(x, w, w), [_tensor(4, 8), _tensor(8)]),
    "bias_act": lambda: (lambda x, b: bmk.bias_act(x, b, activation="gelu"), [_tensor(4, 8), _tensor(8)]),
    "cross_entropy": lambda: (
        lambda z: bmk.cross_entropy(z, torch.zeros(4, dtype=torch.int64, device="cuda")),
        [_tensor(4, 8)],
    ),
}


def ours(graph):
    """The operations of this library in a graph, in order."""
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    names = [name.removeprefix("bigmodel_kernels.").partition(".")[0] for name in names if name.startswith("bigmodel")]
    return [name.removesuffix("_fwd") for name in names]


@pytest.mark.parametrize("name", CALLS)
def test_compile_traces_one_operator(name):
    graphs = []

    def backend(module, inputs):
        graphs.append(module.graph)
        return module.forward

    torch.compiler.reset()
    with FakeTensorMode(), torch.no_grad():
        function, inputs = CALLS[name]()
        result = torch.compile(function, fullgraph=True, backend=backend)(*inputs)
    assert result.is_cuda
    assert [ours(graph) for graph in graphs] == [[name]]


@pytest.mark.parametrize("name", CALLS)
def test_export_sees_one_operator(name):
    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return function(*inputs)

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        function, inputs = CALLS[name]()
        graph = torch.export.export(Module(), tuple(inputs), strict=False).graph
    assert ours(graph) == [name]


def _twice(function, tensors, backend):
    """The gradient of the gradient's square."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    result = function(*leaves, backend=backend)
    first = torch.autograd.grad(
        (result * torch.linspace(-1, 1, result.numel()).view(result.shape)).sum(), leaves, create_graph=True
    )
    return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)


TWICE = {
    # With a softcap: PyTorch's own attention on the CPU has no second derivative.
    "attention": (lambda q, k, **how: bmk.attention(q, k, k, is_causal=True, softcap=9.0, **how), [(1, 2, 5, 8)] * 2),
    "attention_varlen": (
        lambda q, k, **how: bmk.attention_varlen(q, k, k, *[torch.tensor([0, 4, 7])] * 2, 4, 4, softcap=9.0, **how),
        [(7, 2, 8)] * 2,
    ),
    "conv": (lambda x, w, **how: bmk.conv(x, w, padding=1, activation="tanh", **how), [(2, 3, 7), (4, 3, 3)]),
    "gated_conv": (lambda x, w, o, **how: bmk.gated_conv(x, w, None, o, **how)[0], [(2, 3, 7), (8, 3, 2), (3, 4, 1)]),
    "lstm": (
        lambda x, h, c, *w, **how: bmk.lstm(x, (h, c), list(w), **how)[0],
        [(4, 2, 3), (1, 2, 5), (1, 2, 5), (20, 3), (20, 5)],
    ),
    "lstm_cell": (
        lambda x, h, c, w, u, **how: bmk.lstm_cell(x, (h, c), w, u, **how)[0],
        [(2, 3), (2, 5), (2, 5), (20, 3), (20, 5)],
    ),
    "norm_lstm": (
        lambda a, h, c, *rest, **how: bmk.norm_lstm(a, (h, c), *rest, **how)[0],
        [(3, 2, 20), (2, 5), (2, 5), (20, 5), (20,), (5,), (5,)],
    ),
    "linear": (lambda x, w, b, **how: bmk.linear(x, w, b, activation="gelu", **how), [(4, 9), (5, 9), (5,)]),
    "layer_norm": (bmk.layer_norm, [(4, 9), (9,)]),
    "bias_act": (lambda x, b, **how: bmk.bias_act(x, b, activation="gelu", **how), [(4, 9), (9,)]),
    "cross_entropy": (lambda z, **how: bmk.cross_entropy(z, torch.arange(4), **how), [(4, 9)]),
}


def check_twice(name):
    function, shapes = TWICE[name]
    tensors = [make(*shape, seed=i) for i, shape in enumerate(shapes)]
    for a, e in zip(_twice(function, tensors, "triton"), _twice(function, tensors, "torch")):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TWICE)
def test_gradients_of_gradients(name):
    interpreted(check_twice, name)


def _trained_once(layer, x, backend):
    """Output and all gradients."""
    with bmk.use_backend(backend):
        assert bmk.explain(layer, x).backend == backend
        y, _ = layer(x)
        return y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])


def check_layer_norm_lstm(seed):
    torch.manual_seed(seed)
    layer, x = bmk.nn.LayerNormLSTM(5, 37, 2), make(4, 9, 5, seed=seed).requires_grad_()
    exact = _trained_once(copy.deepcopy(layer).double(), x.detach().double().requires_grad_(), "torch")
    for i, (a, e, b) in enumerate(zip(_trained_once(layer, x, "triton"), exact, _trained_once(layer, x, "torch"))):
        report = check_whole_model(a, e, b, dtype=torch.float32, name=f"result {i}")
        assert report.ok, report.message


@pytest.mark.parametrize("seed", range(3))
def test_layer_norm_lstm(seed):
    interpreted(check_layer_norm_lstm, seed)
