"""bmk.nn.RMSNorm: what torch.nn.RMSNorm does, on bmk.rms_norm."""

import copy

import pytest
import torch
from torch import nn

import bigmodel_kernels as bmk
from bigmodel_kernels.testing import make


def pair(shape=12, **options):
    """Torch's layer, and ours with its weights."""
    torch.manual_seed(0)
    stock, ours = nn.RMSNorm(shape, **options), bmk.nn.RMSNorm(shape, **options)
    for p in stock.parameters():
        nn.init.normal_(p)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("options", [{}, {"elementwise_affine": False}, {"eps": 0.1}], ids=str)
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (0, 12)], ids=str)
def test_same_as_torch(backend, options, shape):
    stock, ours = pair(**options)
    ours.backend = backend
    inputs = [make(*shape).requires_grad_() for _ in range(2)]
    results = [layer(x) for layer, x in zip((ours, stock), inputs)]
    torch.testing.assert_close(*results)
    for result in results:
        result.square().sum().backward()
    for a, e in zip((inputs[0], *ours.parameters()), (inputs[1], *stock.parameters())):
        torch.testing.assert_close(a.grad, e.grad)


def test_what_is_left_to_torch():
    stock, ours = pair(shape=(3, 4))
    x = make(2, 3, 4)
    assert torch.equal(ours(x), stock(x))
    stock, ours = pair()
    compiled = torch.compile(ours, fullgraph=True)
    torch.testing.assert_close(compiled(make(5, 12)), stock(make(5, 12)))


def test_a_trace_is_torchs():
    """Known calls or not; torch.jit.trace compares one made with gradients to one without."""
    for shape in ((5, 32), (300, 256)):
        stock, ours = pair(shape=shape[1])
        x = make(*shape)
        for _ in range(2):
            traced = torch.jit.trace(ours, x)
            assert torch.equal(traced(x), stock(x))
            for _ in range(2):
                ours(x)


@pytest.mark.parametrize("x", [torch.zeros(2, 11), torch.zeros(2, 12, dtype=torch.int64)], ids=str)
def test_errors_are_torchs(x):
    stock, ours = pair()
    with pytest.raises(RuntimeError) as expected:
        stock(x)
    with pytest.raises(RuntimeError) as found:
        ours(x)
    assert str(found.value) == str(expected.value)


def test_bfloat16_with_float32_parameters():
    stock, ours = pair()
    x = make(4, 12, dtype=torch.bfloat16)
    assert torch.equal(ours(x), stock(x))


def test_large_rows_go_to_the_kernel():
    layer, x = bmk.nn.RMSNorm(256), make(256, 256)
    assert bmk.explain(layer, x).backend == "cpu"
    torch.testing.assert_close(layer(x), nn.RMSNorm(256)(x))


def test_optimize_and_revert():
    model = nn.Sequential(nn.RMSNorm(12), nn.Linear(12, 7))
    before, x = copy.deepcopy(model), make(4, 12)
    report = bmk.optimize(model)
    assert type(model[0]) is bmk.nn.RMSNorm
    torch.testing.assert_close(model(x), before(x))
    report.revert()
    assert torch.equal(model(x), before(x))
