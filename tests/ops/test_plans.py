"""A call of sizes seen before gives what the first one gave: results, strides, gradients, errors."""

import gc
import weakref

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.ops.attention import op as attention_op
from bigmodel_kernels.ops.conv import op as conv_op
from bigmodel_kernels.ops.cross_entropy import op as cross_entropy_op
from bigmodel_kernels.ops.linear import op as linear_op

CONV_OPTIONS = [
    {},
    {"activation": "relu", "pool": ("max", 2)},
    {"activation": "gelu", "pool": ("avg", 2)},
    {"stride": 2, "padding": 1, "activation": ("leaky_relu", 0.2)},
    {"padding": "same", "activation": "tanh_sigmoid"},
    {"padding": (2, 1), "dilation": 2, "groups": 2},
]
SMALL, LARGE = (2, 4, 9, 10), (8, 32, 28, 28)  # PyTorch's, and the kernels'


def conv_tensors(shape, options, parameters):
    groups = options.get("groups", 1)
    torch.manual_seed(0)
    channels = shape[1]
    tensors = {"x": torch.randn(shape), "weight": torch.randn(channels, channels // groups, 3, 3) / 8}
    return tensors | {name: torch.randn(channels) for name in parameters}


def linear_tensors(shape, residual):
    torch.manual_seed(0)
    tensors = {"x": torch.randn(shape), "weight": torch.randn(24, shape[-1]), "bias": torch.randn(24)}
    return tensors | ({"residual": torch.randn(*shape[:-1], 24)} if residual else {})


def results(function, tensors, options, training):
    tensors = {name: t.clone().requires_grad_(training) for name, t in tensors.items()}
    with torch.set_grad_enabled(training):
        y = function(**tensors, **options)
    found = [y]
    if training:
        torch.manual_seed(1)
        found += torch.autograd.grad(y, list(tensors.values()), torch.randn(y.shape))
    return found


def check(op, function, tensors, options, training):
    op._PLANS._plans.clear()
    first = results(function, tensors, options, training)
    assert len(op._PLANS._plans) == 1
    for a, b in zip(first, results(function, tensors, options, training), strict=True):
        assert torch.equal(a, b)
        assert (a.stride(), a.dtype) == (b.stride(), b.dtype)
    assert len(op._PLANS._plans) == 1


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("parameters", [("bias",), ("bias", "scale", "shift")], ids=["bias", "norm"])
@pytest.mark.parametrize("options", CONV_OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
def test_conv(shape, options, parameters, training):
    check(conv_op, bmk.conv, conv_tensors(shape, options, parameters), options, training)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu", ("leaky_relu", 0.2)], ids=str)
@pytest.mark.parametrize("shape", [(3, 20), (2, 5, 20), (600, 20)], ids=str)
def test_linear(shape, activation, residual, training):
    check(linear_op, bmk.linear, linear_tensors(shape, residual), {"activation": activation}, training)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"window": (3, 0)}, {"softcap": 5.0}, {"enable_gqa": True, "scale": 0.5}],
    ids=str,
)
@pytest.mark.parametrize("length", [4, 80])
def test_attention(length, options, dtype, training):
    torch.manual_seed(0)
    heads = (4, 2, 2) if "enable_gqa" in options else (4, 4, 4)
    tensors = {name: torch.randn(2, h, length, 32, dtype=dtype) for name, h in zip("qkv", heads)}
    check(attention_op, bmk.attention, tensors, options, training)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(smoothing, reduction, training):
    torch.manual_seed(0)
    logits, target = torch.randn(5, 9), torch.tensor([0, 8, -100, 3, 4])
    options = {"label_smoothing": smoothing, "reduction": reduction}

    def function(logits, **options):
        return bmk.cross_entropy(logits, target, **options)

    check(cross_entropy_op, function, {"logits": logits}, options, training)
    expected = torch.nn.functional.cross_entropy(logits, target, **options)
    torch.testing.assert_close(function(logits, **options), expected)
    with pytest.raises(IndexError, match="Target 9 is out of bounds"):
        bmk.cross_entropy(logits, target.clamp(min=9), **options)
    with pytest.raises(RuntimeError, match=r"target must have shape \[5\], got \[4\]"):
        bmk.cross_entropy(logits, target[:4], **options)
    with pytest.raises(TypeError, match="label_smoothing must be a number, got bool"):
        bmk.cross_entropy(logits, target, label_smoothing=False, reduction=reduction)


@pytest.mark.parametrize("op", ["conv", "linear"])
def test_a_plan_keeps_no_tensor(op):
    """Neither of the layers that are gone nor of their inputs."""
    if op == "conv":
        tensors = conv_tensors(SMALL, {}, ("bias", "scale"))
    else:
        tensors = linear_tensors((3, 20), True)
    for _ in range(2):
        getattr(bmk, op)(**tensors, activation="gelu")
    left = [weakref.ref(t) for t in tensors.values()]
    del tensors
    gc.collect()
    assert [reference() for reference in left] == [None] * len(left)


def test_what_was_valid_for_other_tensors_is_refused():
    """The same sizes do not make a plan valid for other dtypes or for a bias that does not fit."""
    tensors = conv_tensors(SMALL, {}, ("bias",))
    for _ in range(2):
        bmk.conv(**tensors, pool=("max", 2))
    with pytest.raises(RuntimeError, match="bias"):
        bmk.conv(tensors["x"], tensors["weight"], torch.randn(3), pool=("max", 2))
    with pytest.raises(RuntimeError, match=r"weight must be torch\.float64"):
        bmk.conv(tensors["x"].double(), tensors["weight"], tensors["bias"], pool=("max", 2))
    with pytest.raises((RuntimeError, ValueError), match="pool"):
        bmk.conv(**tensors, pool=("max", 20))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_known_training_call_of_attention_keeps_to_autograd(dtype):
    """Gradients of gradients, batches of gradients, some gradients only, and a result written into before its backward."""

    def tensors():
        torch.manual_seed(0)
        return [torch.randn(1, 2, 40, 16, dtype=dtype, requires_grad=True) for _ in range(3)]

    attention_op._PLANS._plans.clear()
    found = []
    for _ in range(2):
        q, k, v = tensors()
        first = torch.autograd.grad(bmk.attention(q, k, v).square().sum(), (q, k, v), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (q, k, v))
        several = torch.autograd.grad(
            bmk.attention(q, k, v), v, torch.ones(3, *q.shape, dtype=dtype), is_grads_batched=True
        )
        alone = torch.autograd.grad(bmk.attention(q, k.detach(), v.detach()).sum(), q)
        found.append([*first, *second, *several, *alone])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    q, k, v = tensors()
    out = bmk.attention(q, k, v)
    out.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
