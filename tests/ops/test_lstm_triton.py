"""The Triton LSTM kernels: interpreted on the CPU against float64, forward and every gradient; compiled for GPUs not at hand.

float32 and float16 only where interpreted: Triton's interpreter multiplies the bits of bfloat16 numbers, and `supports`
refuses them there.
"""

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels import _triton
from bigmodel_kernels.ops.lstm import reference
from bigmodel_kernels.testing import LAYOUTS, assert_matches, make
from tests.ops.test_lstm import Problem, check
from tests.triton_aot import SHARED_LIMIT, compiling
from tests.triton_interpreter import interpreted

# T, B, I, H: single elements, one below, at and above a tile of 16, 32 and 64 units and 4 rows.
SIZES = [
    (1, 1, 2, 3),
    (2, 5, 3, 4),
    (4, 3, 5, 15),
    (3, 6, 17, 16),
    (5, 4, 9, 17),
    (2, 9, 6, 32),
    (3, 3, 8, 33),
    (2, 2, 5, 64),
]
BY_STEP_SIZES = [(1, 1, 2, 3), (4, 5, 3, 7), (3, 2, 9, 33), (2, 3, 4, 130), (1, 2, 3, 520)]
VARIANTS = {
    "plain": {},
    "stacked": {"num_layers": 2, "bidirectional": True},
    "no_bias": {"bias": False, "bidirectional": True},
    "packed": {"packed": True},
    "packed_stacked": {"packed": True, "num_layers": 2, "bidirectional": True},
    "projected": {"proj": True, "num_layers": 2},
    "packed_projected": {"packed": True, "proj": True, "bidirectional": True, "bias": False},
}
DTYPES = [torch.float32, torch.float16]


class by_step:
    """In the block no layer goes at once."""

    def __enter__(self):
        from bigmodel_kernels.ops.lstm import triton_kernels

        self.module, self.constants = triton_kernels, triton_kernels._constants
        triton_kernels._constants = lambda *args: None

    def __exit__(self, *exception):
        self.module._constants = self.constants


class configured_for:
    """In the block the tile sizes are those of `gpu`."""

    def __init__(self, gpu):
        self.name = gpu

    def __enter__(self):
        self.gpu, _triton.gpu = _triton.gpu, lambda device: self.name

    def __exit__(self, *exception):
        _triton.gpu = self.gpu


