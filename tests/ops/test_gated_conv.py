"""bmk.gated_conv: the error rule for both outputs and every gradient, layouts, contract."""

import os
import subprocess
import sys

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.ops.gated_conv import reference
from bigmodel_kernels.ops.gated_conv.layout import is_innermost
from bigmodel_kernels.testing import make
from tests.ops.fused import check, check_compiled, check_operators, run

# batch, channels, gates, skips, length, kernel, dilation
SIZES = {
    "wavenet": (1, 64, 64, 64, 300, 2, 4),
    "odd": (2, 5, 7, 3, 50, 3, 2),
    "wide": (1, 130, 100, 70, 97, 2, 64),
    "long dilation": (2, 16, 32, 48, 130, 2, 200),
    "one step": (3, 16, 16, 32, 1, 3, 1),
    "few steps": (1, 33, 20, 40, 7, 4, 1),
}
PARTS = ("everything", "no skip", "no out", "no biases", "no sum")
NATIVE = ("cpu", "torch")


def problem(sizes="wavenet", parts="everything", seed=0, layout="contiguous"):
    """(function of the tensors, tensors in float64); `layout` also "innermost": the channels adjacent."""
    batch, channels, gates, skips, length, kernel, dilation = SIZES[sizes]

    def signal(count, seed):
        if layout == "innermost":
            return make(batch, length, count, dtype=torch.float64, seed=seed).transpose(1, 2)
        return make(batch, count, length, dtype=torch.float64, seed=seed, layout=layout)

    def weight(*shape, seed):
        return make(*shape, dtype=torch.float64, seed=seed) / (shape[1] * shape[2]) ** 0.5

    biases = parts != "no biases"
    tensors = [
        signal(channels, seed + 1),
        weight(2 * gates, channels, kernel, seed=seed + 2),
        make(2 * gates, dtype=torch.float64, seed=seed + 3) if biases else None,
        weight(channels, gates, 1, seed=seed + 4) if parts != "no out" else None,
        make(channels, dtype=torch.float64, seed=seed + 5) if biases and parts != "no out" else None,
        weight(skips, gates, 1, seed=seed + 6) if parts != "no skip" else None,
        make(skips, dtype=torch.float64, seed=seed + 7) if biases and parts != "no skip" else None,
        signal(skips, seed + 8) if parts not in ("no skip", "no sum") else None,
    ]

    def function(*tensors, backend="auto"):
        *tensors, skip = tensors
        results = bmk.gated_conv(*tensors, skip=skip, dilation=dilation, backend=backend)
        return tuple(r for r in results if r is not None)

    return function, tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "innermost"])
@pytest.mark.parametrize("sizes", SIZES)
def test_matches_float64(sizes, layout, dtype):
    check(*problem(sizes, layout=layout), dtype, "cpu")


@pytest.mark.parametrize("parts", PARTS[1:])
@pytest.mark.parametrize(("sizes", "dtype"), [("wavenet", torch.bfloat16), ("odd", torch.float32)])
def test_parts_left_out(sizes, dtype, parts):
    for seed, layout in enumerate(("contiguous", "innermost")):
        check(*problem(sizes, parts, seed=10 * seed, layout=layout), dtype, "cpu")


@pytest.mark.parametrize("scale", [1e-4, 4], ids=str)
def test_gates_that_a_bfloat16_step_keeps(scale):
    """Far below and far above 1: neither a small tanh nor 1 - tanh^2 may lose its digits on the way to the backward."""
    for sizes in ("wavenet", "odd"):
        function, tensors = problem(sizes, "no biases", layout="innermost")
        tensors[1] = tensors[1] * scale
        check(function, tensors, torch.bfloat16, "cpu")


def test_nan_reaches_the_gradients_of_a_bfloat16_step():
    function, tensors = problem("wavenet", layout="innermost")
    tensors[0][0, :, 200] = float("nan")
    _, (d_x, d_weight, *_) = run(function, tensors, torch.bfloat16, "cpu")
    assert d_weight.isnan().all()
    assert torch.equal(d_x.isnan().any(1)[0].nonzero()[:, 0], torch.tensor([196, 200, 204]))


