"""bmk.nn.Linear: what torch.nn.Linear does, on bmk.linear."""

import copy

import pytest
import torch
from torch import nn

import bigmodel_kernels as bmk
from bigmodel_kernels.testing import make


def pair():
    """Torch's layer, and ours with its weights."""
    torch.manual_seed(0)
    stock = nn.Linear(12, 7)
    ours = bmk.nn.Linear(12, 7)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (0, 12)], ids=str)
def test_same_as_torch(shape):
    stock, ours = pair()
    x = make(*shape)
    torch.testing.assert_close(ours(x), stock(x))
    for a, e in zip(
        torch.autograd.grad(ours(x).sum(), ours.parameters()), torch.autograd.grad(stock(x).sum(), stock.parameters())
    ):
        torch.testing.assert_close(a, e)


def test_nested_tensors():
    stock, ours = pair()
    for layout in (torch.strided, torch.jagged):
        x = torch.nested.nested_tensor([make(3, 12), make(5, 12, seed=1)], layout=layout)
        for a, e in zip(ours(x).unbind(), stock(x).unbind()):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize(
    "x", [torch.zeros(2, 11), torch.zeros(2, 12).double(), torch.zeros(2, 12, dtype=torch.int64)], ids=str
)
def test_errors_are_torchs(x):
    stock, ours = pair()
    with pytest.raises(RuntimeError) as expected:
        stock(x)
    with pytest.raises(RuntimeError) as found:
        ours(x)
    assert str(found.value) == str(expected.value)


def test_optimize_and_revert():
    model = nn.Sequential(nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 3))
    before, x = copy.deepcopy(model), make(4, 12)
    report = bmk.optimize(model)
    assert type(model[0]) is bmk.nn.Linear
    torch.testing.assert_close(model(x), before(x))
    report.revert()
    assert type(model[0]) is nn.Linear
    assert torch.equal(model(x), before(x))
