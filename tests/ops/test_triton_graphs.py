"""What torch.compile and torch.export see of a call on a GPU: one opaque operator, traced with fake tensors, no GPU needed."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import bigmodel_kernels as bmk


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
