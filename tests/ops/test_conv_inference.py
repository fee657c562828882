"""bmk.conv on the cpu backend without gradients, where kernels of their own run: few input channels with lanes along the
width, products whose weights are read in place, pools whose windows overlap, weights in either memory format."""

import pytest
import torch
import torch.nn.functional as F

import bigmodel_kernels as bmk
from bigmodel_kernels.testing import assert_matches, make
from tests.rerun import rerun

# x, weight, options. Widths below, at and above a vector of 16, 8 and 4 lanes; the last is what the kernel refuses.
FEW_CHANNELS = {
    "textbook": ((3, 1, 28, 28), (32, 1, 3, 3), {"padding": 1, "pool": ("max", 2)}),
    "odd": ((2, 1, 33, 33), (5, 1, 3, 3), {"padding": 1, "pool": ("max", 2)}),
    "no_padding": ((2, 1, 19, 34), (7, 1, 3, 3), {"pool": ("max", 2)}),
    "rgb": ((2, 3, 26, 32), (10, 3, 3, 3), {"padding": 1, "pool": ("max", 2)}),
    "dilated": ((1, 2, 21, 36), (6, 2, 3, 3), {"padding": 2, "dilation": 2, "pool": ("max", 2)}),
    "five": ((2, 1, 30, 30), (6, 1, 5, 5), {"padding": 2, "pool": ("max", 2)}),
    "tall_kernel": ((1, 2, 20, 33), (9, 2, 4, 2), {"pool": ("max", 2)}),
    "plain": ((2, 3, 17, 48), (13, 3, 3, 3), {"padding": 1}),
    "rows": ((1, 1, 5, 16), (4, 1, 3, 3), {"padding": 1}),
    "one_row": ((2, 2, 1, 15), (3, 2, 1, 3), {"padding": (0, 1)}),
    "stride": ((2, 3, 31, 63), (8, 3, 4, 4), {"stride": 2, "padding": 1}),
    "uneven_stride": ((1, 2, 40, 32), (8, 2, 3, 3), {"stride": (3, 1), "padding": 1, "pool": ("max", 2)}),
    "far_pad": ((1, 1, 12, 10), (3, 1, 2, 2), {"padding": 4}),
    "many_rows": ((1, 3, 150, 32), (4, 3, 3, 3), {"padding": 1, "pool": ("max", 2)}),
    "stride_and_pool": ((1, 1, 64, 64), (4, 1, 3, 3), {"stride": 2, "pool": ("max", 2)}),
}
# Several bands, whose shared rows are computed once; windows that reach over the rim, and past the last row.
OVERLAPS = {
    "stem": ((1, 3, 120, 100), (20, 3, 7, 7), {"stride": 2, "padding": 3, "pool": ("max", 3, 2, 1)}),
    "tall": ((2, 16, 300, 9), (17, 16, 3, 3), {"padding": 1, "pool": ("max", 3, 1, 1)}),
    "deep_window": ((1, 8, 200, 40), (32, 8, 3, 3), {"pool": ("max", (7, 2), (2, 2))}),
    "padded_past_the_end": ((1, 8, 161, 40), (32, 8, 3, 3), {"pool": ("max", 4, 3, 2)}),
    "average": ((1, 8, 160, 40), (32, 8, 3, 3), {"pool": ("avg", 3, 2)}),
    "winograd": ((1, 32, 90, 30), (33, 32, 3, 3), {"padding": 1, "pool": ("max", 3, 2, 1)}),
    "wide": ((1, 4, 60, 300), (16, 4, 3, 3), {"padding": 1, "pool": ("max", 3, 2, 1)}),
    "sequence": ((2, 8, 700), (16, 8, 3), {"padding": 1, "pool": ("max", 3, 2)}),
}
PRODUCTS = {
    "linear": ((64, 300, 1), (130, 300, 1), {}),
    "few_rows": ((16, 77, 1), (45, 77, 1), {}),
    "fewer_rows": ((3, 50, 1), (40, 50, 1), {}),
    "long": ((20, 1000, 1), (41, 1000, 1), {}),
    "many_pixels": ((2, 70, 13, 40), (33, 70, 1, 1), {}),
    "one_image": ((1, 64, 7, 7), (200, 64, 1, 1), {}),
}
CALLS = FEW_CHANNELS | OVERLAPS | PRODUCTS


