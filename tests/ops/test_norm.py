"""bmk.layer_norm and bmk.rms_norm: contract, PyTorch's pair, the CPU kernels, and the Triton kernels interpreted and compiled."""

import pytest
import torch
import torch.nn.functional as F

import bigmodel_kernels as bmk
from bigmodel_kernels.ops.norm import reference, triton_kernels
from bigmodel_kernels.testing import LAYOUTS, make
from tests.ops.fused import DTYPES, check, check_compiled, check_compiles_for, check_operators, run
from tests.triton_interpreter import interpreted

SHAPES = [(1, 7), (3, 6), (5, 16), (2, 3, 17), (7, 100), (130, 33), (2, 1000), (4, 1, 2049)]
PARTS = ["plain", "weight", "residual", "all"]


def problem(shape, part, kind="layer_norm", seed=0, layout="contiguous"):
    """(function of the tensors, tensors in float64)."""
    some = part == "all"
    x, residual = (make(*shape, dtype=torch.float64, seed=seed + i, layout=layout) for i in (1, 2))
    weight = make(shape[-1], dtype=torch.float64, seed=seed + 3) + 1 if part in ("weight", "all") else None
    bias = make(shape[-1], dtype=torch.float64, seed=seed + 4) if some and kind == "layer_norm" else None
    tensors = [x, weight, bias, residual if part in ("residual", "all") else None]

    def function(x, weight, bias, residual, backend="auto"):
        if kind == "rms_norm":
            return bmk.rms_norm(x, weight, residual=residual, eps=1e-5, backend=backend)
        return bmk.layer_norm(x, weight, bias, residual=residual, backend=backend)

    return function, tensors


