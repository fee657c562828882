"""bmk.linear: contract, the C++ kernels against float64, PyTorch's ops."""

import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings

import bigmodel_kernels as bmk
from bigmodel_kernels import _cpu
from bigmodel_kernels.ops.linear import reference
from bigmodel_kernels.ops.linear.op import ACTIVATIONS
from bigmodel_kernels.testing import LAYOUTS, make
from tests.ops.fused import DTYPES, check, check_compiled, check_operators, run
from tests.rerun import rerun
from tests.triton_interpreter import interpreted

# Rows, inputs, outputs: tails of tiles of 6 x 64 and 12 x 32, of blocks of 96 rows and of 192 inputs, more than 384; 0 and 1.
SIZES = [(1, 1, 1), (3, 5, 7), (8, 48, 48), (97, 193, 49), (200, 33, 130), (5, 400, 1), (64, 16, 500), (130, 1, 3)]
SIZES += [(12, 64, 64), (13, 385, 65), (193, 384, 96)]
# Few rows, whose weights are read where they lie: groups of 4, 2 and 1 rows and of 4 outputs, blocks of 4096 bytes, tails.
FEW = [(1, 64, 4), (2, 1100, 33), (3, 256, 7), (7, 2100, 19), (16, 1029, 66)]
SIZES += FEW


def problem(size, activation, bias=True, residual=True, seed=0, layout="contiguous", leading=(), integer=False):
    """(function of the tensors, tensors in float64)."""
    rows, inputs, outputs = size
    options = {"dtype": torch.float64, "layout": layout, "integer": integer}
    tensors = [
        make(*leading, rows, inputs, seed=seed + 1, **options),
        make(outputs, inputs, seed=seed + 2, **options) / (1 if integer else max(1, inputs) ** 0.5),
        make(outputs, dtype=torch.float64, seed=seed + 3, integer=integer) if bias else None,
        make(*leading, rows, outputs, seed=seed + 4, **options) if residual else None,
    ]

    def function(x, weight, bias, residual, backend="auto"):
        return bmk.linear(x, weight, bias, activation=activation, residual=residual, backend=backend)

    return function, tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS, ("leaky_relu", 0.3)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_float64(size, activation, dtype):
    for residual in (False, True):
        check(*problem(size, activation, residual=residual), dtype, "cpu")


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("size", [(97, 193, 49), (64, 16, 500), *FEW], ids=str)
def test_bfloat16(size, activation):
    for residual in (False, True):
        check(*problem(size, activation, residual=residual), torch.bfloat16, "cpu")


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("leading", [(), (3,), (2, 2)], ids=str)
def test_takes_any_layout(layout, leading):
    check(*problem((20, 40, 30), "gelu", layout=layout, leading=leading), torch.float32, "cpu")


