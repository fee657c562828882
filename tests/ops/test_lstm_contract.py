"""bmk.lstm and bmk.lstm_cell as operators: gradients of gradients, opcheck, compile, backends, errors; the cell's numbers."""

import itertools

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.ops.lstm_cell import reference as cell_reference
from bigmodel_kernels.testing import assert_matches, make

PACKED = torch.tensor([3, 2, 2, 1])


def arguments(num_layers=1, bidirectional=False, bias=True, proj=0, packed=False, dtype=torch.float64, grad=True):
    """x, h0, c0, weights and the options of a small call."""
    D, H, P = (2 if bidirectional else 1), 4, proj or 4
    x = make(*((8, 3) if packed else (4, 3, 3)), dtype=dtype, seed=1)
    h0, c0 = make(num_layers * D, 3, P, dtype=dtype, seed=2), make(num_layers * D, 3, H, dtype=dtype, seed=3)
    weights = []
    for layer in range(num_layers):
        for _ in range(D):
            shapes = [
                (16, 3 if layer == 0 else D * P),
                (16, P),
                *([(16,)] * 2 if bias else []),
                *([(P, H)] if proj else []),
            ]
            weights += [make(*shape, dtype=dtype, seed=10 + len(weights) + i) * 0.5 for i, shape in enumerate(shapes)]
    tensors = [t.requires_grad_(grad) for t in (x, h0, c0, *weights)]
    options = {"num_layers": num_layers, "bidirectional": bidirectional}
    if packed:
        options["batch_sizes"] = PACKED
    return tensors, options


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    yield
    torch.compiler.reset()


def flat(options, **more):
    def run(x, h0, c0, *weights):
        output, states = bmk.lstm(x, (h0, c0), weights, **options, **more)
        return output, *states

    return run


VARIANTS = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"bias": False, "packed": True},
    {"proj": 2, "bidirectional": True},
    {"num_layers": 2, "proj": 3, "packed": True, "bidirectional": True},
]


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gradcheck(variant, backend):
    tensors, options = arguments(**variant)
    assert torch.autograd.gradcheck(flat(options, backend=backend), tensors, fast_mode=backend == "torch")


@pytest.mark.parametrize("variant", VARIANTS[:4], ids=str)
def test_gradgradcheck(variant):
    tensors, options = arguments(**variant)
    assert torch.autograd.gradgradcheck(flat(options, backend="cpu"), tensors, fast_mode=True)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_opcheck(variant, layout):
    (x, h0, c0, *weights), options = arguments(**variant, dtype=torch.float32, grad=False)
    if layout == "transposed":
        x, h0, c0, *weights = (t.mT.contiguous().mT if t.dim() >= 2 else t for t in (x, h0, c0, *weights))
    sizes = options.pop("batch_sizes", None)
    args = (x, h0, c0, weights, sizes, None, *options.values(), 0.0, True)
    torch.library.opcheck(torch.ops.bigmodel_kernels.lstm_fwd.default, (*args, "cpu"))
    output, _, c_n, *saved = torch.ops.bigmodel_kernels.lstm_fwd(*args, "cpu")
    grads = (torch.ones_like(output), None, torch.ones_like(c_n))
    torch.library.opcheck(
        torch.ops.bigmodel_kernels.lstm_bwd.default, (*grads, output, *saved, True, True, *args, "cpu")
    )


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_cell_opcheck(layout):
    args = [make(3, 5), make(3, 4), make(3, 4), make(16, 5), make(16, 4), make(16), make(16)]
    if layout == "transposed":
        args = [t.mT.contiguous().mT if t.dim() == 2 else t for t in args]
    torch.library.opcheck(torch.ops.bigmodel_kernels.lstm_cell_fwd.default, (*args, True, "cpu"))
    h_new, c_new, *saved = torch.ops.bigmodel_kernels.lstm_cell_fwd(*args, True, "cpu")
    torch.library.opcheck(
        torch.ops.bigmodel_kernels.lstm_cell_bwd.default, (h_new, c_new, h_new, *saved, True, True, *args, True, "cpu")
    )


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("bias", [True, False])
def test_cell_gradcheck(bias, backend):
    shapes = [(2, 3), (2, 4), (2, 4), (16, 3), (16, 4), *([(16,)] * 2 if bias else [])]
    tensors = [make(*s, dtype=torch.float64, seed=i).requires_grad_() for i, s in enumerate(shapes)]

    def run(x, h, c, *weights):
        return bmk.lstm_cell(x, (h, c), *weights, backend=backend)

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