def arguments(name, dtype, *, integer=False):
    x_shape, weight_shape, options = CALLS[name]
    x = make(*x_shape, seed=1, dtype=torch.float64, integer=integer)
    weight = make(*weight_shape, seed=2, dtype=torch.float64, integer=integer)
    bias = make(weight_shape[0], seed=3, dtype=torch.float64, integer=integer)
    if not integer:
        weight = weight * weight[0].numel() ** -0.5
    return [t.to(dtype) for t in (x, weight, bias)], options


def last(t):
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.mark.parametrize("norm", [False, True], ids=["bias", "norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_matches_float64(name, dtype, norm):
    tensors, options = arguments(name, dtype)
    extra = [make(tensors[2].numel(), seed=s).to(dtype) for s in (4, 5)] if norm else []

    def run(backend, as_dtype):
        x, weight, bias, *rest = (t.to(as_dtype) for t in (*tensors, *extra))
        named = dict(zip(("scale", "shift"), rest))
        return bmk.conv(x, weight, bias, activation="relu", backend=backend, **named, **options)

    exact, baseline = run("torch", torch.float64), run("torch", dtype)
    assert_matches(run("cpu", dtype), exact, baseline, dtype=dtype)


@pytest.mark.parametrize("activation", ["leaky_relu", ("leaky_relu", 0.3), "tanh", "sigmoid"], ids=str)
@pytest.mark.parametrize("name", FEW_CHANNELS)
def test_activations_of_few_channels(name, activation):
    for dtype in (torch.float32, torch.bfloat16):
        tensors, options = arguments(name, dtype)
        calls = ("cpu", dtype), ("torch", torch.float64), ("torch", dtype)
        ours, exact, baseline = (
            bmk.conv(*(t.to(d) for t in tensors), activation=activation, backend=b, **options) for b, d in calls
        )
        assert_matches(ours, exact, baseline, dtype=dtype)


@pytest.mark.parametrize("name", CALLS)
def test_integers_are_exact_in_every_layout(name):
    (x, weight, bias), options = arguments(name, torch.float32, integer=True)
    for activation in (None, "relu"):
        exact = bmk.conv(
            x.double(), weight.double(), bias.double(), activation=activation, backend="torch", **options
        ).float()
        for a in (x, last(x)):
            for w in (weight, last(weight)):
                found = bmk.conv(a, w, bias, activation=activation, backend="cpu", **options)
                assert torch.equal(found, exact), (a.stride(), w.stride())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["textbook", "rgb", "plain", "stem", "tall"])
def test_what_is_not_finite_goes_where_it_does_in_torch(name, value):
    (x, weight, bias), options = arguments(name, torch.float32)
    x[0, 0, 2, 3] = x[-1, 0, -1, -1] = value
    for kind in ("relu", "leaky_relu", "tanh"):
        found, expected = (bmk.conv(x, weight, bias, activation=kind, backend=b, **options) for b in ("cpu", "torch"))
        assert torch.equal(found.isnan(), expected.isnan())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("name", ["textbook", "stem", "linear", "many_pixels"])
def test_the_number_of_threads_does_not_change_a_bit(name):
    (x, weight, bias), options = arguments(name, torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(bmk.conv(x, weight, bias, activation="relu", backend="cpu", **options))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


def test_linear_layer_is_torchs():
    x, weight, bias = make(64, 300), make(130, 300, seed=1), make(130, seed=2)
    found = bmk.conv(x[..., None], weight[..., None], bias, activation="relu", backend="cpu")[..., 0]
    torch.testing.assert_close(found, F.linear(x, weight, bias).relu(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_other_instruction_sets(isa):
    selected = "test_integers_are_exact or (test_matches_float64 and float32 and bias) or not_finite or threads"
    rerun(__file__, selected, isa)


# Up to 256 outputs and at least 65536 weights: the pixels' windows in rows. Tails of its tiles, strips and blocks; both orders.
FEW_PIXELS = {
    "last_stage": ((1, 64, 7, 7), (130, 64, 3, 3), {"padding": 1}),
    "strided": ((3, 40, 13, 15), (192, 40, 3, 3), {"stride": 2, "padding": 1}),
    "dilated": ((2, 33, 9, 12), (257, 33, 3, 3), {"padding": 2, "dilation": (2, 1)}),
    "pooled": ((2, 64, 12, 10), (128, 64, 3, 3), {"padding": 1, "pool": ("max", 3, 2, 1)}),
    "pointwise": ((2, 256, 14, 14), (260, 256, 1, 1), {"stride": 2}),
    "one_axis": ((3, 65, 50), (512, 65, 4), {"stride": 3, "padding": 2}),
    "one_pixel": ((1, 300, 3, 3), (70, 300, 3, 3), {}),
    "a_rest_of_five": ((1, 64, 3, 7), (131, 64, 3, 3), {"padding": 1}),
    "strips_and_a_rest_of_six": ((1, 64, 7, 10), (193, 64, 3, 3), {"padding": 1}),
    "two_strips_and_a_rest": ((2, 64, 6, 7), (200, 64, 3, 3), {"padding": 1}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", FEW_PIXELS)
def test_few_pixels(name, last, dtype):
    x_shape, w_shape, options = FEW_PIXELS[name]
    x, weight = make(*x_shape, dtype=torch.float64, seed=1), make(*w_shape, dtype=torch.float64, seed=2) / 30
    tail = [make(w_shape[0], dtype=torch.float64, seed=3 + i) for i in range(3)]
    if last and x.dim() == 4:
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))

    def run(dtype, backend, activation="relu"):
        tensors = [t.to(dtype) for t in (x, weight, *tail)]
        scales = dict(zip(("bias", "scale", "shift"), tensors[2:]))
        return bmk.conv(*tensors[:2], **scales, **options, activation=activation, backend=backend)

    x, weight, *tail = (t.to(dtype).double() for t in (x, weight, *tail))
    for activation in ("relu", "silu"):
        exact, ours, theirs = (
            run(torch.float64, "torch", activation), run(dtype, "cpu", activation), run(dtype, "torch", activation)
        )  # fmt: skip
        assert_matches(ours, exact, theirs, dtype=dtype, name=activation)
    x, weight, *tail = (t.mul(20).round().clamp(-3, 3) for t in (x, weight, *tail))
    if dtype != torch.bfloat16:
        assert torch.equal(run(dtype, "cpu").double(), run(torch.float64, "torch"))


REPEATED = {
    "ours": ((2, 8, 9, 9), (8, 8, 3, 3), {"padding": 1, "activation": "relu"}),
    "ours, pooled": ((2, 1, 28, 28), (32, 1, 3, 3), {"padding": 1, "activation": "relu", "pool": ("max", 2)}),
    "PyTorch's": ((1, 64, 8, 8), (32, 64, 1, 1), {"activation": "relu"}),
    "PyTorch's, plain": ((1, 64, 8, 8), (32, 64, 1, 1), {}),
}


@pytest.mark.parametrize("name", REPEATED)
def test_a_call_that_was_made_before(name):
    """The second call of the same sizes goes by what the first found out: it must see new values, and refuse what is wrong."""
    x_shape, w_shape, options = REPEATED[name]
    x, weight, bias = make(*x_shape, seed=1), make(*w_shape, seed=2), make(w_shape[0], seed=3)

    def both(x, weight, bias):
        found = [bmk.conv(x, weight, bias, **options, backend=backend) for backend in ("auto", "torch")]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
        assert found[0].stride() == found[1].stride()
        return found[0]

    with torch.no_grad():
        first = both(x, weight, bias)
        assert torch.equal(first, both(x, weight, bias))
        weight.data.mul_(2)
        bias.data.add_(1)
        assert not torch.equal(first, both(x, weight, bias))
        both(x.contiguous(memory_format=torch.channels_last), weight, bias)
        both(x, weight, None)
        both(x[0], weight, bias)
        with torch.autocast("cpu", torch.bfloat16):
            assert bmk.conv(x, weight, bias, **options).dtype == torch.bfloat16
        for wrong in ((x.double(), weight, bias), (x, weight.double(), bias), (x, weight, bias.double())):
            with pytest.raises(RuntimeError, match="must be torch"):
                bmk.conv(*wrong, **options)
        with pytest.raises(RuntimeError, match="bias must have shape"):
            bmk.conv(x, weight, bias[1:], **options)
        with bmk.use_backend("triton"), pytest.raises(RuntimeError, match="triton"):
            bmk.conv(x, weight, bias, **options)
        assert len(bmk.explain(lambda: bmk.conv(x, weight, bias, **options)).calls) == 1
    for t in (x, weight, bias):
        t.requires_grad_()
    for _ in range(2):
        y = bmk.conv(x, weight, bias, **options)
        assert all(g is not None for g in torch.autograd.grad(y.sum(), (x, weight, bias)))
    jvp = torch.func.jvp(lambda x: bmk.conv(x, weight, bias, **options), (x.detach(),), (x.detach(),))
    assert jvp[1].shape == y.shape