@pytest.mark.parametrize("size", FEW, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_few_rows_take_weights_in_either_layout(layout, dtype, size):
    function, tensors = problem(size, "relu", layout=layout)
    tensors[1] = tensors[1].t().contiguous().t()  # outputs are adjacent, as in GPT-2
    check(function, tensors, dtype, "cpu")


@pytest.mark.parametrize("rows", [1, 11])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_rows_do_not_depend_on_the_number_of_threads(dtype, transposed, rows):
    x, weight = make(rows, 700, dtype=dtype), make(450, 700, dtype=dtype, seed=1)
    if transposed:
        weight = weight.t().contiguous().t()
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        found.append(bmk.linear(x, weight, backend="cpu"))
    torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("rows", [1, 2, 6, 16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_rows_read_nothing_beyond_their_tensors(dtype, transposed, rows):
    """What lies behind a tensor, or between its rows, is NaN."""
    inputs, outputs = 149, 71
    x = torch.full((rows, inputs + 40), torch.nan, dtype=dtype)[:, :inputs]
    weight = torch.full((inputs, outputs + 40) if transposed else (outputs, inputs + 40), torch.nan, dtype=dtype)
    weight = weight[:, :outputs].t() if transposed else weight[:, :inputs]
    for t, seed in ((x, 1), (weight, 2)):
        t.copy_(make(*t.shape, seed=seed))
    ours = bmk.linear(x, weight, backend="cpu")
    torch.testing.assert_close(
        ours.float(), x.float() @ weight.float().t(), rtol=1e-2, atol=1e-2 if dtype == torch.bfloat16 else 1e-4
    )


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(("bias", "residual"), [(False, False), (True, False), (False, True)])
def test_without_parts(bias, residual, seed):
    check(*problem((60, 70, 80), "tanh", bias=bias, residual=residual, seed=seed), torch.float32, "cpu")


def check_triton(activation, dtype):
    for residual in (False, True):
        check(*problem((40, 24, 33), activation, residual=residual), dtype, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_triton_matches_float64(activation, dtype):
    interpreted(check_triton, activation, dtype)


@settings(max_examples=30, deadline=None)
@given(
    st.tuples(st.integers(1, 210), st.integers(1, 410), st.integers(1, 110)),
    st.sampled_from([None, *ACTIVATIONS]), st.sampled_from(LAYOUTS), st.booleans(), st.booleans(), st.integers(0, 9),
)  # fmt: skip
def test_any_size(size, activation, layout, bias, residual, seed):
    rows, inputs, outputs = size
    # One number, or a few, may be sums that cancel; sizes as small as that are among SIZES.
    assume(min(rows, outputs) * inputs >= 16 and (outputs >= 16 or not bias))
    # Of fewer different numbers, all of dx may hang on one of z, and torch's error on its luck.
    least = 256 if (1 if layout == "expanded" else rows) * outputs >= 256 else math.inf
    check(*problem(size, activation, bias, residual, seed, layout), torch.float32, "cpu", least=least)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_integers_are_exact(size):
    function, tensors = problem(size, "relu", integer=True)
    exact, ours = (run(function, tensors, dtype, "cpu") for dtype in (torch.float64, torch.float32))
    for a, e in zip((*ours[0],), (*exact[0],)):
        assert torch.equal(a.double(), e)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_lower_instruction_sets(isa):
    rerun(__file__, "parts or layout or beyond or exact or threads or (bfloat16 and (None or silu))", isa)


@pytest.mark.parametrize(
    "size", [(700, 300, 170), (200, 500, 64), (96, 64, 200), (400, 40, 33), (7, 1030, 130)], ids=str
)
@pytest.mark.parametrize(("activation", "residual"), [("silu", True), ("relu", False)])
def test_result_does_not_depend_on_the_number_of_threads(size, activation, residual):
    """Parts of the rows, one strip or several at a time, narrow ones."""
    function, tensors = problem(size, activation, residual=residual)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        found.append(run(function, tensors, torch.float32, "cpu"))
    torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip((*found[0][0], *found[0][1]), (*other[0], *other[1])):
            assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("size", [(0, 3, 4), (3, 0, 4), (3, 4, 0)], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_empty(size, backend):
    function, tensors = problem(size, "relu")
    expected = run(function, tensors, torch.float32, "torch")
    ours = run(function, tensors, torch.float32, backend)
    for a, e in zip((*ours[0], *ours[1]), (*expected[0], *expected[1])):
        torch.testing.assert_close(a, e)


def test_nan_and_infinity_keep_their_places():
    x = make(10, 20)
    x[3, 4], x[5, 6] = float("nan"), float("inf")
    weight = make(30, 20, seed=1)
    for activation in (None, "relu", "silu"):
        ours = bmk.linear(x, weight, activation=activation, backend="cpu")
        theirs = bmk.linear(x, weight, activation=activation, backend="torch")
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["none", *ACTIVATIONS])
def test_reference_agrees_with_autograd(activation):
    function, tensors = problem((4, 5, 6), None if activation == "none" else activation)
    for residual in (None, tensors[3]):
        inputs = [*tensors[:3], residual]
        args = [*inputs, activation, 0.01, True]
        (y,), gradients = run(function, inputs, torch.float64, "torch")
        found, known = reference.fwd(*args)
        torch.testing.assert_close(found, y)
        dy = make(4, 6, dtype=torch.float64, seed=90)
        for a, e in zip(reference.bwd(dy, found, known, [1, 1, 1], *args), gradients):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_opcheck(backend, activation):
    for layout in ("contiguous", "transposed"):
        for residual in (False, True):
            _, tensors = problem((6, 8, 10), None, residual=residual, layout=layout, leading=(2,))
            args = [*(t if t is None else t.float() for t in tensors), activation, 0.01, True]
            dy = make(2, 6, 10, layout=layout)
            for needs in ([1, 1, 1], [0, 1, 0], [1, 0, 0]):
                check_operators("linear", args, lambda saved, dy=dy, needs=needs: (dy, *saved, needs), backend)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_gradcheck(backend):
    function, tensors = problem((3, 4, 5), "gelu")
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: function(*t, backend=backend), leaves)
    assert torch.autograd.gradgradcheck(lambda *t: function(*t, backend=backend), leaves, fast_mode=True)


def test_compile():
    function, tensors = problem((40, 64, 64), "gelu")
    check_compiled(function, [tensors, problem((50, 64, 64), "gelu")[1]])


def test_compile_with_the_input_as_residual():
    x, weight = make(6, 5), make(5, 5, seed=1)
    compiled = torch.compile(lambda x, w: bmk.linear(x, w, residual=x), fullgraph=True)
    torch.testing.assert_close(compiled(x, weight.requires_grad_()), x @ weight.t() + x)


def test_result_may_be_overwritten_where_the_backward_does_not_read_it():
    x, weight = make(40, 64), make(64, 64, seed=1, requires_grad=True)
    bmk.linear(x, weight, backend="cpu").relu_().sum().backward()
    expected = F.linear(x, weight.detach()).gt(0).float().t() @ x
    torch.testing.assert_close(weight.grad, expected, rtol=1e-5, atol=1e-4)


def test_torch_is_what_a_user_would_have_written():
    x, weight, bias = make(3, 7), make(5, 7, seed=1), make(5, seed=2)
    assert torch.equal(
        bmk.linear(x, weight, bias, activation="gelu", backend="torch"), F.gelu(F.linear(x, weight, bias))
    )
    for dtype in (torch.float16, torch.bfloat16):
        args = (x.to(dtype), weight.to(dtype), bias.to(dtype))
        assert torch.equal(bmk.linear(*args), F.linear(*args))


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("rows", [3, 512])
def test_a_call_that_was_made_before(rows, activation):
    """The second call of the same sizes goes by what the first found out: it must see new values, and refuse what is wrong."""
    x, weight, bias = make(rows, 128), make(128, 128, seed=1), make(128, seed=2)

    def both(*tensors):
        found = [bmk.linear(*tensors, activation=activation, backend=backend) for backend in ("auto", "torch")]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
        return found

    first = both(x, weight, bias)[0]
    assert torch.equal(first, both(x, weight, bias)[0])
    weight.data.mul_(2)
    assert not torch.equal(first, both(x, weight, bias)[0])
    both(x.view(1, rows, 128), weight, bias)
    both(x.t().contiguous().t(), weight, bias)
    both(x, weight, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert bmk.linear(x, weight, bias, activation=activation).dtype == torch.bfloat16
    for wrong in ((x.double(), weight, bias), (x, weight.double(), bias), (x, weight, bias.double())):
        with pytest.raises(RuntimeError, match="must be torch"):
            bmk.linear(*wrong, activation=activation)
    with torch.inference_mode():
        made = x + 1
    weight.requires_grad_()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):  # as PyTorch's own
        bmk.linear(made, weight, bias, activation=activation)
    for wanted in ((weight,), (weight, bias), (x, weight, bias), (x,)):
        for t in (x, weight, bias):
            t.requires_grad_(any(t is w for w in wanted))
        for _ in range(2):
            ours, stock = (torch.autograd.grad(y.square().sum(), wanted) for y in both(x, weight, bias))
            torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-3)
    y = bmk.linear(x, weight, bias, activation=activation)
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (again,) = torch.autograd.grad(g.square().sum(), x)
    assert again.abs().sum() > 0


def test_autocast():
    x, weight = make(40, 64), make(64, 64, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bmk.linear(x, weight), F.linear(x, weight))


def test_auto_knows_where_the_products_of_torch_are_slow(monkeypatch):
    x, weight = make(512, 128), make(128, 128)
    monkeypatch.setattr(_cpu, "mkl_on_amd", lambda: False)
    for slow, backend in ((True, "cpu"), (False, "torch")):
        monkeypatch.setattr(_cpu, "slow_products", lambda slow=slow: slow)
        assert bmk.explain(bmk.linear, x, weight).backend == backend
        assert bmk.explain(bmk.linear, x[:64], weight).backend == backend
        assert bmk.explain(bmk.linear, x[:64], weight.clone().requires_grad_()).backend == "torch"
        assert bmk.explain(bmk.linear, x[:8], weight).backend == "torch"


def test_auto_knows_where_the_products_of_torch_go_to_mkl_on_amd(monkeypatch):
    x, weight = make(512, 512), make(512, 512)
    monkeypatch.setattr(_cpu, "slow_products", lambda: False)
    for slow, backend in ((True, "cpu"), (False, "torch")):
        monkeypatch.setattr(_cpu, "mkl_on_amd", lambda slow=slow: slow)
        assert bmk.explain(bmk.linear, x[:96], weight).backend == backend
        assert bmk.explain(bmk.linear, x[:4], weight).backend == backend
        assert bmk.explain(bmk.linear, x[:64], weight[:128]).backend == "torch"
        assert bmk.explain(bmk.linear, x[:1], weight).backend == backend
        assert bmk.explain(bmk.linear, x[:1], weight.t()).backend == "torch"
        assert bmk.explain(bmk.linear, x[:1].repeat(1, 2), weight.repeat(2, 2).t()).backend == backend
        assert bmk.explain(bmk.linear, x[:1].repeat(1, 2), weight.repeat(4, 4)[::2, ::2]).backend == "torch"
        for dots in (True, False):
            monkeypatch.setattr(_cpu, "dot_products", lambda dots=dots: dots)
            chosen = bmk.explain(bmk.linear, x[:1].bfloat16(), weight[:128].bfloat16()).backend
            assert chosen == (backend if dots else "torch")
        assert bmk.explain(bmk.linear, x[:3], weight[:256]).backend == "torch"
        assert bmk.explain(bmk.linear, x[:97], weight).backend == "torch"
        assert bmk.explain(bmk.linear, x[:128], weight).backend == backend
        assert bmk.explain(bmk.linear, x, weight[:200]).backend == "torch"
        assert bmk.explain(bmk.linear, x[:64], weight.clone().requires_grad_()).backend == "torch"
        assert bmk.explain(bmk.linear, x, weight.clone().requires_grad_()).backend == backend
        assert bmk.explain(bmk.linear, x[:, :450], weight[:, :450].clone().requires_grad_()).backend == "torch"


@pytest.mark.parametrize(
    ("maker", "family", "capability", "products", "few"),
    [
        ("AuthenticAMD", "26", "AVX512", True, True),
        ("AuthenticAMD", "25", "AVX512", False, True),
        ("AuthenticAMD", "25", "AVX2", False, False),
        ("GenuineIntel", "6", "AVX512", False, False),
        ("", "", "AVX512", False, False),
    ],
)
def test_where_the_products_of_torch_are_slow_is_told_by_the_processor(
    maker, family, capability, products, few, monkeypatch
):
    fields = {"vendor_id": maker, "cpu family": family}
    monkeypatch.setattr(_cpu, "_cpuinfo", fields.get)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    cached = (_cpu.vendor, _cpu.mkl_on_amd, _cpu.slow_products)
    for function in cached:
        function.cache_clear()
    try:
        assert (_cpu.slow_products(), _cpu.mkl_on_amd()) == (products, few)
    finally:
        for function in cached:
            function.cache_clear()


ERRORS = [
    (TypeError, "x must be a tensor", dict(x=[1.0])),
    (TypeError, "weight must be a tensor", dict(weight=1)),
    (TypeError, "bias must be a tensor", dict(bias=1)),
    (ValueError, "activation must be None or one of relu.*got 'swish'", dict(activation="swish")),
    (ValueError, "activation must be None or one of relu.*got 'tanh_sigmoid'", dict(activation="tanh_sigmoid")),
    (RuntimeError, "x must have a floating dtype, got torch.int64", dict(x=torch.zeros(2, 3, dtype=torch.int64))),
    (RuntimeError, r"x must have a last dimension of 3, got shape \[\]", dict(x=torch.tensor(1.0))),
    (RuntimeError, r"x must have a last dimension of 3, got shape \[2, 4\]", dict(x=torch.zeros(2, 4))),
    (RuntimeError, r"weight must have 2 dimensions, got shape \[3\]", dict(weight=torch.zeros(3))),
    (RuntimeError, r"bias must have shape \[4\], got \[3\]", dict(bias=torch.zeros(3))),
    (RuntimeError, r"residual must have shape \[2, 4\], got \[4\]", dict(residual=torch.zeros(4))),
    (RuntimeError, "bias must be torch.float32 on cpu as x is, got torch.float64", dict(bias=torch.zeros(4).double())),
    (ValueError, "backend must be one of", dict(backend="fast")),
    (NotImplementedError, "backend 'cuda' cannot run this call", dict(backend="cuda")),
    (RuntimeError, "x is torch.float16", dict(x=torch.zeros(2, 3).half(), weight=torch.zeros(4, 3).half(), backend="cpu")),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "arguments"), ERRORS)
def test_errors(kind, message, arguments):
    with pytest.raises(kind, match=message):
        bmk.linear(**{"x": torch.zeros(2, 3), "weight": torch.zeros(4, 3)} | arguments)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu"])
def test_activations_of_numbers_far_from_0(activation):
    """And their derivatives: that of silu at -1e38 was -0.6."""
    z = torch.tensor([[1e38, -1e38, 1e4, -1e4, 104.0, -104.0, 88.5, -88.5, 20.0, -20.0]]).T
    results = []
    for backend in ("cpu", "torch"):
        x = z.clone().requires_grad_()
        y = bmk.linear(x, torch.ones(17, 1), activation=activation, backend=backend)
        results.append((y.detach(), *torch.autograd.grad(y.sum(), x)))
    torch.testing.assert_close(*results)