CELL_SIZES = [
    (1, 1, 1),
    (0, 3, 4),
    (1, 7, 16),
    (2, 5, 17),
    (3, 16, 15),
    (5, 33, 32),
    (7, 1, 33),
    (31, 28, 64),
    (65, 9, 70),
    (1, 64, 32),  # whole vectors: the backward reads the weights as they lie
    (7, 48, 80),
]


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", CELL_SIZES, ids=str)
def test_cell_matches_float64(size, dtype, bias, seed):
    B, inputs, H = size
    shapes = [(B, inputs), (B, H), (B, H), (4 * H, inputs), (4 * H, H), *([(4 * H,)] * 2 if bias else [])]
    drawn = [
        (make(*s, dtype=torch.float64, seed=9 * seed + i) * (0.3 if i > 2 else 1)).to(dtype)
        for i, s in enumerate(shapes)
    ]
    upstream = [make(B, H, dtype=torch.float64, seed=90 + i).to(dtype) for i in range(2)]

    def run(backend, wide):
        x, h, c, *weights = leaves = [t.to(wide).requires_grad_() for t in drawn]
        results = bmk.lstm_cell(x, (h, c), *weights, backend=backend)
        grads = torch.autograd.grad(results, leaves, [g.to(wide) for g in upstream])
        return [t.detach() for t in results], grads

    exact, ours, theirs = run("torch", torch.float64), run("cpu", dtype), run("torch", dtype)
    for gradient in (False, True):
        for truth, actual, baseline in zip(exact[gradient], ours[gradient], theirs[gradient]):
            few = truth.numel() < 16  # then torch's largest error is a draw of luck
            yardstick = None if few or dtype == torch.float64 else baseline
            magnitude = 0.1 * (few and gradient)  # of the terms, which may cancel
            assert_matches(actual, truth, yardstick, dtype=dtype, gradient=gradient, magnitude=magnitude)


def test_cell_reference_gradient_is_autograds():
    shapes = [(2, 3), (2, 4), (2, 4), (16, 3), (16, 4), (16,), (16,)]
    leaves = [make(*s, dtype=torch.float64, seed=i).requires_grad_() for i, s in enumerate(shapes)]
    upstream = [make(2, 4, dtype=torch.float64, seed=20 + i) for i in range(2)]
    h_new, c_new, *saved = cell_reference.forward(*leaves)
    expected = torch.autograd.grad([h_new, c_new], leaves, upstream)
    with torch.no_grad():
        *states, weights = cell_reference.backward(*upstream, h_new, *saved, *leaves)
    for actual, truth in zip((*states, *weights), expected):
        torch.testing.assert_close(actual, truth)


# What auto chooses is one of the others: it is asked of one variant.
@pytest.mark.parametrize(
    ("variant", "backend"), [*itertools.product(VARIANTS, ("cpu", "torch")), (VARIANTS[-1], "auto")], ids=str
)
def test_compiled_call(variant, backend):
    tensors, options = arguments(**variant, dtype=torch.float32)
    run = flat(options)
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    expected = run(*tensors)
    expected_grads = torch.autograd.grad([t.square().sum() for t in expected], tensors)
    with bmk.use_backend(backend):
        actual = compiled(*tensors)
        grads = torch.autograd.grad([t.square().sum() for t in actual], tensors)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(grads, expected_grads)


def test_compiled_dropout_is_replayed_in_the_backward():
    tensors, options = arguments(num_layers=3, dtype=torch.float64)
    run = flat(options, dropout=0.5, training=True)
    found = []
    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(4)
        results = call(*tensors)
        found.append([*results, *torch.autograd.grad([t.square().sum() for t in results], tensors)])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("frozen", ["weights", "x", "all"])
def test_gradients_that_are_not_wanted(frozen):
    tensors, options = arguments(dtype=torch.float32)
    reference = torch.autograd.grad(flat(options, backend="cpu")(*tensors)[0].sum(), tensors)
    wanted = [not (frozen == "all" or (frozen == "x") == (i == 0)) for i in range(len(tensors))]
    leaves = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted)]
    output = flat(options, backend="cpu")(*leaves)[0]
    assert output.requires_grad == any(wanted)
    if any(wanted):
        output.sum().backward()
    for leaf, want, expected in zip(leaves, wanted, reference):
        assert torch.equal(leaf.grad, expected) if want else leaf.grad is None


def test_explain_and_backends():
    (x, h0, c0, *weights), options = arguments(dtype=torch.float32, grad=False)
    assert bmk.explain(bmk.lstm, x, (h0, c0), weights, **options, backend="cpu").backend == "cpu"
    half = [t.half() for t in (x, h0, c0, *weights)]
    explained = bmk.explain(bmk.lstm, half[0], (half[1], half[2]), half[3:], **options)
    assert explained.backend == "torch"
    assert "float16" in explained.reasons["cpu"]
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run this call: x is torch.float16"):
        bmk.lstm(half[0], (half[1], half[2]), half[3:], **options, backend="cpu")
    assert bmk.lstm(half[0], (half[1], half[2]), half[3:], **options)[0].dtype == torch.float16


