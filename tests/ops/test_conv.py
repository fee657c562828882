"""bmk.conv on the cpu backend against float64: result and every gradient, over geometries, tails, dtypes and layouts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.ops.conv import op, reference
from bigmodel_kernels.testing import assert_matches, make
from tests.ops.conv_problem import DEPTHWISE, GEOMETRIES, MORE_TAILS, NAMES, TAILS, Problem

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_matches_float64(geometry, tail, dtype):
    Problem(geometry, tail, dtype, seed=len(geometry) % 3).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tail", MORE_TAILS)
@pytest.mark.parametrize(
    "geometry", ["wide1d", "textbook", "winograd_odd", "stem", "groups", "tall", "broad", "t2d_k4s2"]
)
def test_padded_pools_and_slopes(geometry, tail, dtype):
    Problem(geometry, tail, dtype, seed=3).check()


@pytest.mark.parametrize("tail", ["bias", "relu_max", "norm_residual_relu", "silu_avg", "gate"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_matches_float64_in_bfloat16(geometry, tail):
    Problem(geometry, tail, torch.bfloat16, seed=len(geometry) % 3).check()


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    "geometry", ["textbook", "winograd_odd", "p3x3", "stem", "strides", "t2d_k4s2", "wide1d", "groups16"]
)
def test_seeds(geometry, seed):
    Problem(geometry, "relu_max", seed=seed).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tail", ["bias", "relu_max", "norm_residual_relu"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_integers_are_exact(geometry, tail, dtype):
    """(c): products and sums of small integers are equal to the bit, by Winograd too."""
    p = Problem(geometry, tail, dtype, seed=4, integer=True)
    for name, ours, exact in zip(("out", *NAMES), p.run(dtype, "cpu"), p.run(torch.float64, "torch")):
        if ours is not None:
            assert torch.equal(ours, exact.to(dtype)), name


def _layouts():
    def padded(t):  # every second element along the last axis
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype)
        wide[..., ::2] = t
        return wide[..., ::2]

    def offset(t):  # one element past an aligned address
        return torch.cat([t.new_full((1,), float("nan")), t.flatten()])[1:].view(t.shape)

    return {
        "innermost": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 2 else t,
        "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t,
        "sliced": padded,
        "offset": offset,
        "batch_last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
        "sliced_innermost": lambda t: (
            torch.cat([t, t], 1).movedim(1, -1).contiguous().movedim(-1, 1)[:, : t.shape[1]] if t.dim() > 2 else t
        ),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", _layouts())
@pytest.mark.parametrize("geometry", ["p3x3", "winograd_odd", "stem", "wide1d", "groups", "t2d_k4s2", "k1x1"])
def test_layouts(geometry, layout, dtype):
    Problem(geometry, "norm_residual_relu", dtype, seed=5).check(_layouts()[layout])
    Problem(geometry, "relu_max", dtype, seed=6).check(_layouts()[layout])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("geometry", DEPTHWISE)
def test_depthwise(geometry, dtype):
    """Channels innermost, read and written where they lie, and as they are."""
    for seed, tail in enumerate(("bias", "norm_relu", "all_gelu_max")):
        for layout in ("innermost", "sliced_innermost"):
            Problem(f"depthwise_{geometry}", tail, dtype, seed=seed).check(_layouts()[layout])
    Problem(f"depthwise_{geometry}", "norm_relu", dtype, seed=3).check()


@pytest.mark.parametrize("geometry", DEPTHWISE)
def test_depthwise_integers_are_exact(geometry):
    Problem(f"depthwise_{geometry}", "norm_relu", seed=4, integer=True).check_exact()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("column", [0, 4, 12])
def test_depthwise_keeps_infinities_where_they_reach(column, value):
    x, w = make(1, 20, 7, 13), make(20, 1, 3, 3, seed=1)
    x[0, 3, 2, column] = value
    x = x.contiguous(memory_format=torch.channels_last)
    grad = make(1, 20, 7, 13, seed=2)
    finite = []
    for backend in ("cpu", "torch"):
        leaves = [x.detach().requires_grad_(), w.detach().requires_grad_()]
        out = bmk.conv(*leaves, padding=1, groups=20, backend=backend)
        finite.append([t.isfinite() for t in (out, *torch.autograd.grad(out, leaves, grad))])
    for ours, stock in zip(*finite):
        assert torch.equal(ours, stock)


PAIRS = {  # channels in pairs: even and odd ones, read where they lie, copied, transposed; one product and many taps; two panels
    "pointwise": ((2, 34, 9, 11), (70, 34, 1, 1), {}),
    "pointwise_odd": ((2, 33, 9, 11), (70, 33, 1, 1), {}),
    "three": ((1, 3, 30, 33), (20, 3, 5, 5), {"stride": 2, "padding": 2}),
    "many_taps": ((2, 37, 15, 16), (33, 37, 3, 3), {"padding": 1}),
    "deep": ((1, 700, 6, 6), (40, 700, 1, 1), {}),
    "groups": ((2, 30, 10, 12), (36, 5, 3, 3), {"padding": 1, "groups": 6}),
    "transposed": ((2, 21, 9, 8), (21, 34, 4, 4), {"transposed": True, "stride": 2, "padding": 1}),
    "one_axis": ((2, 19, 77), (50, 19, 3), {"padding": "causal", "dilation": 5}),
}


@pytest.mark.parametrize("layout", ["contiguous", "innermost", "sliced_innermost"])
@pytest.mark.parametrize("name", PAIRS)
def test_dot_products_of_bfloat16(name, layout):
    """Forward and gradients by the error rule; an infinity or a NaN reaches the outputs that read it and no other, though
    pairs put it beside numbers of its neighbours."""
    x_shape, w_shape, options = PAIRS[name]
    lay = _layouts().get(layout, lambda t: t)
    leaves = [make(*x_shape, seed=1), make(*w_shape, seed=2) / w_shape[1], make(w_shape[0], seed=3)]
    if options.get("transposed"):
        leaves[2] = make(w_shape[1], seed=3)
    leaves = [t.bfloat16() for t in leaves]
    with torch.no_grad():
        shape = bmk.conv(*leaves, **options, activation="silu", backend="torch").shape
    grad = make(*shape, seed=4).bfloat16()

    def run(dtype, backend):
        own = [lay(t.to(dtype)).requires_grad_() for t in leaves]
        out = bmk.conv(*own, **options, activation="silu", backend=backend)
        return out, *torch.autograd.grad(out, own, lay(grad.to(dtype)))

    calls = run(torch.bfloat16, "cpu"), run(torch.float64, "torch"), run(torch.bfloat16, "torch")
    for i, (ours, exact, theirs) in enumerate(zip(*calls)):
        assert_matches(ours, exact, theirs, dtype=torch.bfloat16, gradient=i > 0, name=("out", *NAMES)[i])
    for value in (float("nan"), float("inf")):
        x = leaves[0].clone()
        x.view(*x_shape[:2], -1)[0, -1, 7] = value
        found, exact = (
            bmk.conv(lay(x.to(t)), leaves[1].to(t), **options, backend=backend).isfinite()
            for t, backend in ((torch.bfloat16, "cpu"), (torch.float64, "torch"))
        )
        assert torch.equal(found, exact)


@pytest.mark.parametrize("layout", ["contiguous", "expanded"])
def test_expanded_input_and_gradient(layout):
    x = make(3, 4, 9, 9, layout=layout)
    w = make(5, 4, 3, 3, seed=1) * 0.2
    for t in (x, w):
        t.requires_grad_()
    out = bmk.conv(x, w, padding=1, activation="relu", backend="cpu")
    ours = torch.autograd.grad(out.sum(), (x, w))  # the gradient of sum() has stride 0
    d = [t.detach().double().requires_grad_() for t in (x, w)]
    exact = torch.autograd.grad(torch.nn.functional.conv2d(*d, padding=1).relu().sum(), d)
    for a, e in zip(ours, exact):
        assert_matches(a, e, None, dtype=torch.float32, gradient=True)


@pytest.mark.parametrize("channels_last_x", [False, True])
@pytest.mark.parametrize("channels_last_weight", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 6, 6), (2, 1, 6, 6), (2, 4, 5, 1), (1, 2, 1, 1), (0, 3, 6, 6)])
def test_memory_format_is_torchs(shape, channels_last_x, channels_last_weight):
    def formatted(t, last):
        return t.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    x = formatted(make(*shape), channels_last_x)
    w = formatted(make(4, shape[1], 3, 3), channels_last_weight)
    ours = bmk.conv(x, w, padding=1, backend="cpu")
    assert ours.stride() == torch.nn.functional.conv2d(x, w, padding=1).stride()


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("tail", ["bias", "relu_max", "silu_avg", "gate_max"])
@pytest.mark.parametrize("geometry", ["k3", "p3x3", "t2d"])
def test_empty_batch(geometry, tail, backend):
    p = Problem(geometry, tail)
    p.tensors = {k: t[:0] if k in ("x", "residual") and t is not None else t for k, t in p.tensors.items()}
    p.grad = p.grad[:0]
    out, *grads = p.run(torch.float32, backend)
    assert out.shape == p.grad.shape
    assert all(not g.any() for g in grads if g is not None)


@pytest.mark.parametrize("tail", TAILS | MORE_TAILS)
@pytest.mark.parametrize("geometry", ["causal", "winograd_odd", "strides", "t2d_uneven", "t2d_groups"])
def test_reference_backward_is_autograds(geometry, tail):
    p = Problem(geometry, tail, torch.float64)
    t = {k: None if v is None else v.requires_grad_() for k, v in p.tensors.items()}
    args = op.prepare(**t, **p.options)
    outs = reference.forward(*args)
    torch.testing.assert_close(outs[0], p.run(torch.float64, "torch")[0], rtol=1e-11, atol=1e-11)
    leaves = [v for v in args[:6] if v is not None]
    exact = iter(torch.autograd.grad(outs[0], leaves, p.grad))
    needs = [int(v is not None) for v in args[:6]]
    with torch.no_grad():
        found = reference.backward(p.grad, *outs, needs, *args)
    for f, v in zip(found, args[:6]):
        if v is not None:
            torch.testing.assert_close(f, next(exact), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("tail", TAILS | MORE_TAILS)
@pytest.mark.parametrize("geometry", ["causal", "winograd_odd", "strides", "t2d_groups", "groups"])
def test_torch_pair(geometry, tail):
    """The forward and backward that a compiled graph runs where torch is chosen, against the cpu kernel's."""
    p = Problem(geometry, tail, torch.float64)
    t = {k: None if v is None else v.requires_grad_() for k, v in p.tensors.items()}
    args = op.prepare(**t, **p.options)
    needs = [int(v is not None) for v in args[:6]]
    with torch.no_grad():
        results = {b: op.OP.fwd(*args, b) for b in ("cpu", "torch")}
        for ours, theirs in zip(results["cpu"], results["torch"]):
            assert ours.stride() == theirs.stride()
        torch.testing.assert_close(results["cpu"][0], results["torch"][0])
        torch.testing.assert_close(results["cpu"][1], results["torch"][1])  # the same element of each window
        for saved_by in results:  # either backward takes what either forward saved
            grads = {b: op.OP.bwd(p.grad, *results[saved_by], needs, *args, b) for b in ("cpu", "torch")}
            for ours, theirs in zip(grads["cpu"], grads["torch"]):
                assert ours.stride() == theirs.stride()
                torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "tail", ["bias", "all_gelu_max", "silu_avg", "gate", "tanh_max", "gelu_padded", "leaky_padded"]
)
@pytest.mark.parametrize("geometry", ["k4s2", "k2x5", "t1d_s3", "groups"])
def test_gradcheck(geometry, tail):
    p = Problem(geometry, tail, torch.float64)
    leaves = {k: v.requires_grad_() for k, v in p.tensors.items() if v is not None}

    def call(*values):
        return bmk.conv(**dict(zip(leaves, values)), **p.options, backend="cpu")

    assert torch.autograd.gradcheck(call, tuple(leaves.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, tuple(leaves.values()), fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("needed", NAMES)
def test_one_gradient_alone(needed):
    p = Problem("k2x5", "all_gelu_max", torch.float64)
    every = dict(zip(NAMES, p.run(torch.float64, "cpu")[1:]))
    t = {k: v.detach().requires_grad_(k == needed) for k, v in p.tensors.items()}
    out = bmk.conv(**t, **p.options, backend="cpu")
    (found,) = torch.autograd.grad(out, t[needed], p.grad)
    torch.testing.assert_close(found, every[needed], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("tail", ["bias", "relu_max", "gate_max", "silu_avg", "norm_relu_padded"])
def test_opcheck(tail, contiguous, backend):
    p = Problem("t2d" if tail == "bias" else "k2x5", tail)
    layout = _layouts()["transposed"]
    t = {k: v if contiguous or v is None else layout(v) for k, v in p.tensors.items()}
    args = op.prepare(**{k: None if v is None else v.requires_grad_() for k, v in t.items()}, **p.options)
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
    torch.library.opcheck(torch.ops.bigmodel_kernels.conv_fwd.default, (*args, backend))
    outs = op.OP.fwd(*args, backend)
    torch.library.opcheck(
        torch.ops.bigmodel_kernels.conv_bwd.default,
        (p.grad, *outs, [int(a is not None) for a in args[:6]], *args, backend),
    )


@pytest.mark.parametrize("backend", ["auto", "cpu", "torch"])
def test_compile_in_training_with_dynamic_shapes(backend):
    def call(x, w, b):
        return bmk.conv(x, w, b, padding=1, activation="silu", pool=("max", 2), backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    w, b = make(6, 3, 3, 3, requires_grad=True), make(6, requires_grad=True)
    for shape in ((2, 3, 8, 9), (5, 3, 12, 7), (1, 3, 31, 20)):
        x = make(*shape, seed=sum(shape), requires_grad=True)
        found, expected = compiled(x, w, b), call(x, w, b)
        torch.testing.assert_close(found, expected)
        for f, e in zip(*(torch.autograd.grad(y.square().sum(), (x, w, b)) for y in (found, expected))):
            torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pool", [None, ("max", 2), ("max", 3, 1)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("channels", [1, 16, 32])
def test_nan_goes_through_relu_and_max_pool_as_in_torch(channels, pool, value):
    x = make(2, channels, 12, 13)
    x[0, 0, 3, 4] = x[1, 0, 11, 12] = value
    w = make(40, channels, 3, 3, seed=1)
    found = bmk.conv(x, w, padding=1, activation="relu", pool=pool, backend="cpu")
    expected = bmk.conv(x, w, padding=1, activation="relu", pool=pool, backend="torch")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4, equal_nan=True)


THREADED = ["textbook", "stem", "long1d", "t2d_k4s2", "groups16"]
THREADED += ["chosen_first", "chosen_first_wide", "chosen_textbook", "chosen_bands"]


@pytest.mark.parametrize("geometry", THREADED)
def test_the_number_of_threads_does_not_change_a_bit(geometry):
    p = Problem(geometry, "relu_max")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(p.run(torch.float32, "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_other_instruction_sets(isa):
    code = """
import torch
from tests.ops.conv_problem import FILTERED_BY_NAME, GEOMETRIES, PHASES_BY_NAME, TILED_BY_NAME, Problem
for i, geometry in enumerate([*GEOMETRIES, *PHASES_BY_NAME, *TILED_BY_NAME, *FILTERED_BY_NAME]):
    tail = ("relu_max", "norm_residual_relu", "all_gelu_max", "silu_avg", "gate_max")[i % 5]
    Problem(geometry, tail, (torch.float32, torch.bfloat16, torch.float64)[i % 3]).check()
    p = Problem(geometry, "relu_max", integer=True)
    torch.set_num_threads(2)
    found = p.run(torch.float32, "cpu")
    torch.set_num_threads(1)
    for ours, exact in zip(found, p.run(torch.float64, "torch")):
        assert ours is None or torch.equal(ours, exact.float()), geometry
import bigmodel_kernels
print(bigmodel_kernels.build_info().get("isa"))
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "BIGMODEL_ISA": isa},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() in (isa, "None")


def test_offsets_past_two_to_the_31():
    storage = torch.empty(2**31 + 4096, dtype=torch.bfloat16)  # only the pages that are written are ever backed
    x = storage.as_strided((2, 3, 8, 8), (2**31, 64, 8, 1))
    x.copy_(make(2, 3, 8, 8, dtype=torch.bfloat16))
    w = make(4, 3, 3, 3, dtype=torch.bfloat16)
    assert torch.equal(bmk.conv(x, w, backend="cpu"), bmk.conv(x.contiguous(), w, backend="cpu"))


def test_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = bmk.conv(make(1, 2, 8, 8), make(3, 2, 3, 3), make(3), activation="relu", backend="cpu")
    assert out.dtype == torch.bfloat16


X, W = make(2, 4, 8, 8), make(6, 4, 3, 3)
ERRORS = {
    "negative_slope": (ValueError, "slope that is not negative", X, W, {"activation": ("leaky_relu", -0.1)}),
    "slope_of_another": (ValueError, "activation must be None or one of", X, W, {"activation": ("relu", 0.1)}),
    "pool_padding_of_average": (RuntimeError, "pool padding is for a max-pool", X, W, {"pool": ("avg", 2, 2, 1)}),
    "pool_padding_too_large": (RuntimeError, "at most half", X, W, {"pool": ("max", 3, 2, 2)}),
    "x_not_tensor": (TypeError, "x must be a tensor", [[1.0]], W, {}),
    "weight_not_tensor": (TypeError, "weight must be a tensor", X, None, {}),
    "bias_not_tensor": (TypeError, "bias must be a tensor", X, W, {"bias": 1.0}),
    "residual_not_tensor": (TypeError, "residual must be a tensor", X, W, {"residual": "x"}),
    "weight_rank": (RuntimeError, "weight must have 3 or 4 dimensions", X, W[0, 0], {}),
    "x_rank": (RuntimeError, "x must have 4 dimensions", X[0, 0], W, {}),
    "channels": (RuntimeError, "x must have 4 channels", X[:, :3], W, {}),
    "group_channels": (RuntimeError, "x must have 8 channels", X, W, {"groups": 2}),
    "group_multiple": (RuntimeError, "weight must have a multiple of groups=4", X, W[:, :1], {"groups": 4}),
    "groups_zero": (RuntimeError, "groups must be positive", X, W, {"groups": 0}),
    "groups_type": (TypeError, "groups must be an int", X, W, {"groups": 1.5}),
    "weight_dtype": (RuntimeError, "weight must be torch.float32", X, W.double(), {}),
    "bias_dtype": (RuntimeError, "bias must be torch.float32", X, W, {"bias": make(6).bfloat16()}),
    "device": (RuntimeError, "weight must be torch.float32 on cpu", X, W.to("meta"), {}),
    "negative_padding": (RuntimeError, "padding must be non-negative", X, W, {"padding": -1}),
    "padding_name": (ValueError, "padding must be .*'full'", X, W, {"padding": "full"}),
    "padding_length": (RuntimeError, "padding must have 2 entries", X, W, {"padding": (1, 1, 1)}),
    "padding_type": (TypeError, "padding must be an int", X, W, {"padding": 1.5}),
    "same_with_stride": (RuntimeError, "padding='same' needs stride 1", X, W, {"padding": "same", "stride": 2}),
    "causal_2d": (ValueError, "padding='causal' needs one spatial axis", X, W, {"padding": "causal"}),
    "same_transposed": (ValueError, "padding='same' is not for", X, make(4, 6, 3, 3), {"padding": "same", "transposed": True}),
    "stride_zero": (RuntimeError, "stride must be positive", X, W, {"stride": 0}),
    "stride_length": (RuntimeError, "stride must have 2 entries", X, W, {"stride": (1, 1, 1)}),
    "dilation_zero": (RuntimeError, "dilation must be positive", X, W, {"dilation": (1, 0)}),
    "too_small": (RuntimeError, "x of size .* gives an empty output", X, W, {"dilation": 9}),
    "output_padding": (ValueError, "output_padding is for transposed", X, W, {"output_padding": 1}),
    "large_output_padding": (
        RuntimeError, "output_padding must be smaller", X, make(4, 6, 3, 3),
        {"output_padding": 2, "transposed": True, "stride": 2},
    ),
    "bias_shape": (RuntimeError, "bias must have shape", X, W, {"bias": make(4)}),
    "scale_shape": (RuntimeError, "scale must have shape", X, W, {"scale": make(6, 1)}),
    "shift_shape": (RuntimeError, "shift must have shape", X, W, {"shift": make(1)}),
    "residual_shape": (RuntimeError, "residual must have shape", X, W, {"residual": make(2, 6, 6, 5)}),
    "activation": (ValueError, "activation must be None or one of", X, W, {"activation": "swish"}),
    "gate_channels": (ValueError, "'tanh_sigmoid' needs an even", X, W[:5], {"activation": "tanh_sigmoid"}),
    "pool_type": (TypeError, "pool must be None", X, W, {"pool": 2}),
    "pool_name": (ValueError, "pool must be one of max, avg", X, W, {"pool": ("min", 2)}),
    "pool_size": (RuntimeError, "pool size must be positive", X, W, {"pool": ("max", 0)}),
    "pool_stride": (RuntimeError, "pool stride must be positive", X, W, {"pool": ("max", 2, 0)}),
    "pool_fits": (RuntimeError, "pool must fit the output", X, W, {"pool": ("avg", 7)}),
    "backend": (ValueError, "backend must be one of", X, W, {"backend": "fast"}),
    "absent_backend": (NotImplementedError, "backend 'cuda' cannot run this call", X, W, {"backend": "cuda"}),
    "empty_kernel": (RuntimeError, "weight must have a kernel that is not empty", X, W[..., :0], {}),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    kind, message, x, weight, options = ERRORS[case]
    with pytest.raises(kind, match=message) as info:
        bmk.conv(x, weight, **options)
    assert info.type is kind