@pytest.mark.parametrize("layout", ["sliced", "expanded", "offset"])
def test_takes_any_layout(layout):
    for sizes in ("wavenet", "odd"):
        check(*problem(sizes, layout=layout), torch.float32, "cpu")


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """The layer and its step, in a process of its own: the instruction set is chosen once."""
    code = (
        "import torch\nfrom tests.ops import test_conv_step\n"
        "from tests.ops.test_gated_conv import check, problem, test_result_does_not_depend_on_threads\n"
        "for dtype in (torch.float32, torch.float64, torch.bfloat16):\n"
        "    for sizes in ('odd', 'few steps', 'long dilation'):\n"
        "        for layout in ('contiguous', 'innermost'):\n"
        "            check(*problem(sizes, layout=layout), dtype, 'cpu')\n"
        "    for name in test_conv_step.CASES:\n"
        "        test_conv_step.test_gives_the_columns_of_the_whole_sequence(name, 'cpu', dtype)\n"
        "test_result_does_not_depend_on_threads(torch.float32)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"BIGMODEL_ISA": isa}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_result_does_not_depend_on_threads(dtype):
    function, tensors = problem("wavenet")
    tensors = [torch.cat([t] * 5, -1) if t.dim() == 3 and t.shape[-1] > 2 else t for t in tensors]
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            outputs, gradients = run(function, tensors, dtype, "cpu")
            results.append((*outputs, *gradients))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_later_steps_change_nothing_before_them():
    function, tensors = problem("odd")
    before = function(*tensors, backend="cpu")
    tensors[0][..., 30:] = float("nan")
    after = function(*tensors, backend="cpu")
    assert all(torch.equal(a[..., :30], b[..., :30]) for a, b in zip(before, after))


def test_saturated_gates():
    """tanh and sigmoid at their limits: exact results, gradients that vanish instead of turning into NaN."""
    _, tensors = problem("odd")
    tensors[1] = tensors[1] * 1e4
    tensors = [t.float().requires_grad_() for t in tensors]
    out = bmk.gated_conv(*tensors[:-1], skip=tensors[-1], dilation=2, backend="cpu")
    exact = reference.fwd(*(t.detach().double() for t in tensors), 2)
    for a, e in zip(out, exact):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)
    sum(o.sum() for o in out).backward()
    assert all(t.grad.isfinite().all() for t in tensors)


@pytest.mark.parametrize("innermost", [False, True])
def test_results_lie_as_the_input(innermost):
    for backend in NATIVE:
        function, tensors = problem("odd", layout="innermost" if innermost else "contiguous")
        assert all(is_innermost(y) is innermost for y in function(*tensors, backend=backend))


@pytest.mark.parametrize("parts", PARTS)
def test_reference_agrees_with_autograd(parts):
    function, tensors = problem("odd", parts)
    outputs, gradients = run(function, tensors, torch.float64, "torch")
    upstream = [make(*r.shape, dtype=torch.float64, seed=90 + i) for i, r in enumerate(outputs)]
    d_out = None if parts == "no out" else upstream[0]
    d_skip = None if parts == "no skip" else upstream[-1]
    found = reference.bwd(d_out, d_skip, True, True, *tensors, 2)
    found = [g for g, t in zip(found, tensors[:7]) if t is not None]
    for a, e in zip(found, gradients):
        torch.testing.assert_close(a, e)
    exact = [y for y in reference.fwd(*tensors, 2) if y.numel()]
    for a, e in zip(exact, outputs):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("backend", NATIVE)
def test_opcheck(backend):
    for layout, parts in (("contiguous", "everything"), ("innermost", "no skip"), ("innermost", "no out")):
        _, tensors = problem("odd", parts, layout=layout)
        dtype = torch.bfloat16 if parts == "everything" and backend in NATIVE else torch.float32
        args = [*(None if t is None else t.to(dtype) for t in tensors), 2, True]
        for need_x, need_weights in ((True, True), (False, True), (True, False)):

            def upstream(outputs, flags=(need_x, need_weights)):
                *results, gates = outputs
                return *(torch.ones_like(y) if y.dim() == 3 else None for y in results), gates, *flags

            check_operators("gated_conv", args, upstream, backend)


