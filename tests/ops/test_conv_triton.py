"""bmk.conv on the Triton kernels, in Triton's interpreter, against float64: result and every gradient.

float32 and float16: the interpreter multiplies the bits of bfloat16 numbers, and `supports` refuses them there.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.testing import assert_matches, make
from tests.ops.conv_problem import GEOMETRIES, NAMES, TAILS, Problem
from tests.triton_interpreter import interpreted

DTYPES = ("float32", "float16")
LAYOUTS = ("contiguous", "innermost", "transposed", "sliced", "offset", "batch_last")
TAILS_OF_A_GEOMETRY = 3
LARGE = {
    "textbook",
    "winograd_flat",
    "winograd_pad",
    "winograd_row",
    "p3x3",
    "long1d",
    "stem",
    "groups16",
}  # one tail each
DRAWS = 4  # of a problem with few numbers, whose largest error is a matter of luck

CASES = [
    (geometry, list(TAILS)[(i + 3 * j) % len(TAILS)], DTYPES[(i // 2 + j) % 2], LAYOUTS[(i + 2 * j + i // 6) % len(LAYOUTS)])
    for i, geometry in enumerate(GEOMETRIES)
    for j in range(1 if geometry in LARGE else TAILS_OF_A_GEOMETRY)
]  # fmt: skip
GRADIENTS = ("dx", "dweight", "dbias", "dscale", "dshift", "dresidual")


def in_layout(name):
    """A function that puts a tensor's numbers into the layout `name`; gaps hold NaN."""

    def put(t):
        if name == "innermost" and t.dim() > 2:
            return t.movedim(1, -1).contiguous().movedim(-1, 1)
        if name == "transposed" and t.dim() > 1:
            return t.transpose(-1, -2).contiguous().transpose(-1, -2)
        if name == "sliced":
            wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype)
            wide[..., ::2] = t
            return wide[..., ::2]
        if name == "offset":
            return torch.cat([t.new_full((1,), float("nan")), t.flatten()])[1:].view(t.shape)
        if name == "batch_last":
            return t.movedim(0, -1).contiguous().movedim(-1, 0)
        return t

    return put


def check(geometry, tail, dtype, layout, seed):
    dtype = getattr(torch, dtype)
    first = Problem(geometry, tail, dtype, seed)
    draws = DRAWS if min(first.grad.numel(), first.tensors["weight"].numel()) < 100 else 1
    problems = [first, *(Problem(geometry, tail, dtype, seed + 7 * i) for i in range(1, draws))]
    ours = [p.run(dtype, "triton", layout=in_layout(layout)) for p in problems]
    exact = [p.run(torch.float64, "torch") for p in problems]
    theirs = [p.run(dtype, "torch") for p in problems]
    for i, name in enumerate(("out", *NAMES)):
        if ours[0][i] is not None:
            a, e, b = (torch.stack([results[i] for results in kind]) for kind in (ours, exact, theirs))
            assert_matches(
                a, e, b, dtype=dtype, gradient=name != "out", magnitude=first._magnitude(name), name=name
            )  # fmt: skip


@pytest.mark.parametrize(("geometry", "tail", "dtype", "layout"), CASES)
def test_matches_float64(geometry, tail, dtype, layout):
    interpreted(check, geometry, tail, dtype, layout, len(geometry) % 3)


def check_integers(geometry, tail, dtype):
    dtype = getattr(torch, dtype)
    p = Problem(geometry, tail, dtype, seed=4, integer=True)
    for name, ours, exact in zip(("out", *NAMES), p.run(dtype, "triton"), p.run(torch.float64, "torch")):
        if ours is not None:
            assert torch.equal(ours, exact.to(dtype)), name


