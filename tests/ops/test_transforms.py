"""What only PyTorch's own ops know, `auto` leaves to them: torch.func, forward-mode derivatives, tensors of other classes."""

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.testing import make

WEIGHT = make(6, 6, 3, seed=1)
MATRIX = make(64, 64, seed=2)
FUNCTIONS = {
    "attention": (lambda x: bmk.attention(x, x, x, is_causal=True), (2, 2, 40, 8)),
    "conv": (lambda x: bmk.conv(x, WEIGHT, padding=1, activation="tanh"), (2, 6, 20)),
    "linear": (lambda x: bmk.linear(x, MATRIX, activation="gelu"), (2100, 64)),
    "layer_norm": (lambda x: bmk.layer_norm(x, MATRIX[0]), (5, 64)),
}


class Marked(torch.Tensor):
    """A tensor class of somebody else's."""


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap(name):
    function, shape = FUNCTIONS[name]
    x = make(3, *shape)
    expected = torch.stack([function(row) for row in x])
    torch.testing.assert_close(torch.func.vmap(function)(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["conv", "linear"])
def test_forward_mode(name):
    function, shape = FUNCTIONS[name]
    x, tangent = make(*shape, dtype=torch.float64), make(*shape, dtype=torch.float64, seed=5)
    with pytest.MonkeyPatch.context() as patch:
        for constant in ("WEIGHT", "MATRIX"):
            patch.setitem(globals(), constant, globals()[constant].double())
        _, forward = torch.func.jvp(function, (x,), (tangent,))
        _, pullback = torch.func.vjp(function, x)
        y = function(x)
        upstream = make(*y.shape, dtype=torch.float64, seed=6)
        torch.testing.assert_close((forward * upstream).sum(), (pullback(upstream)[0] * tangent).sum())


def test_a_kernel_of_ours_does_not_lose_tangents():
    """Asked for by name it says that it has no forward-mode derivative; it gave 0 for it."""
    x = make(2, 6, 20)
    with pytest.raises(
        RuntimeError, match="conv: backend 'cpu' has no forward-mode derivative; 'auto' and 'torch' have"
    ):
        torch.func.jvp(lambda x: bmk.conv(x, WEIGHT, backend="cpu"), (x,), (x,))
    start = bmk.ConvState.start(2, 6, 3, 1, x)
    with torch.no_grad(), pytest.raises(RuntimeError, match="backend 'cpu' has no gradient"):
        torch.func.jvp(lambda t: bmk.conv_step(t, start, WEIGHT, backend="cpu")[0], (x[..., 0],), (x[..., 0],))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        out = torch.autograd.forward_ad.unpack_dual(bmk.conv(dual, WEIGHT))
        torch.testing.assert_close(out.tangent, out.primal)  # linear in x


@pytest.mark.parametrize("name", ["conv", "linear", "attention"])
def test_grad_of_grad_on_a_backend_asked_for(name):
    """Nested transforms around the CPU's kernels, which PyTorch's own attention does not have."""
    function, shape = FUNCTIONS[name]
    x, direction = make(*shape), make(*shape, seed=7)

    def slope(x):
        with bmk.use_backend("cpu"):
            return (torch.func.grad(lambda t: function(t).square().sum())(x) * direction).sum()

    leaf = x.clone().requires_grad_()
    with bmk.use_backend("cpu"):
        (first,) = torch.autograd.grad(function(leaf).square().sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad((first * direction).sum(), leaf)
    torch.testing.assert_close(torch.func.grad(slope)(x), second, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("name", ["conv", "linear", "attention"])
def test_pullback_on_a_backend_asked_for(name, graph):
    """It runs after the transform, whose tensors looked as if they still recorded: it raised unless gradients were off."""
    function, shape = FUNCTIONS[name]
    leaf = make(*shape).requires_grad_()
    with bmk.use_backend("cpu"):
        y, pullback = torch.func.vjp(function, leaf.detach())
        with torch.set_grad_enabled(graph):
            (found,) = pullback(y)
        (expected,) = torch.autograd.grad(function(leaf), leaf, y)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", [name for name in FUNCTIONS if name != "attention"]
)  # PyTorch's own has no such derivative there
def test_grad_of_grad(name):
    function, shape = FUNCTIONS[name]
    x, direction = make(*shape), make(*shape, seed=7)

    def slope(x):
        return (torch.func.grad(lambda t: function(t).square().sum())(x) * direction).sum()

    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(leaf).square().sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad((first * direction).sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda t: function(t).square().sum())(x), first, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.func.grad(slope)(x), second, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_tensors_of_other_classes_keep_their_class(name):
    function, shape = FUNCTIONS[name]
    x = make(*shape)
    y = function(x.as_subclass(Marked))
    assert type(y) is Marked
    torch.testing.assert_close(y.as_subclass(torch.Tensor), function(x), rtol=1e-5, atol=1e-5)


def test_each_argument_of_the_same_tensor_gets_its_own_part_of_a_gradient_with_graph():
    x = make(1, 2, 40, 8, requires_grad=True)
    y = bmk.attention(x, x, x, is_causal=True, backend="cpu")
    (plain,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    (with_graph,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    torch.testing.assert_close(with_graph, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_tensor_that_outlived_its_transform(backend):
    """It wraps what it was made of, and may be used and trained on as that."""
    kept = []

    def look(x):
        kept.append(x * 2)
        return x.sum()

    x = make(3, 4)
    torch.func.grad(look)(x)
    h, c, w, u = make(3, 5, seed=1), make(3, 5, seed=2), make(20, 4, seed=3), make(20, 5, seed=4)
    results = []
    for given in (kept[0], x * 2):
        parameters = [t.clone().requires_grad_() for t in (w, u)]
        y, _ = bmk.lstm_cell(given, (h, c), *parameters, backend=backend)
        results.append((y, *torch.autograd.grad(y.sum(), parameters)))
    assert all(torch.equal(a, b) for a, b in zip(*results))