def bad_lstm_calls():
    z = torch.zeros
    w = [z(24, 4), z(24, 6), z(24), z(24)]
    x, hx = z(3, 2, 4), (z(1, 2, 6), z(1, 2, 6))
    projected, narrow = [w[0], z(24, 3), *w[2:], z(3, 5)], (z(1, 2, 3), hx[1])
    meta, rising, negative = z(24, 4, device="meta"), torch.tensor([1, 2, 2]), torch.tensor([2, -1])
    sizes = torch.tensor([2, 2, 1])
    return {
        "x type": (TypeError, "x must be a tensor", ([1.0], hx, w), {}),
        "hx type": (TypeError, "hx must be None or two tensors", (x, z(1, 2, 6), w), {}),
        "hx count": (TypeError, "hx must be None or two tensors", (x, (z(1, 2, 6),), w), {}),
        "weights type": (TypeError, r"weights\[1\] must be a tensor", (x, hx, [w[0], None, *w[2:]]), {}),
        "weights count": (RuntimeError, "weights must hold .* got 3 tensors", (x, hx, w[:3]), {"bidirectional": True}),
        "one weight": (RuntimeError, "weights must hold .* got 1 tensors", (x, hx, w[:1]), {}),
        "x rank": (RuntimeError, "x must have 3 dimensions", (z(3, 4), hx, w), {}),
        "packed x rank": (RuntimeError, "x must have 2 dimensions", (x, hx, w), {"batch_sizes": sizes}),
        "no steps": (RuntimeError, "Expected sequence length to be larger than 0 in RNN", (z(0, 2, 4), hx, w), {}),
        "h0 size": (RuntimeError, r"hx\[0\] must have shape \[1, 2, 6\], got \[1, 2, 5\]", (x, (z(1, 2, 5), hx[1]), w), {}),
        "c0 size": (RuntimeError, r"hx\[1\] must have shape \[1, 2, 6\], got \[1, 3, 6\]", (x, (hx[0], z(1, 3, 6)), w), {}),
        "h0 rank": (RuntimeError, r"hx\[0\] must have shape", (x, (z(2, 6), hx[1]), w), {}),
        "w_ih size": (RuntimeError, r"weights\[0\] must have shape \[24, 4\], got \[24, 5\]", (x, hx, [z(24, 5), *w[1:]]), {}),
        "w_hh size": (RuntimeError, r"weights\[1\] must have shape", (x, hx, [w[0], z(24, 7), *w[2:]]), {}),
        "bias size": (RuntimeError, r"weights\[3\] must have shape \[24\], got \[23\]", (x, hx, [*w[:3], z(23)]), {}),
        "w_hr size": (RuntimeError, r"weights\[4\] must have shape", (x, narrow, projected), {}),
        "h0 dtype": (RuntimeError, r"hx\[0\] must be torch.float32", (x, (hx[0].double(), hx[1]), w), {}),
        "weight dtype": (RuntimeError, r"weights\[2\] must be torch.float32", (x, hx, [*w[:2], w[2].double(), w[3]]), {}),
        "x dtype": (RuntimeError, r"must be torch.int64", (x.long(), hx, w), {}),
        "weight device": (RuntimeError, r"weights\[0\] must be .* on cpu .* on meta", (x, hx, [meta, *w[1:]]), {}),
        "dropout": (ValueError, "dropout must be a probability in .* got 1.5", (x, hx, w), {"dropout": 1.5}),
        "num_layers": (ValueError, "num_layers must be positive, got 0", (x, hx, w), {"num_layers": 0}),
        "backend": (ValueError, "backend must be one of .* got 'fast'", (x, hx, w), {"backend": "fast"}),
        "batch_sizes dtype": (TypeError, "batch_sizes must be", (z(5, 4), hx, w), {"batch_sizes": sizes.float()}),
        "batch_sizes rank": (TypeError, "batch_sizes must be", (z(5, 4), hx, w), {"batch_sizes": sizes[None]}),
        "batch_sizes sum": (RuntimeError, "must add up to the 6 rows of x, got 5", (z(6, 4), hx, w), {"batch_sizes": sizes}),
        "batch_sizes order": (RuntimeError, "batch_sizes must not increase", (z(5, 4), hx, w), {"batch_sizes": rising}),
        "batch_sizes sign": (RuntimeError, "batch_sizes must not increase", (z(1, 4), hx, w), {"batch_sizes": negative}),
    }  # fmt: skip


