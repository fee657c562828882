"""What a layer remembers of its calls: torch.nn's forward where "auto" chose it, and nothing where somebody looks."""

import copy
import pickle

import pytest
import torch
from torch import nn

import bigmodel_kernels as bmk
from bigmodel_kernels import _registry
from bigmodel_kernels.nn import choice

# Layer, input: of a size that "auto" gives to PyTorch in training, though the kernels could take it.
SMALL = {
    "Linear": ((6, 4), (3, 6)),
    "RMSNorm": ((8,), (2, 8)),
    "Conv1d": ((4, 6, 1), (1, 4, 9)),
    "Conv2d": ((4, 6, 3), (1, 4, 5, 6)),
    "ConvTranspose1d": ((4, 6, 3), (1, 4, 9)),
    "ConvTranspose2d": ((4, 6, 3, 2), (1, 4, 5, 6)),
    "LSTMCell": ((4, 6), (3, 4)),
}


def make(name):
    torch.manual_seed(0)
    arguments, shape = SMALL[name]
    ours = getattr(bmk.nn, name)(*arguments)
    stock = getattr(nn, name)(*arguments)
    stock.load_state_dict(ours.state_dict())
    return ours, stock, torch.randn(shape)


def first(y):
    return y[0] if isinstance(y, tuple) else y


@pytest.fixture
def selections(monkeypatch):
    """The names of the ops whose backend was selected, in order."""
    seen = []
    select = _registry.select

    def watched(op, *rest):
        seen.append(op)
        return select(op, *rest)

    monkeypatch.setattr(_registry, "select", watched)
    return seen


@pytest.mark.parametrize("name", SMALL)
def test_the_second_call_is_torchs_own(name, selections):
    ours, stock, x = make(name)
    ours(x)
    assert selections
    selections.clear()
    y = first(ours(x))
    assert not selections
    assert torch.equal(y, first(stock(x)))
    (gradient,) = torch.autograd.grad(y.sum(), next(ours.parameters()))
    (expected,) = torch.autograd.grad(first(stock(x)).sum(), next(stock.parameters()))
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("name", SMALL)
def test_a_named_backend_and_explain_are_heard_after_it(name):
    ours, _, x = make(name)
    for _ in range(2):
        ours(x)
    assert bmk.explain(ours, x).backend == "torch"
    with bmk.use_backend("cpu"):
        assert bmk.explain(ours, x).backend == "cpu"
    ours.backend = "cpu"
    assert bmk.explain(ours, x).backend == "cpu"


def test_each_kind_of_call_has_its_own_choice():
    layer, x = bmk.nn.Linear(256, 256), torch.randn(64, 256)
    assert bmk.explain(layer, x).backend == "torch"  # by the cost of a training step
    with torch.no_grad():
        inference = bmk.explain(layer, x).backend
    for _ in range(3):
        layer(x)
        with torch.no_grad():
            layer(x)
    kinds = {key[0]: torchs for key, torchs in layer._choices.items()}
    assert kinds == {True: True, False: inference == "torch"}


def test_what_a_kind_leaves_out_changes_no_result():
    layer, x = bmk.nn.Conv2d(4, 6, 3), torch.randn(1, 4, 5, 5)
    layer(x)
    layer.weight = nn.Parameter(torch.randn(2, 4, 2, 2))
    layer.bias, layer.stride = None, (2, 2)
    torch.testing.assert_close(layer(x), torch.nn.functional.conv2d(x, layer.weight, stride=2))
    layer.weight = nn.Parameter(torch.randn(2, 4, 2, 2, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="Double"):
        layer(x)


def test_copies_and_pickles():
    layer, _, x = make("Linear")
    layer(x)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again(x), layer(x))
        assert again.state_dict().keys() == layer.state_dict().keys()


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(choice, "_MOST_KINDS", 4)
    layer = bmk.nn.Linear(3, 2)
    for rows in range(20):
        assert layer(torch.zeros(rows, 3)).shape == (rows, 2)
    assert len(layer._choices) <= 4


def test_nothing_is_learnt_from_a_failed_call():
    layer = bmk.nn.Linear(3, 2)
    with pytest.raises(RuntimeError):
        layer(torch.zeros(2, 4))
    assert not getattr(layer, "_choices", {})