@pytest.mark.parametrize("i", range(len(GEOMETRIES)), ids=list(GEOMETRIES))
def test_integers_are_exact(i):
    geometry = list(GEOMETRIES)[i]
    if geometry not in LARGE:
        interpreted(check_integers, geometry, ("bias", "relu_max", "norm_residual_relu")[i % 3], DTYPES[i // 3 % 2])


def check_saved(geometry, tail):
    """Forward and backward pair with those of the other backends: same saved tensors, same memory formats."""
    from bigmodel_kernels.ops.conv import op, torch_op, triton_kernels

    p = Problem(geometry, tail, torch.float32, seed=2)
    args = bmk.conv.prepare(*_arguments(p), **_options(p))
    with torch.no_grad():
        ours, theirs = triton_kernels.fwd(*args), torch_op.fwd(*args)
        needs = [int(a is not None) for a in args[:6]]
        for name, a, b, promised in zip(("out", "index", "pre"), ours, theirs, op._fake_fwd(*args)):
            assert a.dtype == promised.dtype
            assert (a.shape, a.stride()) == (promised.shape, promised.stride()), name
            if a.dtype == torch.uint8:
                assert torch.equal(a, b), name
            elif a.numel():
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        crossed = triton_kernels.bwd(p.grad, *theirs, needs, *args)
        expected = torch_op.bwd(p.grad, *ours, needs, *args)
        promised = op._fake_bwd(p.grad, *ours, needs, *args)
        for name, a, b, c in zip(GRADIENTS, crossed, expected, promised):
            assert (a.shape, a.stride()) == (c.shape, c.stride()), name
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")


def _arguments(p):
    return [None if t is None else t.requires_grad_() for t in list(p.tensors.values())[:3]]


def _options(p):
    return p.options | {name: p.tensors[name] for name in ("scale", "shift", "residual")}


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("geometry", ["k4s2", "k5", "t2d_uneven", "depthwise"])
def test_saved_tensors_are_those_of_the_schema(geometry, tail):
    interpreted(check_saved, geometry, tail)


def check_inference(geometry, tail, layout):
    p = Problem(geometry, tail, torch.float32, seed=3)
    with torch.no_grad():
        ours = p.run(torch.float32, "triton", grads=False, layout=in_layout(layout))[0]
    theirs = p.run(torch.float32, "torch", grads=False, layout=in_layout(layout))[0]
    assert ours.stride() == theirs.stride()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "innermost"])
@pytest.mark.parametrize("tail", TAILS)
def test_inference_has_the_memory_format_of_torch(tail, layout):
    interpreted(check_inference, "k2x5", tail, layout)


def compare(*tensors, **options):
    """The error rule for the result and its gradients, the upstream gradient being that of a sum, which has strides 0."""
    results = []
    for backend, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        out = bmk.conv(*leaves, **options, backend=backend)
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    for name, a, e in zip(("out", *NAMES), *results):
        assert_matches(a.detach(), e.detach(), None, dtype=torch.float32, gradient=name != "out", name=name)


def check_shapes():
    x, w = make(2, 4, 6, 5, seed=1), make(8, 2, 3, 3, seed=2)
    compare(x, w, padding=1, groups=2, activation="tanh_sigmoid")
    compare(x, w, padding=1, groups=2, activation="tanh_sigmoid", pool=("max", 2, 1))
    compare(x[0], w, groups=2, stride=2)
    compare(x[:1].expand(3, -1, -1, -1), w, groups=2, padding=(2, 0))
    compare(x, w[:, :1].expand(-1, 4, -1, -1), dilation=2, padding=2)
    compare(make(1, 8, 4, 3, seed=7), make(8, 6, 3, 3, seed=8), groups=8, transposed=True, stride=2)  # groups of 1 to 6


def test_gates_across_groups_and_expanded_tensors():
    interpreted(check_shapes)


def check_windows(pool):
    x, w = make(1, 4, 6, 5, seed=1), make(8, 2, 1, 1, seed=2)
    compare(x, w, groups=2, padding=2, activation="silu", pool=pool)
    compare(x, w, groups=2, padding=2, pool=pool)


@pytest.mark.parametrize(
    "pool",
    [
        ("max", (2, 1)),
        ("avg", (1, 4)),
        ("avg", 4),
        ("max", 1),
        ("avg", 2, 3),
        ("max", 3, 4),
        ("avg", (5, 3), 1),
        ("max", 8),
    ],
    ids=str,
)
def test_windows(pool):
    interpreted(check_windows, pool)


def check_phases(stride, dilation):
    compare(make(1, 2, 5, seed=3), make(2, 3, 4, seed=4), stride=stride, dilation=dilation, transposed=True, padding=1)
    compare(make(1, 3, 40, seed=5), make(2, 3, 4, seed=6), stride=stride, dilation=dilation, padding=2)


@pytest.mark.parametrize(("stride", "dilation"), [(4, 6), (6, 4), (3, 3), (2, 5), (5, 2), (7, 1)])
def test_phases(stride, dilation):
    """Common divisors of stride and dilation, phases that no tap meets, phases past the end."""
    interpreted(check_phases, stride, dilation)