@pytest.mark.parametrize("needs", [range(1), range(1, 8), [3, 7]], ids=str)
def test_gradients_of_some(needs):
    function, tensors = problem("odd")
    leaves = [t.requires_grad_(i in needs) for i, t in enumerate(tensors)]
    wanted = [leaves[i] for i in needs]
    found = [
        torch.autograd.grad(function(*leaves, backend=b)[1].square().sum(), wanted, allow_unused=True) for b in NATIVE
    ]
    for a, e in zip(*found):
        torch.testing.assert_close(a, torch.zeros_like(a) if e is None and a is not None else e)


def test_gradcheck():
    function, tensors = problem("few steps")
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: function(*t, backend="cpu"), leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *t: function(*t, backend="cpu"), leaves, fast_mode=True)


def test_compile():
    function, tensors = problem("odd", layout="innermost")
    check_compiled(function, [tensors, problem("odd", seed=3, layout="innermost")[1]])


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 4, 0)])
def test_empty(shape):
    x = torch.zeros(shape, requires_grad=True)
    weight, mix = torch.ones(6, 4, 2, requires_grad=True), torch.ones(4, 3, 1)
    out, total = bmk.gated_conv(x, weight, None, mix, None, mix, backend="cpu")
    assert out.shape == total.shape == shape
    (out.sum() + total.sum()).backward()
    assert x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros(6, 4, 2))


def test_autocast():
    function, tensors = problem("odd")
    tensors = [t.float() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        results = function(*tensors)
    expected = function(*(t.bfloat16() for t in tensors))
    assert all(torch.equal(a, b) for a, b in zip(results, expected))


X, W, MIX = torch.zeros(2, 4, 9), torch.zeros(6, 4, 2), torch.zeros(4, 3, 1)
HALF = dict(x=X.half(), weight=W.half(), out_weight=MIX.half(), skip_weight=None, backend="cpu")
ERRORS = [
    (TypeError, "x must be a tensor", dict(x=[1.0])),
    (TypeError, "skip must be a tensor", dict(skip=1)),
    (TypeError, "dilation must be an int", dict(dilation=2.0)),
    (ValueError, "dilation must be positive, got 0", dict(dilation=0)),
    (ValueError, "must not both be left out", dict(out_weight=None, skip_weight=None)),
    (ValueError, "out_bias needs out_weight", dict(out_weight=None, out_bias=torch.zeros(4))),
    (ValueError, "skip needs skip_weight", dict(skip_weight=None, skip=X)),
    (RuntimeError, r"x must have shape \[N, C, T\]", dict(x=X[0])),
    (RuntimeError, r"weight must have shape \[2 D, 4, K\], got \[5, 4, 2\]", dict(weight=torch.zeros(5, 4, 2))),
    (RuntimeError, r"bias must have shape \[6\], got \[3\]", dict(bias=torch.zeros(3))),
    (RuntimeError, r"out_weight must have shape \[4, 3, 1\]", dict(out_weight=torch.zeros(4, 3))),
    (RuntimeError, r"skip_weight must have shape \[0, 3, 1\], got \[\]", dict(skip_weight=torch.zeros(()))),
    (RuntimeError, r"skip must have shape \[2, 4, 9\], got \[2, 4, 8\]", dict(skip=X[..., 1:])),
    (RuntimeError, "weight must be torch.float32 on cpu as x is, got torch.float64", dict(weight=W.double())),
    (RuntimeError, "backend 'cpu' cannot run this call.*float16", HALF),
]


@pytest.mark.parametrize(("kind", "message", "arguments"), ERRORS)
def test_errors(kind, message, arguments):
    with pytest.raises(kind, match=message):
        bmk.gated_conv(**{"x": X, "weight": W, "out_weight": MIX, "skip_weight": MIX} | arguments)
