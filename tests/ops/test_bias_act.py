"""bmk.bias_act: contract, PyTorch's ops, and the Triton kernels interpreted and compiled."""

import pytest
import torch
import torch.nn.functional as F

import bigmodel_kernels as bmk
from bigmodel_kernels.ops.bias_act import reference, triton_kernels
from bigmodel_kernels.ops.bias_act.op import ACTIVATIONS
from bigmodel_kernels.testing import LAYOUTS, make
from tests.ops.fused import DTYPES, check, check_compiled, check_compiles_for, check_operators, run
from tests.triton_interpreter import interpreted

SHAPES = [(1, 1), (3, 2), (5, 16), (2, 3, 17), (130, 33), (3, 1030), (9,)]


def problem(shape, activation, bias=True, residual=True, seed=0, layout="contiguous"):
    """(function of the tensors, tensors in float64)."""
    x, other = (make(*shape, dtype=torch.float64, seed=seed + i, layout=layout) for i in (1, 2))
    tensors = [x, make(shape[-1], dtype=torch.float64, seed=seed + 3) if bias else None, other if residual else None]

    def function(x, bias, residual, backend="auto"):
        return bmk.bias_act(x, bias, activation=activation, residual=residual, backend=backend)

    return function, tensors


def check_problem(shape, activation, dtype, **options):
    check(*problem(shape, activation, **options), dtype, "triton")


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_matches_float64(shape, dtype, activation):
    interpreted(check_problem, shape, activation, dtype)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_triton_takes_any_layout(layout):
    interpreted(check_problem, (6, 5, 40), "silu", torch.float32, layout=layout)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(("bias", "residual"), [(False, False), (True, False), (False, True)])
def test_triton_without_parts(bias, residual, seed):
    interpreted(check_problem, (7, 20), "gelu", torch.float32, bias=bias, residual=residual, seed=seed)


def dropped(dropout_p, shape, dtype=torch.float64):
    """Arguments of the operators, and an upstream gradient."""
    _, tensors = problem(shape, "gelu")
    seed = torch.tensor([2**61 + 12345], dtype=torch.int64)
    return [*(t.to(dtype) for t in tensors), seed, "gelu", dropout_p], make(*shape, dtype=dtype, seed=8)


def check_dropout(dropout_p, shape):
    args, dy = dropped(dropout_p, shape, torch.float32)
    op = torch.ops.bigmodel_kernels
    ours = op.bias_act_fwd(*args, "triton"), *op.bias_act_bwd(dy, True, *args, "triton")
    exact, dy = dropped(dropout_p, shape)
    truth = reference.fwd(*exact), *reference.bwd(dy, True, *exact)
    for a, e in zip(ours, truth):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(40, 33), (5, 700), (300, 16)], ids=str)
def test_triton_drops_what_the_reference_drops(shape, dropout_p):
    interpreted(check_dropout, dropout_p, shape)


def check_seed():
    x = torch.ones(200, 64)
    torch.manual_seed(3)
    first = bmk.bias_act(x.requires_grad_(), dropout_p=0.25, backend="triton")
    second = bmk.bias_act(x, dropout_p=0.25, backend="triton")
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(first, bmk.bias_act(x, dropout_p=0.25, backend="triton"))
    assert abs((first == 0).float().mean() - 0.25) < 0.02
    assert torch.equal(torch.autograd.grad(first.sum(), x)[0], first)  # the same elements, times the same factor


def test_dropout_draws_one_seed_from_torch():
    interpreted(check_seed)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_reference_agrees_with_autograd(activation):
    function, (x, bias, residual) = problem((4, 5), activation)
    args = [x, bias, residual, None, activation or "none", 0.0]
    (y,), (d_x, d_bias, d_residual) = run(function, [x, bias, residual], torch.float64, "torch")
    dy = make(4, 5, dtype=torch.float64, seed=90)
    op = torch.ops.bigmodel_kernels
    torch.testing.assert_close(op.bias_act_fwd(*args, "torch"), y)
    for a, e in zip(op.bias_act_bwd(dy, True, *args, "torch"), (d_x, d_bias)):
        torch.testing.assert_close(a, e)
    assert torch.equal(d_residual, dy)


def check_opcheck(backend):
    for transposed in (False, True):
        args, dy = dropped(0.5, (6, 8), torch.float32)
        if transposed:
            args[0], dy = args[0].mT.contiguous().mT, dy.mT.contiguous().mT
        for need_bias in (False, True):
            check_operators("bias_act", args, lambda y, dy=dy, need=need_bias: (dy, need), backend)