def check_empty_and_nan():
    x = torch.zeros(0, 3, 5, 5, requires_grad=True)
    w = make(4, 3, 3, 3).requires_grad_()
    out = bmk.conv(x, w, torch.zeros(4), activation="gelu", pool=("max", 2), backend="triton")
    out.sum().backward()
    assert out.shape == (0, 4, 1, 1)
    assert torch.equal(w.grad, torch.zeros_like(w))

    x = make(1, 2, 6, 6)
    x[0, 0, 1, 1], x[0, 1, 4, 4] = float("nan"), float("inf")
    for activation in (None, "relu", "leaky_relu", "tanh"):
        for pool in (None, ("max", 2), ("max", 3, 1), ("avg", 2)):
            w = make(2, 2, 1, 1, seed=1)
            ours, theirs = (
                bmk.conv(x, w, activation=activation, pool=pool, backend=backend) for backend in ("triton", "torch")
            )
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_empty_batch_and_what_is_not_finite():
    interpreted(check_empty_and_nan)


def check_deterministic():
    p = Problem("winograd_odd", "relu_max", torch.float16, seed=1)
    first, second = (p.run(torch.float16, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second) if a is not None)


def test_every_run_gives_the_same_bits():
    interpreted(check_deterministic)


def check_opcheck():
    for options in (
        {},
        {"activation": "silu", "pool": ("max", 2)},
        {"transposed": True, "stride": 2, "activation": "relu"},
    ):
        x, w = make(1, 4, 6, 6), make(4, 4, 3, 3, seed=1)
        for image in (x, x.contiguous(memory_format=torch.channels_last), x.mT):
            args = bmk.conv.prepare(image.detach().requires_grad_(), w, make(4), **options)
            with torch.no_grad():
                torch.library.opcheck(
                    torch.ops.bigmodel_kernels.conv_fwd.default,
                    (*args, "triton"),
                    test_utils=("test_schema", "test_faketensor"),
                )
                saved = bmk.conv.op.fwd(*args, "triton")
                inputs = (torch.ones_like(saved[0]), *saved, [1, 1, 1, 0, 0, 0], *args, "triton")
                torch.library.opcheck(
                    torch.ops.bigmodel_kernels.conv_bwd.default, inputs, test_utils=("test_schema", "test_faketensor")
                )


def test_opcheck():
    interpreted(check_opcheck)


def check_refusals():
    from bigmodel_kernels import _registry

    def why(x, w, **options):
        return _registry.reason("conv", "triton", bmk.conv.prepare(x, w, **options))

    x, w = torch.zeros(1, 2, 40, 40), torch.zeros(2, 2, 1, 1)
    assert why(x, w) is None
    assert "bfloat16" in why(x.bfloat16(), w.bfloat16())
    assert "float64" in why(x.double(), w.double())
    assert "window" in why(x, w, pool=("max", 16))
    assert "pixels" in why(torch.zeros(1).expand(2**15, 1, 2**8, 2**8), torch.zeros(1, 1, 1, 1))
    with pytest.raises(RuntimeError, match="window of 256"):
        bmk.conv(x, w, pool=("max", 16), backend="triton")


def test_refusals():
    interpreted(check_refusals)


FAR = """
import torch
import bigmodel_kernels as bmk
far = 2**31 + 64
def sparse(*shape, strides):
    # as_strided over memory that is never touched between the images
    last = sum((n - 1) * s for n, s in zip(shape, strides))
    return torch.empty(last + 1, dtype=torch.float16).as_strided(shape, strides)
for strides in ((far, 25, 5, 1), (15, far, 5, 1), (far, 1, 15, 3), (30, 1, far, 3)):
    groups = 3 if strides[0] == 15 else 1
    x = sparse(2, 3, 3, 3, strides=strides)
    x.copy_(torch.randn(2, 3, 3, 3))
    w = torch.randn(3, 3 // groups, 2, 2).half().requires_grad_()
    near = x.contiguous().requires_grad_()
    ours = bmk.conv(x.requires_grad_(), w, padding=1, groups=groups, activation="relu", backend="triton")
    theirs = bmk.conv(near, w, padding=1, groups=groups, activation="relu", backend="torch")
    g = torch.randn(theirs.shape).half()
    for a, b in zip((ours, *torch.autograd.grad(ours, (x, w), g)), (theirs, *torch.autograd.grad(theirs, (near, w), g))):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
"""


def test_offsets_beyond_32_bits():
    """In a process of its own: the interpreter reads where a wrapped offset points to."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", FAR], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
