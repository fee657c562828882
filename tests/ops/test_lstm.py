"""bmk.lstm against float64: forward and every gradient, over sizes, variants, dtypes and layouts."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import bigmodel_kernels as bmk
from bigmodel_kernels.ops.lstm import reference
from bigmodel_kernels.testing import assert_matches, make
from tests.rerun import rerun

# T, B, I, H: single elements, odd sizes, and sizes just below, at and above what a tile or a vector holds.
SIZES = [
    (6, 21, 32, 64),
    (1, 1, 1, 1),
    (1, 5, 3, 4),
    (2, 1, 7, 16),
    (3, 2, 1, 1),
    (4, 3, 5, 15),
    (5, 4, 16, 16),
    (2, 6, 17, 17),
    (3, 7, 8, 31),
    (2, 8, 3, 32),
    (4, 9, 33, 33),
    (2, 11, 10, 47),
    (3, 12, 64, 48),
    (2, 13, 5, 49),
    (2, 16, 31, 63),
    (3, 17, 12, 64),
    (2, 23, 8, 65),
    (3, 24, 9, 40),
    (2, 25, 6, 100),
    (3, 31, 28, 128),
    (5, 33, 4, 20),
    (2, 65, 3, 12),
    (7, 3, 400, 9),
    (3, 26, 390, 8),
    (20, 2, 4, 8),
    (2, 1, 20, 260),
    (28, 12, 28, 24),
]
VARIANTS = {
    "plain": {},
    "stacked": {"num_layers": 2, "bidirectional": True},
    "no_bias": {"bias": False, "bidirectional": True},
    "projected": {"proj": True, "num_layers": 2},
    "packed": {"packed": True},
    "packed_all": {"packed": True, "num_layers": 2, "bidirectional": True, "proj": True, "bias": False},
}
FUSED = bmk.build_info().get("isa") != "generic"  # without fused multiply-add torch's own result is no yardstick
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


class Problem:
    """Inputs, weights and upstream gradients of one call, the same numbers in any wider dtype."""

    def __init__(
        self, T, B, I, H, num_layers=1, bidirectional=False, bias=True, proj=False, packed=False,  # noqa: E741
        dtype=torch.float32, seed=0, scale=1.0, lengths=None,
    ):  # fmt: skip
        sizes = (T, B, I, H, num_layers, bidirectional, bias, proj, packed, dtype)
        self.redrawn = lambda i: Problem(*sizes, seed=seed + 7 * i, scale=scale, lengths=self.lengths)
        self.dtype, self.num_layers, self.bidirectional, self.steps = dtype, num_layers, bidirectional, T
        D = 2 if bidirectional else 1
        P = max(1, H // 2 - 1) if proj and H > 1 else H
        seeds = iter(range(1000 * seed, 1000 * seed + 1000))
        self.batch_sizes = None
        tokens = (T, B)
        if packed:
            lengths = lengths or sorted((1 + (7 * b + seed) % T for b in range(B)), reverse=True)
            lengths[0] = T
            self.batch_sizes = torch.tensor([sum(n > t for n in lengths) for t in range(T)])
            tokens = (sum(lengths),)
        self.lengths = lengths

        def draw(*shape, scale=1.0):
            return (make(*shape, dtype=torch.float64, seed=next(seeds)) * scale).to(dtype)

        self.x = draw(*tokens, I, scale=scale)
        self.h0, self.c0 = draw(num_layers * D, B, P), draw(num_layers * D, B, H)
        self.weights = []
        for layer in range(num_layers):
            for _ in range(D):
                shapes = [(4 * H, I if layer == 0 else D * P), (4 * H, P)]
                shapes += [(4 * H,)] * 2 if bias else []
                shapes += [(P, H)] if proj and H > 1 else []
                self.weights += [draw(*shape, scale=max(1, shape[-1]) ** -0.5) for shape in shapes]
        self.upstream = [draw(*tokens, D * P), draw(num_layers * D, B, P), draw(num_layers * D, B, H)]

    def run(self, backend, dtype=None, tensors=None, **options):
        """Results and gradients by name, on `backend`, in `dtype`."""
        dtype = dtype or self.dtype
        x, h0, c0, *weights = (
            t.detach().to(dtype).requires_grad_() for t in (tensors or (self.x, self.h0, self.c0, *self.weights))
        )
        output, (h_n, c_n) = bmk.lstm(
            x, (h0, c0), weights, num_layers=self.num_layers, bidirectional=self.bidirectional,
            batch_sizes=self.batch_sizes, backend=backend, **options,
        )  # fmt: skip
        results = {"output": output, "h_n": h_n, "c_n": c_n}
        leaves = {"x": x, "h0": h0, "c0": c0, **{f"weights[{i}]": w for i, w in enumerate(weights)}}
        loss = sum((y * g.to(dtype)).sum() for y, g in zip(results.values(), self.upstream))
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return {k: v.detach() for k, v in results.items()}, {f"d_{k}": g for k, g in zip(leaves, grads)}


def check(problem, backend="cpu"):
    """Results and gradients by the error rule. The largest error of a few numbers is a matter of luck, for torch's as for ours,
    so small problems are drawn several times and judged together."""
    draws = 3 if problem.upstream[0].numel() < 300 and problem.dtype != torch.float64 else 1
    problems = [problem, *(problem.redrawn(i) for i in range(1, draws))]

    def together(*options):
        runs = [p.run(*options) for p in problems]
        return [{name: torch.stack([run[kind][name] for run in runs]) for name in runs[0][kind]} for kind in range(2)]

    exact, exact_grads = together("torch", torch.float64)
    baseline, baseline_grads = together("torch")
    actual, grads = together(backend)
    same = problem.dtype == torch.float64  # torch's own result is the exact one then
    for gradient, ours, theirs, truth in (
        (False, actual, baseline, exact),
        (True, grads, baseline_grads, exact_grads),
    ):
        for name in truth:
            assert ours[name].dtype == problem.dtype
            # With a handful of numbers the largest error of torch's is a draw of luck, no yardstick; and they may cancel
            # to nothing: a gate's derivative is below 1/4, so the terms are about a tenth of the upstream gradients.
            few = truth[name].numel() < 16
            yardstick = None if same or few or not FUSED else theirs[name]
            assert_matches(
                ours[name], truth[name], yardstick,
                dtype=problem.dtype, gradient=gradient, steps=problem.steps, magnitude=0.1 * (few and gradient),
                name=name,
            )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_float64(size, variant, dtype):
    check(Problem(*size, **VARIANTS[variant], dtype=dtype))


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(9, 7, 12, 20), (4, 30, 20, 33)], ids=str)
def test_matches_float64_with_other_numbers(size, variant, seed):
    check(Problem(*size, **VARIANTS[variant], seed=seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [250, 500])
def test_long_sequences(steps, dtype):
    check(Problem(steps, 3, 4, 12, dtype=dtype))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lengths", [[6], [6, 6, 6], [6, 1, 1, 1], [6, 5, 4, 3, 2, 1], [6] * 20 + [2] * 21])
def test_lengths(lengths, variant):
    options = VARIANTS[variant] | {"packed": True}
    check(Problem(6, len(lengths), 5, 18, **options, lengths=list(lengths)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_input_without_numbers(dtype):
    """Its weights are empty and have no address; the other gradients once were left as memory happened to be."""
    check(Problem(3, 2, 0, 20, dtype=dtype))


@pytest.mark.parametrize("variant", VARIANTS)
def test_empty_batch(variant):
    options = {k: v for k, v in VARIANTS[variant].items() if k != "packed"}
    problem = Problem(3, 0, 4, 5, **options)
    results, grads = problem.run("cpu")
    expected, expected_grads = problem.run("torch")
    for ours, theirs in ((results, expected), (grads, expected_grads)):
        for name in theirs:
            assert ours[name].shape == theirs[name].shape
            assert torch.equal(ours[name], torch.zeros_like(theirs[name]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_gradient_is_autograds(variant):
    p = Problem(4, 3, 5, 6, **VARIANTS[variant], dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (p.x, p.h0, p.c0, *p.weights)]
    x, h0, c0, *weights = leaves
    rest = (p.batch_sizes, None, p.num_layers, p.bidirectional)
    output, h_n, c_n, *saved = reference.forward(x, h0, c0, weights, *rest)
    expected = torch.autograd.grad([output, h_n, c_n], leaves, p.upstream)
    with torch.no_grad():
        d_x, d_h0, d_c0, d_weights = reference.backward(*p.upstream, output, *saved, x, h0, c0, weights, *rest)
    for actual, truth in zip((d_x, d_h0, d_c0, *d_weights), expected):
        torch.testing.assert_close(actual, truth, rtol=1e-12, atol=1e-12)
    for actual, truth in zip((output, h_n, c_n), p.run("torch")[0].values()):
        torch.testing.assert_close(actual, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "offset"])
@pytest.mark.parametrize("which", range(7))
def test_layouts(which, layout):
    p = Problem(4, 3, 6, 8)
    tensors = [p.x, p.h0, p.c0, *p.weights]
    strided = make(*tensors[which].shape, seed=5, layout=layout) * 0.3
    if layout == "transposed" and which < 5:
        strided = make(*tensors[which].shape, seed=5, layout=layout)  # keeps its strides
    plain = [*tensors[:which], strided.contiguous(), *tensors[which + 1 :]]
    tensors[which] = strided
    ours, grads = p.run("cpu", tensors=tensors)
    expected, expected_grads = p.run("cpu", tensors=plain)
    for name in expected:
        assert torch.equal(ours[name], expected[name])
    for name in expected_grads:
        assert torch.equal(grads[name], expected_grads[name])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_batch_first(bidirectional):
    p = Problem(5, 3, 4, 6, bidirectional=bidirectional)
    options = {"bidirectional": bidirectional, "backend": "cpu"}
    expected, states = bmk.lstm(p.x, (p.h0, p.c0), p.weights, **options)
    actual, other_states = bmk.lstm(p.x.transpose(0, 1), (p.h0, p.c0), p.weights, batch_first=True, **options)
    assert torch.equal(actual, expected.transpose(0, 1))
    assert torch.equal(torch.stack(states), torch.stack(other_states))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["plain", "stacked", "projected"])
def test_packed_is_a_loop_over_sequences(variant, dtype):
    p = Problem(7, 5, 6, 18, **VARIANTS[variant], packed=True, dtype=dtype)
    packed, _ = p.run("cpu")
    starts = [0, *p.batch_sizes.cumsum(0).tolist()]
    options = {"num_layers": p.num_layers, "bidirectional": p.bidirectional, "backend": "cpu"}
    for row, length in enumerate(p.lengths):
        tokens = [starts[t] + row for t in range(length)]
        hx = (p.h0[:, row : row + 1], p.c0[:, row : row + 1])
        output, (h_n, c_n) = bmk.lstm(p.x[tokens, None], hx, p.weights, **options)
        # A single step reads its weights in another order than a longer sequence.
        compare = (
            torch.testing.assert_close if length == 1 else lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0)
        )
        compare(output[:, 0], packed["output"][tokens])
        compare(h_n[:, 0], packed["h_n"][:, row])
        compare(c_n[:, 0], packed["c_n"][:, row])


def test_bidirectional_is_two_unidirectional():
    p = Problem(6, 30, 5, 17, bidirectional=True)
    both, _ = p.run("cpu")
    forward, _ = bmk.lstm(p.x, (p.h0[:1], p.c0[:1]), p.weights[:4], backend="cpu")
    backward, _ = bmk.lstm(p.x.flip(0), (p.h0[1:], p.c0[1:]), p.weights[4:], backend="cpu")
    assert torch.equal(both["output"], torch.cat([forward, backward.flip(0)], 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("batch", [1, 7, 40])
@pytest.mark.parametrize("chunks", [[2, 3, 4], [1, 1, 3, 4]], ids=str)
def test_chunks_with_carried_state_are_one_run(batch, dtype, chunks):
    p = Problem(9, batch, 5, 20, num_layers=2, dtype=dtype)
    whole, _ = p.run("cpu")
    hx, outputs = (p.h0, p.c0), []
    for chunk in p.x.split(chunks):
        output, hx = bmk.lstm(chunk, hx, p.weights, num_layers=2, backend="cpu")
        outputs.append(output)
    exactly = {} if 1 in chunks else {"rtol": 0, "atol": 0}  # a single step reads its weights in another order
    torch.testing.assert_close(torch.cat(outputs), whole["output"], **exactly)
    torch.testing.assert_close(hx, (whole["h_n"], whole["c_n"]), **exactly)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e18])
def test_saturated_gates(scale, dtype):
    p = Problem(5, 4, 6, 10, dtype=dtype, scale=scale)
    exact, exact_grads = p.run("torch", torch.float64)
    actual, grads = p.run("cpu")
    for name, truth in exact.items():
        assert torch.isfinite(actual[name]).all()
        if scale <= 1e4:
            assert_matches(actual[name], truth, None, dtype=dtype, name=name)
    for name in exact_grads:
        assert torch.isfinite(grads[name]).all()


def test_nan_stays_in_its_sequence():
    p = Problem(4, 30, 5, 9)
    clean, _ = p.run("cpu")
    p.x[1, 3, 2] = float("nan")
    dirty, _ = p.run("cpu")
    others = [b for b in range(30) if b != 3]
    assert torch.equal(dirty["output"][:, others], clean["output"][:, others])
    assert dirty["output"][1:, 3].isnan().all()
    assert torch.equal(dirty["output"][0, 3], clean["output"][0, 3])


def test_padding_does_not_leak():
    lengths = [6, 4, 1]
    x = make(6, 3, 5)
    for b, n in enumerate(lengths):
        x[n:, b] = float("nan")
    m = bmk.nn.LSTM(5, 7, 2, bidirectional=True)
    output, states = m(pack_padded_sequence(x, torch.tensor(lengths)))
    assert torch.isfinite(output.data).all()
    assert all(torch.isfinite(s).all() for s in states)


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(4, 1, 6, 200), (4, 9, 20, 200), (5, 37, 10, 33), (3, 150, 30, 40)], ids=str)
def test_results_do_not_depend_on_the_threads(size, variant, restore_threads):
    assert_same_for_any_threads(Problem(*size, **VARIANTS[variant]))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shared_steps_do_not_depend_on_the_threads(dtype, deterministic, restore_threads):
    # Weights for which several threads share every step, in bfloat16 too, and enough tokens for several blocks of sums.
    torch.use_deterministic_algorithms(deterministic)
    try:
        assert_same_for_any_threads(Problem(25, 9, 40, 320, dtype=dtype))
    finally:
        torch.use_deterministic_algorithms(False)


def assert_same_for_any_threads(p):
    found = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results, grads = p.run("cpu")
        found.append(results | grads)
    for other in found[1:]:
        for name, first in found[0].items():
            assert torch.equal(first, other[name]), name


def test_every_call_keeps_its_own_state_for_the_backward():
    # What a forward saves lies in memory that earlier calls gave back: calls that are alive together must not share it.
    problems = [Problem(20, 16, 8, 64, num_layers=2, seed=seed) for seed in range(3)]
    expected = [p.run("cpu")[1]["d_x"] for p in problems]

    def forward(p):
        x = p.x.clone().requires_grad_()
        output, (h_n, c_n) = bmk.lstm(x, (p.h0, p.c0), p.weights, num_layers=2, backend="cpu")
        return x, [output, h_n, c_n]

    def gradient(x, results, p):
        return torch.autograd.grad(results, x, p.upstream)[0]

    calls = [forward(p) for p in problems]
    with ThreadPoolExecutor(1) as other_thread:  # the memory then goes back to a thread that did not take it
        last = other_thread.submit(gradient, *calls.pop(), problems[2]).result()
    assert torch.equal(last, expected[2])
    calls.append(forward(problems[2]))
    for call, p, truth in zip(calls, problems, expected):
        assert torch.equal(gradient(*call, p), truth)


def dropout_problem():
    p = Problem(6, 5, 4, 8, num_layers=3, bidirectional=True)
    return p, {"num_layers": 3, "bidirectional": True, "dropout": 0.4, "training": True, "backend": "cpu"}


def test_dropout_forward_and_gradient():
    p, options = dropout_problem()
    torch.manual_seed(3)
    keep = torch.full((2, 30, 16), 0.6)
    mask = torch.bernoulli(keep) / 0.6
    torch.manual_seed(3)
    leaves = [t.double().float().requires_grad_() for t in (p.x, p.h0, p.c0, *p.weights)]
    output, (h_n, c_n) = bmk.lstm(leaves[0], leaves[1:3], leaves[3:], **options)
    grads = torch.autograd.grad([output, h_n, c_n], leaves, p.upstream)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    truth = reference.forward(*exact[:3], exact[3:], None, mask.double(), 3, True)[:3]
    true_grads = torch.autograd.grad(truth, exact, [g.double() for g in p.upstream])
    for a, t in zip((output, h_n, c_n), truth):
        assert_matches(a.detach(), t.detach(), None, dtype=torch.float32)
    for a, t in zip(grads, true_grads):
        assert_matches(a, t, None, dtype=torch.float32, gradient=True)


def test_dropout_draws_from_the_default_generator():
    p, options = dropout_problem()

    def run(seed):
        torch.manual_seed(seed)
        return bmk.lstm(p.x, (p.h0, p.c0), p.weights, **options)[0]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    options["training"] = False
    assert torch.equal(run(1), run(2))
    assert torch.equal(run(1), p.run("cpu")[0]["output"])


def test_dropout_of_everything():
    p, options = dropout_problem()
    output, _ = bmk.lstm(p.x, (p.h0, p.c0), p.weights, **options | {"dropout": 1.0})
    with bmk.use_backend("torch"):
        expected, _ = bmk.lstm(p.x, (p.h0, p.c0), p.weights, **options | {"dropout": 1.0, "backend": "auto"})
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512_bf16", "amx_emulated"])
def test_other_instruction_sets(isa):
    best = bmk.build_info()["isa"]
    above = {
        "avx2": ("avx512", "avx512_bf16", "amx"),
        "avx512": ("avx512_bf16", "amx"),
        "avx512_bf16": ("amx",),
        "amx_emulated": ("avx512_bf16", "amx"),
    }
    if isa == best or best not in above.get(isa, (best,)):
        pytest.skip(f"this CPU has {best}: {'the other tests run it' if isa == best else 'not ' + isa}")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"BIGMODEL_ISA": isa}
    show = "import bigmodel_kernels as b; print(b.build_info()['isa'])"
    found = subprocess.run([sys.executable, "-c", show], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == isa
    chosen = "test_matches_float64 and (plain or packed_all) or threads and stacked or saturated"
    if isa.startswith("amx"):  # which multiply bfloat16 only
        chosen = "test_matches_float64 and bfloat16 or shared_steps"
    rerun(__file__, chosen, isa)