def check_problem(shape, part, kind, dtype, backend, seed=0, layout="contiguous"):
    check(*problem(shape, part, kind, seed, layout), dtype, backend)


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_matches_float64(shape, dtype, part, kind):
    interpreted(check_problem, shape, part, kind, dtype, "triton", seed=10 * len(part))


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (300, 64), (2100, 48), (1, 9000)], ids=str)
def test_cpu_matches_float64(shape, dtype, part, kind):
    check_problem(shape, part, kind, dtype, "cpu", seed=20 * len(part))


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_cpu_takes_any_layout(kind, layout):
    check_problem((6, 5, 40), "all", kind, torch.float32, "cpu", layout=layout)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_cpu_with_other_numbers(kind, seed):
    check_problem((137, 165), "all", kind, torch.float32, "cpu", seed=seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_cpu_gives_the_same_bits_for_any_number_of_threads(dtype):
    function, tensors = problem((700, 96), "all")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(run(function, tensors, dtype, "cpu"))
    finally:
        torch.set_num_threads(before)
    for a, b in zip((*results[0][0], *results[0][1]), (*results[1][0], *results[1][1])):
        assert torch.equal(a, b)


def test_cpu_gradient_of_the_sum_alone():
    """Where only h = x + residual is used, or only y, gradients are those of PyTorch's ops."""
    for used in (0, 1):
        tensors = [t.requires_grad_() for t in (make(5, 7), make(7, seed=1), make(7, seed=2), make(5, 7, seed=3))]
        grads = []
        for backend in ("cpu", "torch"):
            x, weight, bias, residual = tensors
            result = bmk.layer_norm(x, weight, bias, residual=residual, backend=backend)[used]
            grads.append(torch.autograd.grad(result.square().sum(), tensors, allow_unused=True))
        for a, e in zip(*grads):
            torch.testing.assert_close(torch.zeros(1) if e is None else a, torch.zeros(1) if e is None else e)


def test_cpu_keeps_rows_apart():
    x = make(70, 33)
    x[3, 5], x[40, 0] = float("nan"), float("inf")
    for function in (bmk.layer_norm, bmk.rms_norm):
        y = function(x, backend="cpu")
        torch.testing.assert_close(y, function(x, backend="torch"), equal_nan=True)
        assert y[[3, 40]].isnan().any(1).all()
        assert y[4:40].isfinite().all()


def check_narrow(backend):
    """Rows of one and two elements, whose gradients cancel to nothing."""
    for columns in (1, 2):
        for kind in ("layer_norm", "rms_norm"):
            function, tensors = problem((3, columns), "all", kind)
            ours, exact = (run(function, tensors, torch.float32, name) for name in (backend, "torch"))
            for a, e in zip((*ours[0], *ours[1]), (*exact[0], *exact[1])):
                torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def test_narrow_rows():
    check_narrow("cpu")
    interpreted(check_narrow, "triton")


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_triton_takes_any_layout(kind, layout):
    interpreted(check_problem, (6, 5, 40), "all", kind, torch.float32, "triton", layout=layout)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_triton_with_other_numbers(seed):
    interpreted(check_problem, (37, 65), "all", "layer_norm", torch.float32, "triton", seed=seed)


def check_large_mean(backend):
    """The variance is that of differences from the mean: rows far from 0 keep their digits."""
    x = make(4, 65) + 1000
    torch.testing.assert_close(bmk.layer_norm(x, backend=backend), F.layer_norm(x, (65,)), rtol=1e-3, atol=1e-3)


def test_rows_far_from_zero():
    check_large_mean("cpu")
    interpreted(check_large_mean, "triton")


def pair_inputs(kind, part, dtype=torch.float32):
    _, (x, weight, bias, residual) = problem((3, 4, 5), part, kind)
    args = [None if t is None else t.to(dtype) for t in (x, residual, weight, bias)]
    args += [1e-5, kind == "layer_norm"]
    h = args[0] if residual is None else args[0] + args[1]
    grads = make(3, 4, 5, dtype=dtype, seed=9), None if residual is None else make(3, 4, 5, dtype=dtype, seed=8)
    return args, h, grads


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("part", PARTS)
def test_pair_and_reference_agree_with_autograd(part, kind):
    args, h, grads = pair_inputs(kind, part, torch.float64)
    y, s, *saved = bmk.layer_norm.op.fwd(*args, "torch")
    expected = reference.fwd(*args)
    for a, e in zip((y, s, *saved), expected):
        torch.testing.assert_close(a, e)
    leaves = [t.clone().requires_grad_() for t in args[:4] if t is not None]
    it = iter(leaves)
    again = [None if t is None else next(it) for t in args[:4]]
    results = reference.fwd(*again, *args[4:])[: 1 + (args[1] is not None)]
    truth = torch.autograd.grad(results, leaves, [g for g in grads if g is not None])
    d_h, d_weight, d_bias = bmk.layer_norm.op.bwd(*grads, h, *saved, True, *args, "torch")
    found = [d_h, d_h, d_weight, d_bias]
    for t, g in zip(truth, [g for g, a in zip(found, args[:4]) if a is not None]):
        torch.testing.assert_close(g, t)


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("part", ["plain", "all"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_opcheck(backend, transposed, part, kind):
    args, h, grads = pair_inputs(kind, part)
    if transposed:
        args[0], h = args[0].mT.contiguous().mT, h.mT.contiguous().mT
    check_operators("norm", args, lambda outputs: (*grads, h, *outputs[2:], True), backend)


def check_triton_fakes():
    for kind in ("layer_norm", "rms_norm"):
        for part in ("plain", "all"):
            args, h, grads = pair_inputs(kind, part)
            check_operators("norm", args, lambda outputs, grads=grads, h=h: (*grads, h, *outputs[2:], True), "triton")


def test_triton_gives_what_the_schema_says():
    interpreted(check_triton_fakes)


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_gradcheck(backend, kind):
    function, tensors = problem((3, 5), "all", kind)
    leaves = [t.requires_grad_() for t in tensors if t is not None]

    def call(*some):
        it = iter(some)
        return function(*(None if t is None else next(it) for t in tensors), backend=backend)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_compile():
    function, tensors = problem((4, 8), "all")
    check_compiled(function, [tensors, problem((6, 8), "all")[1]])


def test_torch_is_what_a_user_would_have_written():
    x, weight, bias = make(3, 7), make(7, seed=1), make(7, seed=2)
    assert torch.equal(bmk.layer_norm(x, weight, bias), F.layer_norm(x, (7,), weight, bias))
    assert torch.equal(bmk.rms_norm(x, weight), F.rms_norm(x, (7,), weight))
    y, h = bmk.layer_norm(x, residual=x, eps=0.1)
    assert torch.equal(h, x + x)
    assert torch.equal(y, F.layer_norm(h, (7,), eps=0.1))
    assert bmk.explain(bmk.rms_norm, x).backend == "torch"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_default_eps_of_rms_is_torchs(dtype):
    x = make(3, 7, dtype=dtype) * 0.01
    assert torch.equal(bmk.rms_norm(x), F.rms_norm(x, (7,)))


ERRORS = [
    (TypeError, "x must be a tensor", dict(x=None)),
    (TypeError, "weight must be a tensor", dict(weight=3.0)),
    (TypeError, "eps must be a number", dict(eps="1")),
    (ValueError, "eps must not be negative, got -1", dict(eps=-1.0)),
    (RuntimeError, "x must have a floating dtype, got torch.int64", dict(x=torch.zeros(2, 3, dtype=torch.int64))),
    (RuntimeError, r"x must have a last dimension .* got shape \[2, 0\]", dict(x=torch.zeros(2, 0))),
    (RuntimeError, r"weight must have shape \[3\], got \[4\]", dict(weight=torch.zeros(4))),
    (RuntimeError, r"bias must have shape \[3\], got \[1, 3\]", dict(bias=torch.zeros(1, 3))),
    (RuntimeError, r"residual must have shape \[2, 3\], got \[3\]", dict(residual=torch.zeros(3))),
    (
        RuntimeError,
        "weight must be torch.float32 on cpu as x is, got torch.float64",
        dict(weight=torch.zeros(3).double()),
    ),
    (ValueError, "backend must be one of", dict(backend="fast")),
    (RuntimeError, "backend 'cpu' cannot run this call", dict(x=torch.zeros(2, 3).half(), backend="cpu")),
]


@pytest.mark.parametrize(("kind", "message", "arguments"), ERRORS)
def test_errors(kind, message, arguments):
    with pytest.raises(kind, match=message):
        bmk.layer_norm(**{"x": torch.zeros(2, 3)} | arguments)


def check_refusals():
    for x, message in (
        (torch.zeros(1, 8193), "rows of up to 8192"),
        (torch.zeros(1, 4, dtype=torch.bfloat16), "no bfloat16"),
        (torch.zeros(1, 4, dtype=torch.float64), "float32, float16 and bfloat16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            bmk.layer_norm(x, backend="triton")
    assert bmk.layer_norm(torch.zeros(0, 4), torch.ones(4), backend="triton").shape == (0, 4)


def test_triton_refuses_by_name_and_takes_nothing():
    interpreted(check_refusals)


def check_far():
    """Rows 2^31 elements apart, in memory of which only what is touched exists."""
    far = 2**31 + 64
    x = torch.empty(far + 40, dtype=torch.float16).as_strided((2, 40), (far, 1))
    x.copy_(make(2, 40, dtype=torch.float16))
    for function in (bmk.layer_norm, bmk.rms_norm):
        weight = make(40, dtype=torch.float16, seed=1)
        for a, e in zip(run_far(function, x, weight), run_far(function, x.contiguous(), weight)):
            assert torch.equal(a, e)


def run_far(function, x, weight):
    y, h = function(x, weight, residual=x.detach().view_as(x), backend="triton")
    args = function.prepare(x, weight, residual=x.detach().view_as(x))
    saved = function.op.fwd(*args, "triton")[2:]
    return y, h, *function.op.bwd(x, None, x, *saved, True, *args, "triton")


def test_offsets_beyond_32_bits():
    interpreted(check_far)


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("columns", "dtype"), [(768, torch.bfloat16), (4096, torch.float32), (8192, torch.float16)])
def test_compiles_within_its_budget(columns, dtype, gpu, monkeypatch):
    x, weight = torch.empty(64, columns, dtype=dtype), torch.empty(columns, dtype=dtype)

    def launch():
        args = bmk.layer_norm.prepare(x, weight, weight, residual=torch.empty_like(x))
        _, h, *saved = triton_kernels.fwd(*args)
        triton_kernels.bwd(x, x, h, *saved, True, *args)

    check_compiles_for(gpu, launch, monkeypatch, 200)