def check_sequence(*args, gpu="interpreter", stepwise=False, **kwargs):
    with configured_for(gpu):
        if stepwise:
            with by_step():
                return check(Problem(*args, **kwargs), "triton")
        return check(Problem(*args, **kwargs), "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_float64(size, variant, dtype):
    interpreted(check_sequence, *size, **VARIANTS[variant], dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["plain", "stacked", "packed_stacked"])
@pytest.mark.parametrize("size", BY_STEP_SIZES, ids=str)
def test_step_by_step_matches_float64(size, variant, dtype):
    interpreted(check_sequence, *size, **VARIANTS[variant], dtype=dtype, stepwise=True)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("variant", ["stacked", "packed_stacked", "packed_projected"])
def test_matches_float64_with_other_numbers(variant, seed):
    interpreted(check_sequence, 6, 5, 7, 18, **VARIANTS[variant], seed=seed)


@pytest.mark.parametrize("lengths", [[5], [5, 5, 5], [5, 1, 1, 1], [5, 4, 3, 2, 1], [5] * 9 + [2] * 9], ids=str)
@pytest.mark.parametrize("stepwise", [False, True])
def test_lengths(lengths, stepwise):
    options = VARIANTS["packed_stacked"] | {"lengths": list(lengths), "stepwise": stepwise}
    interpreted(check_sequence, 5, len(lengths), 4, 10, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [20, 64, 100])
def test_tile_sizes_of_the_table(hidden, dtype):
    interpreted(check_sequence, 3, 3, 5, hidden, **VARIANTS["packed_stacked"], dtype=dtype, gpu="sm_90")


@pytest.mark.parametrize(("stepwise", "dtype"), [(False, torch.float32), (False, torch.float16), (True, torch.float32)])
def test_long_sequences(stepwise, dtype):
    interpreted(check_sequence, 210, 2, 4, 12, dtype=dtype, stepwise=stepwise)


def check_cell(batch, inputs, hidden, bias, dtype):
    shapes = [(batch, inputs), (batch, hidden), (batch, hidden), (4 * hidden, inputs), (4 * hidden, hidden)]
    shapes += [(4 * hidden,)] * 2 if bias else []
    tensors = [(make(*shape, seed=i) * (hidden**-0.5 if i > 2 else 1)).to(dtype) for i, shape in enumerate(shapes)]
    upstream = [make(batch, hidden, dtype=dtype, seed=seed) for seed in (20, 21)]

    def run(backend, dtype):
        x, h, c, *weights = leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        results = bmk.lstm_cell(x, (h, c), *weights, backend=backend)
        grads = torch.autograd.grad(results, leaves, [g.to(dtype) for g in upstream])
        return [r.detach() for r in results], grads

    for gradient, *found in zip((False, True), run("triton", dtype), run("torch", torch.float64), run("torch", dtype)):
        for i, (actual, exact, baseline) in enumerate(zip(*found)):
            assert actual.dtype == dtype
            assert_matches(actual, exact, baseline, dtype=dtype, gradient=gradient, name=f"{i}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(0, 3, 4), (1, 2, 3), (3, 5, 17), (7, 9, 33), (9, 1, 64), (2, 8, 600)], ids=str)
def test_cell_matches_float64(size, bias, dtype):
    interpreted(check_cell, *size, bias, dtype)


def check_some_gradients_only(which, function):
    p = Problem(3, 3, 4, 6, **VARIANTS["stacked"])

    def run(backend, dtype):
        x, h0, c0, *weights = leaves = [t.to(dtype).requires_grad_() for t in (p.x, p.h0, p.c0, *p.weights)]
        if function == "cell":
            result = bmk.lstm_cell(x[0], (h0[0], c0[0]), *weights[:4], backend=backend)[which - 1]
            leaves = leaves[:7]
        else:
            output, states = bmk.lstm(x, (h0, c0), weights, num_layers=2, bidirectional=True, backend=backend)
            result = (output, *states)[which]
        return torch.autograd.grad(result.sin().sum(), leaves)

    for actual, exact in zip(run("triton", torch.float32), run("torch", torch.float64)):
        assert_matches(actual, exact, None, dtype=torch.float32, gradient=True)


@pytest.mark.parametrize(("which", "function"), [(0, "lstm"), (1, "lstm"), (2, "lstm"), (1, "cell"), (2, "cell")])
def test_gradient_of_one_result_alone(which, function):
    interpreted(check_some_gradients_only, which, function)


def check_nothing_saved():
    for options in (VARIANTS["packed_stacked"], VARIANTS["projected"]):
        p = Problem(4, 3, 5, 9, **options)
        expected, _ = p.run("triton")
        output, states = bmk.lstm(
            p.x, (p.h0, p.c0), p.weights, num_layers=p.num_layers, bidirectional=p.bidirectional,
            batch_sizes=p.batch_sizes, backend="triton",
        )  # fmt: skip
        for actual, truth in zip((output, *states), expected.values()):
            assert torch.equal(actual, truth)


def test_results_without_gradients_are_those_with():
    interpreted(check_nothing_saved)


def check_exchange():
    """Every way's backward on what every way saved; the C++ kernels' too."""
    from bigmodel_kernels.ops.lstm import cpu, triton_kernels

    p = Problem(4, 5, 6, 9, **VARIANTS["packed_stacked"])
    args = (p.x, p.h0, p.c0, p.weights, p.batch_sizes, None, p.num_layers, p.bidirectional, 0.0, True)
    _, exact = p.run("torch", torch.float64)
    saved = [triton_kernels.fwd(*args), cpu.fwd(*args)]
    with by_step():
        saved.append(triton_kernels.fwd(*args))
    for output, _, _, *kept in saved:
        rest = (*p.upstream, output, *kept, True, True, *args)
        found = [triton_kernels.bwd(*rest), cpu.bwd(*rest)]
        with by_step():
            found.append(triton_kernels.bwd(*rest))
        for d_x, d_h0, d_c0, d_weights in found:
            for actual, truth in zip((d_x, d_h0, d_c0, *d_weights), exact.values()):
                assert_matches(actual, truth, None, dtype=torch.float32, gradient=True)


def test_what_one_way_saves_any_other_takes():
    interpreted(check_exchange)


def check_dropout(variant):
    p = Problem(4, 3, 5, 6, **VARIANTS[variant] | {"num_layers": 3})
    mask = (make(2, p.x.shape[:-1].numel(), p.upstream[0].shape[-1], seed=77) > 0).float() / 0.6
    args = (p.x, p.h0, p.c0, p.weights, p.batch_sizes, mask, 3, p.bidirectional, 0.4, True)
    exact = [t.double().requires_grad_() for t in (p.x, p.h0, p.c0, *p.weights)]
    truth = reference.forward(*exact[:3], exact[3:], p.batch_sizes, mask.double(), 3, p.bidirectional)[:3]
    true_grads = torch.autograd.grad(truth, exact, [g.double() for g in p.upstream])
    op = bmk.lstm.op
    output, h_n, c_n, *saved = op.fwd(*args, "triton")
    d_x, d_h0, d_c0, d_weights = op.bwd(*p.upstream, output, *saved, True, True, *args, "triton")
    for actual, t in zip((output, h_n, c_n), truth):
        assert_matches(actual, t.detach(), None, dtype=torch.float32)
    for actual, t in zip((d_x, d_h0, d_c0, *d_weights), true_grads):
        assert_matches(actual, t, None, dtype=torch.float32, gradient=True)


@pytest.mark.parametrize("variant", ["stacked", "packed_stacked", "projected"])
def test_dropout_mask(variant):
    interpreted(check_dropout, variant)


def check_layout(which, layout):
    p = Problem(4, 3, 6, 8)
    tensors = [p.x, p.h0, p.c0, *p.weights]
    strided = make(*tensors[which].shape, seed=5, layout=layout)
    plain = [*tensors[:which], strided.contiguous(), *tensors[which + 1 :]]
    tensors[which] = strided
    for stepwise in (False, True):
        with by_step() if stepwise else configured_for("interpreter"):
            ours, expected = p.run("triton", tensors=tensors), p.run("triton", tensors=plain)
        for actual, truth in zip(ours, expected):
            for name in truth:
                torch.testing.assert_close(actual[name], truth[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("which", range(5))
def test_layouts(which, layout):
    interpreted(check_layout, which, layout)


def check_extremes():
    for options in ({}, {"packed": True}):
        p = Problem(4, 6, 5, 9, **options)
        clean, _ = p.run("triton")
        p.x.view(-1, 5)[0] = float("nan")  # of the first sequence
        dirty, _ = p.run("triton")
        assert torch.equal(dirty["h_n"][:, 1:], clean["h_n"][:, 1:])
        assert dirty["h_n"][:, 0].isnan().all()
    for scale in (1e2, 1e4, 1e18):
        p = Problem(5, 4, 6, 10, scale=scale)
        exact, _ = p.run("torch", torch.float64)
        actual, grads = p.run("triton")
        for name, truth in exact.items():
            assert torch.isfinite(actual[name]).all()
            if scale <= 1e4:
                assert_matches(actual[name], truth, None, dtype=torch.float32, name=name)
        assert all(torch.isfinite(g).all() for g in grads.values())


def test_saturated_gates_and_nan_in_one_sequence():
    interpreted(check_extremes)


def check_empty():
    for variant in ("stacked", "projected"):
        p = Problem(3, 0, 4, 5, **VARIANTS[variant])
        for ours, theirs in zip(p.run("triton"), p.run("torch")):
            for name in theirs:
                assert ours[name].shape == theirs[name].shape
                assert not ours[name].any()


def test_empty_batch():
    interpreted(check_empty)


def check_states_before():
    from bigmodel_kernels.ops.lstm.by_layer import Tokens

    for sizes in ([1], [3, 3, 3], [4, 2, 1], [4, 4, 2, 2, 2, 1], [5, 1, 1], [2, 2, 1, 0]):
        count = sum(sizes)
        tokens = Tokens(sizes, count, 5, packed=True)
        y, initial = make(count, 2, seed=1), make(5, 2, seed=2)
        for backwards in (False, True):
            state, expected = initial.clone(), torch.empty_like(y)
            for first, rows in tokens.steps[::-1] if backwards else tokens.steps:
                expected[first : first + rows] = state[:rows]
                state[:rows] = y[first : first + rows]
            assert torch.equal(tokens.states_before(y, initial, backwards), expected), (sizes, backwards)


def test_what_every_step_started_from():
    interpreted(check_states_before)


def check_far_tokens():
    """A token past 2^31 numbers gives the bits of the first one; memory that nothing touches costs nothing."""
    from bigmodel_kernels.ops.lstm import triton_sequence
    from bigmodel_kernels.ops.lstm_cell import triton_step

    hidden, batch, far = 16, 4, 2**25  # 4 hidden far = 2^31
    w, bias, state = make(hidden, 4 * hidden) * 0.2, make(4 * hidden, seed=1), make(batch, 4 * hidden, seed=2)
    lengths = torch.ones(batch, dtype=torch.int64)
    _, blocks = triton_step.programs(batch, hidden)
    results = []
    for first in (0, far):
        gates = torch.empty(first + batch, 4 * hidden, dtype=torch.float16)
        cells = torch.empty(first + batch, hidden, dtype=torch.float16)
        token = slice(first, first + batch)
        found = []
        for at_once in (False, True):
            gates[token] = make(batch, 4 * hidden, seed=3)
            h, c = make(batch, hidden, seed=4), make(batch, hidden, seed=5)
            d_gates = torch.empty(first + batch, 4 * hidden)
            if at_once:
                table = torch.tensor([first])
                options = {"H": hidden, "PACKED": True, "PRECISION": "ieee", "BLOCK_B": 4, "BLOCK_H": 16}
                h0, c0 = h.clone(), c.clone()
                y = torch.empty(first + batch, hidden)
                _triton.launch(
                    triton_sequence.forward_kernel, 1, gates, w, w, *[bias] * 4, h0, c0, h, c, y, gates, cells,
                    table, lengths, 1, batch, first + batch, 0, hidden, TRANSPOSED=True, **options,
                )  # fmt: skip
                _triton.launch(
                    triton_sequence.backward_kernel, 1, y, h, c, gates, cells, c.clone(), w, w, d_gates,
                    table, lengths, 1, batch, first + batch, hidden, 4 * hidden, **options,
                )  # fmt: skip
            else:
                _triton.launch(
                    triton_step.forward_kernel, 1, gates, state, bias, bias, c, c, h, None, gates, cells,
                    batch, first, hidden, hidden, **blocks,
                )  # fmt: skip
                _triton.launch(
                    triton_step.backward_kernel, 1, h, None, c, gates, cells, c.clone(), d_gates,
                    batch, first, 0, 0, hidden, hidden, 4 * hidden, **blocks,
                )  # fmt: skip
            found += [gates[token].clone(), cells[token].clone(), h, c, d_gates[token].clone()]
        results.append(found)
    for near, far_away in zip(*results):
        assert torch.equal(near, far_away)


def test_tokens_past_two_to_the_31_numbers():
    interpreted(check_far_tokens)


def check_refusal():
    for dtype, why in (
        (torch.bfloat16, "interpreter has no bfloat16"),
        (torch.float64, "float32, float16 and bfloat16"),
    ):
        p = Problem(2, 2, 3, 4, dtype=dtype)
        with pytest.raises(RuntimeError, match=why):
            p.run("triton")
        with pytest.raises(RuntimeError, match=why):
            bmk.lstm_cell(p.x[0], (p.h0[0], p.c0[0]), *p.weights, backend="triton")
    p = Problem(3, 2, 3, 4, packed=True)
    for sizes in ([1, 2, 1], [3, 1, 0], [2, 2, 2]):
        p.batch_sizes = torch.tensor(sizes)
        with pytest.raises(RuntimeError, match="batch_sizes must"):
            bmk.lstm(p.x, (p.h0, p.c0), p.weights, batch_sizes=p.batch_sizes, backend="triton")


def test_refusals_name_the_reason():
    interpreted(check_refusal)
    p = Problem(2, 2, 3, 4)
    with pytest.raises(RuntimeError, match=r"on cpu, not on a GPU|no GPU was found"):
        p.run("triton")


# What the compiler may use, by arithmetic and hidden size: registers forward and backward, bytes of shared memory. From the
# figures of Triton 3.6 and 3.7 for sm_80 and sm_90, rounded up.
BUDGET = {
    ("ieee", 16): (96, 96, 8 << 10),
    ("ieee", 32): (96, 96, 20 << 10),
    ("ieee", 64): (96, 96, 72 << 10),
    ("tf32", 64): (192, 128, 88 << 10),
    ("16-bit", 16): (250, 224, 8 << 10),
    ("16-bit", 32): (250, 224, 16 << 10),
    ("16-bit", 64): (250, 232, 48 << 10),
    ("16-bit", 128): (128, 128, 152 << 10),
}


def compile_call(gpu, monkeypatch, dtype, hidden, **options):
    from bigmodel_kernels.ops.lstm import triton_kernels

    p = Problem(2, 3, 16, hidden, **options, dtype=dtype)
    args = (p.x, p.h0, p.c0, p.weights, p.batch_sizes, None, p.num_layers, p.bidirectional, 0.0, True)
    with compiling(gpu, monkeypatch) as binaries:
        output, _, _, *saved = triton_kernels.fwd(*args)
        triton_kernels.bwd(*p.upstream, output, *saved, True, True, *args)
    return binaries


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("arithmetic", "hidden"), BUDGET)
@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
def test_sequence_kernels_compile_within_their_budget(gpu, arithmetic, hidden, dtype, monkeypatch):
    if (dtype == torch.float32) == (arithmetic == "16-bit") or (dtype == torch.bfloat16 and hidden < 128):
        pytest.skip("not a row of the table, or that of float16 once more")
    if arithmetic == "tf32":
        monkeypatch.setattr(_triton, "precision", lambda dtype, *switches: "tf32")
    options = {"packed": True, "bidirectional": True} if hidden > 32 else {}
    forward, backward = compile_call(gpu, monkeypatch, dtype, hidden, **options)
    *registers, shared = BUDGET[arithmetic, hidden]
    for binary, most in zip((forward, backward), registers):
        assert binary.spills == 0, binary
        assert binary.registers <= most, binary
        assert binary.shared <= min(shared, SHARED_LIMIT["sm_86" if hidden < 128 else gpu]), binary
        assert ("HMMA" in binary.sass) == (arithmetic != "ieee"), binary


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
def test_step_kernels_compile_within_their_budget(gpu, dtype, monkeypatch):
    for projected in (False, True):
        binaries = compile_call(gpu, monkeypatch, dtype, 256, proj=projected)
        assert len(binaries) == 2
        for binary in binaries:
            assert binary.spills == 0, binary
            assert binary.registers <= 80, binary
            assert binary.shared <= 4 << 10, binary