@pytest.mark.parametrize("name", bad_lstm_calls())
def test_wrong_arguments(name):
    error, message, args, options = bad_lstm_calls()[name]
    with pytest.raises(error, match=message):
        bmk.lstm(*args, **{"backend": "cpu"} | options)


def bad_cell_calls():
    z = torch.zeros
    x, hx, w = z(2, 4), (z(2, 6), z(2, 6)), (z(24, 4), z(24, 6), z(24), z(24))
    return {
        "input size": (RuntimeError, "input has inconsistent input_size: got 5 expected 4", (z(2, 5), hx, *w)),
        "h batch": (RuntimeError, "Input batch size 2 doesn't match hidden0 batch size 3", (x, (z(3, 6), z(2, 6)), *w)),
        "c batch": (RuntimeError, "Input batch size 2 doesn't match hidden1 batch size 1", (x, (z(2, 6), z(1, 6)), *w)),
        "h size": (RuntimeError, "hidden0 has inconsistent hidden_size: got 5, expected 6", (x, (z(2, 5), z(2, 6)), *w)),
        "c size": (RuntimeError, "hidden1 has inconsistent hidden_size: got 5, expected 6", (x, (z(2, 6), z(2, 5)), *w)),
        "one state": (RuntimeError, "lstm_cell expects two hidden states", (x, hx[:1], *w)),
        "state type": (TypeError, "hx must be two tensors", (x, z(2, 6), *w)),
        "x rank": (RuntimeError, "x must have 2 dimensions, got 1", (z(4), hx, *w)),
        "x type": (TypeError, "x must be a tensor, got list", ([1.0], hx, *w)),
        "weight type": (TypeError, "w_hh must be a tensor, got NoneType", (x, hx, w[0], None)),
        "one bias": (RuntimeError, "b_ih and b_hh must be given both or neither", (x, hx, *w[:3])),
        "w_ih size": (RuntimeError, r"w_ih must have shape \[24, 4\], got \[20, 4\]", (x, hx, z(20, 4), *w[1:])),
        "w_hh size": (RuntimeError, r"w_hh must have shape \[24, 6\], got \[23, 6\]", (x, hx, w[0], z(23, 6), *w[2:])),
        "bias size": (RuntimeError, r"b_hh must have shape \[24\], got \[6\]", (x, hx, *w[:3], z(6))),
        "h dtype": (RuntimeError, r"hx\[0\] must be torch.float32", (x, (hx[0].double(), hx[1]), *w)),
        "w dtype": (RuntimeError, r"w_ih must be torch.float32", (x, hx, w[0].double(), *w[1:])),
    }  # fmt: skip


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("bias", [True, False])
def test_cell_without_gradients_is_the_same(bias, layout):
    shapes = [(9, 20), (9, 33), (9, 33), (132, 20), (132, 33)]
    x, h, c, *weights = (make(*shape, seed=i, layout=layout) for i, shape in enumerate(shapes))
    weights += [make(132, seed=i) for i in (7, 8)] if bias else []
    expected = bmk.lstm_cell(x.clone().requires_grad_(), (h, c), *weights, backend="cpu")
    with torch.no_grad():
        actual = bmk.lstm_cell(x, (h, c), *weights, backend="cpu")
        assert all(torch.equal(a, e) for a, e in zip(actual, expected))
        assert bmk.explain(lambda: bmk.lstm_cell(x, (h, c), *weights, backend="cpu")).backend == "cpu"
    with torch.autograd.forward_ad.dual_level(), torch.no_grad(), pytest.raises(RuntimeError, match="forward-mode"):
        bmk.lstm_cell(x, (h, c), *weights, backend="cpu")


@pytest.mark.parametrize("name", bad_cell_calls())
def test_wrong_cell_arguments(name):
    error, message, args = bad_cell_calls()[name]
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), pytest.raises(error, match=message):
            bmk.lstm_cell(*args)


def test_native_op_checks_what_memory_safety_needs():
    z = torch.zeros
    w = [z(24, 4), z(24, 6), z(24), z(24)]
    op = torch.ops.bigmodel_native.lstm_fwd
    with pytest.raises(RuntimeError, match="contiguous"):
        op(z(3, 4, 2).mT, z(1, 2, 6), z(1, 2, 6), w, None, None, 1, False, True)
    with pytest.raises(RuntimeError, match="mask must have shape"):
        op(z(3, 2, 4), z(1, 2, 6), z(1, 2, 6), w, None, z(1, 6, 6), 1, False, True)
    with pytest.raises(RuntimeError, match="float32, float64 and bfloat16"):
        op(z(3, 2, 4).half(), z(1, 2, 6).half(), z(1, 2, 6).half(), [t.half() for t in w], None, None, 1, False, True)