def test_opcheck():
    check_opcheck("torch")
    interpreted(check_opcheck, "triton")


def test_gradcheck():
    function, tensors = problem((3, 5), "gelu")
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_compile():
    function, tensors = problem((4, 8), "gelu")
    check_compiled(function, [tensors, problem((6, 8), "gelu")[1]])


def test_torch_is_what_a_user_would_have_written():
    x, bias, residual = make(3, 7), make(7, seed=1), make(3, 7, seed=2)
    assert torch.equal(bmk.bias_act(x, bias, activation="gelu", residual=residual), F.gelu(x + bias) + residual)
    torch.manual_seed(0)
    ours = bmk.bias_act(x, dropout_p=0.5)
    torch.manual_seed(0)
    assert torch.equal(ours, F.dropout(x, 0.5))
    assert bmk.explain(bmk.bias_act, x).backend == "torch"


ERRORS = [
    (TypeError, "x must be a tensor", dict(x=[1.0])),
    (TypeError, "bias must be a tensor", dict(bias=1)),
    (TypeError, "dropout_p must be a number", dict(dropout_p="1")),
    (ValueError, r"dropout_p must be a probability in \[0, 1\], got 1.5", dict(dropout_p=1.5)),
    (ValueError, "activation must be None or one of relu.*got 'swish'", dict(activation="swish")),
    (RuntimeError, "x must have a floating dtype, got torch.int64", dict(x=torch.zeros(2, 3, dtype=torch.int64))),
    (RuntimeError, "x must have at least one dimension", dict(x=torch.tensor(1.0))),
    (RuntimeError, r"bias must have shape \[3\], got \[4\]", dict(bias=torch.zeros(4))),
    (RuntimeError, r"residual must have shape \[2, 3\], got \[3\]", dict(residual=torch.zeros(3))),
    (RuntimeError, "bias must be torch.float32 on cpu as x is, got torch.float64", dict(bias=torch.zeros(3).double())),
    (ValueError, "backend must be one of", dict(backend="fast")),
    (RuntimeError, "backend 'cpu' cannot run this call", dict(backend="cpu")),
]


@pytest.mark.parametrize(("kind", "message", "arguments"), ERRORS)
def test_errors(kind, message, arguments):
    with pytest.raises(kind, match=message):
        bmk.bias_act(**{"x": torch.zeros(2, 3)} | arguments)


def check_far():
    """Rows 2^31 elements apart, in memory of which only what is touched exists."""
    far = 2**31 + 64
    x = torch.empty(far + 40, dtype=torch.float16).as_strided((2, 40), (far, 1))
    x.copy_(make(2, 40, dtype=torch.float16))
    results = []
    for t in (x, x.contiguous()):
        args = bmk.bias_act.prepare(t, make(40, dtype=torch.float16, seed=1), residual=t.view_as(t), activation="silu")
        results.append((triton_kernels.fwd(*args), *triton_kernels.bwd(t, True, *args)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_offsets_beyond_32_bits():
    interpreted(check_far)


def check_empty():
    for shape in ((0, 4), (3, 0)):
        x, bias = torch.zeros(shape, requires_grad=True), torch.zeros(shape[-1], requires_grad=True)
        y = bmk.bias_act(x, bias, dropout_p=0.5, backend="triton")
        y.sum().backward()
        assert y.shape == x.grad.shape == shape
        assert torch.equal(bias.grad, torch.zeros(shape[-1]))


def test_empty():
    interpreted(check_empty)


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("activation", "dtype"), [("gelu", torch.bfloat16), ("silu", torch.float32)])
def test_compiles_within_its_budget(activation, dtype, gpu, monkeypatch):
    x, seed = torch.empty(64, 1024, dtype=dtype), torch.zeros(1, dtype=torch.int64)

    def launch():
        x_, bias, residual, _, *rest = bmk.bias_act.prepare(x, x[0], residual=x.clone(), activation=activation)
        for number, p in ((None, 0.0), (seed, 0.1)):
            args = (x_, bias, residual, number, rest[0], p)
            triton_kernels.fwd(*args)
            triton_kernels.bwd(x, True, *args)

    assert len(check_compiles_for(gpu, launch, monkeypatch, 160)) == 4
