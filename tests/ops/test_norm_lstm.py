"""bmk.norm_lstm against float64: forward and every gradient, and what every op has to do."""

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.ops.norm_lstm import reference
from bigmodel_kernels.testing import assert_matches, make

# T, B, H: single elements, odd sizes, and sizes just below, at and above what a vector or a tile holds.
SIZES = [(1, 1, 4), (1, 5, 3), (3, 2, 15), (4, 3, 16), (2, 9, 17), (5, 8, 33), (7, 17, 64), (30, 4, 100), (3, 1, 260)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
NAMES = ("a", "h0", "c0", "w", "gain", "gain_c", "bias_c")


def tensors(size, dtype=torch.float64, seed=0, scale=1.0):
    steps, batch, hidden = size
    shapes = [
        (steps, batch, 4 * hidden),
        (batch, hidden),
        (batch, hidden),
        (4 * hidden, hidden),
        (4 * hidden,),
        (hidden,),
    ]
    shapes += [(hidden,), (steps, batch, hidden), (batch, hidden), (batch, hidden)]
    drawn = [make(*shape, dtype=torch.float64, seed=100 * seed + i) for i, shape in enumerate(shapes)]
    drawn[0] *= scale
    drawn[3] *= hidden**-0.5
    drawn[4:6] = (1 + 0.2 * t for t in drawn[4:6])
    return [t.to(dtype) for t in drawn]


def run(drawn, backend, dtype):
    """Results and gradients by name."""
    leaves = [t.to(dtype).requires_grad_() for t in drawn[:7]]
    a, h, c, *rest = leaves
    output, states = bmk.norm_lstm(a, (h, c), *rest, eps=1e-5, eps_c=1e-4, backend=backend)
    results = dict(zip(("output", "h_n", "c_n"), (output, *states)))
    loss = sum((y * g.to(dtype)).sum() for y, g in zip(results.values(), drawn[7:]))
    grads = torch.autograd.grad(loss, leaves)
    return {k: v.detach() for k, v in results.items()}, dict(zip(NAMES, grads))


def check(draws, dtype, backend="cpu"):
    """Every draw by itself or, where a batch has few rows, all together: a norm magnifies the errors of a row all alike, by
    1 / std, so that the largest error of torch's own in a few rows is a matter of luck, in many it is a yardstick."""
    found = []
    for drawn in draws:
        kinds = ((backend, dtype), ("torch", torch.float64), ("torch", dtype))
        found.append([run(drawn, *kind) for kind in kinds])  # ours, the exact, torch's
    steps, rows = len(draws[0][0]), draws[0][0].shape[:2].numel()
    for together in [found] if rows < 16 else [[one] for one in found]:
        compare(together, dtype, steps)


def compare(found, dtype, steps):
    for part in (0, 1):
        for name in found[0][0][part]:
            ours, truth, theirs = (torch.cat([f[kind][part][name].flatten() for f in found]) for kind in range(3))
            assert ours.dtype == dtype
            few = truth.numel() < 48  # and gradients of so few may cancel
            assert_matches(
                ours, truth, None if dtype == torch.float64 or few else theirs,
                dtype=dtype, gradient=part == 1, steps=steps, magnitude=0.1 * (few and part), name=name,
            )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_float64(size, dtype):
    check([tensors(size, dtype, seed) for seed in range(3)], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_sequences(dtype):
    check([tensors((300, 3, 24), dtype)], dtype)


def test_saturated_gates():
    check([tensors((6, 4, 20), scale=60.0)], torch.float32)


def test_reference_gradient_is_autograds():
    a, *rest = (t.requires_grad_(i < 7) for i, t in enumerate(tensors((4, 3, 5))))
    *inputs, d_output, d_h_n, d_c_n = a, *rest
    output, h_n, c_n, *saved = reference.forward(*inputs, 1e-5, 1e-4)
    expected = torch.autograd.grad((output, h_n, c_n), inputs, (d_output, d_h_n, d_c_n))
    with torch.no_grad():
        actual = reference.backward(d_output, d_h_n, d_c_n, output, *saved, *inputs, 1e-5, 1e-4)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_gradients_of_gradients(backend):
    a, h, c, *rest = (t.requires_grad_() for t in tensors((2, 2, 3))[:7])

    def call(a, h, c, *rest):
        output, states = bmk.norm_lstm(a, (h, c), *rest, backend=backend)
        return output, *states

    assert torch.autograd.gradcheck(call, (a, h, c, *rest), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (a, h, c, *rest), fast_mode=True)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_opcheck(layout):
    shapes = [(3, 2, 16), (2, 4), (2, 4), (16, 4), (16,), (4,), (4,)]
    args = [make(*s, seed=i, layout=layout) for i, s in enumerate(shapes)]
    torch.library.opcheck(torch.ops.bigmodel_kernels.norm_lstm_fwd.default, (*args, 1e-5, 1e-5, True, "cpu"))


def test_compiles_whole():
    drawn = tensors((3, 2, 8), torch.float32)
    a, h, c, *rest = (t.requires_grad_() for t in drawn[:7])
    compiled = torch.compile(bmk.norm_lstm, fullgraph=True, backend="aot_eager")
    expected, actual = bmk.norm_lstm(a, (h, c), *rest)[0], compiled(a, (h, c), *rest)[0]
    torch.testing.assert_close(actual, expected)
    grads = [torch.autograd.grad(y, (a, h, c, *rest), drawn[7]) for y in (actual, expected)]
    torch.testing.assert_close(*grads)
    torch.compiler.reset()


def test_results_do_not_depend_on_the_threads():
    drawn, before = tensors((9, 7, 40), torch.float32), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(drawn, "cpu", torch.float32))
    finally:
        torch.set_num_threads(before)
    for results, grads in found[1:]:
        for ours, one in zip((results, grads), found[0]):
            assert all(torch.equal(ours[name], one[name]) for name in one)


def test_nan_stays_in_its_sequence():
    a, h, c, *rest = tensors((4, 3, 10), torch.float32)[:7]
    clean, _ = bmk.norm_lstm(a, (h, c), *rest, backend="cpu")
    a[1, 1] = float("nan")
    output, _ = bmk.norm_lstm(a, (h, c), *rest, backend="cpu")
    assert torch.equal(output[:, [0, 2]], clean[:, [0, 2]])
    assert output[1:, 1].isnan().all()


def test_empty_batch():
    results, grads = run(tensors((2, 0, 4), torch.float32), "cpu", torch.float32)
    assert results["output"].shape == (2, 0, 4)
    assert grads["w"].shape == (16, 4)
    assert not grads["w"].any()
    assert not grads["gain"].any()


WRONG = {
    "hx": (TypeError, "hx must be two tensors", lambda t: t.update(h=None)),
    "type": (TypeError, "gain must be a tensor", lambda t: t.update(gain=1)),
    "no steps": (RuntimeError, "at least one step", lambda t: t.update(a=t["a"][:0])),
    "state": (RuntimeError, r"hx\[0\] must have shape \[2, 4\]", lambda t: t.update(h=t["h"][:1])),
    "weight": (RuntimeError, r"w must have shape \[16, 4\]", lambda t: t.update(w=t["w"][:8])),
    "dtype": (RuntimeError, "bias_c must be torch.float32", lambda t: t.update(bias_c=t["bias_c"].double())),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    error, message, spoil = WRONG[name]
    given = dict(zip(("a", "h", "c", "w", "gain", "gain_c", "bias_c"), tensors((3, 2, 4), torch.float32)))
    spoil(given)
    h, c = given.pop("h"), given.pop("c")
    with pytest.raises(error, match=message):
        bmk.norm_lstm(given.pop("a"), h if h is None else (h, c), **given)
