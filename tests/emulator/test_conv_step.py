"""The CUDA kernel of conv_step, emulated: step by step against float64, in one block and in several, the state included."""

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels import _gpu
from bigmodel_kernels.ops.conv_step import cuda
from bigmodel_kernels.testing import assert_matches, make
from tests.emulator.backend import SUFFIX, emulated
from tests.emulator.conv_native import ACTIVATIONS
from tests.emulator.emulator import EmulatorError, Program, needs_compiler

pytestmark = needs_compiler
KERNEL = "conv_step.cuh"


def kernel_name(dtype: torch.dtype, sequences: int) -> str:
    return f"bmk::conv_step<{SUFFIX[dtype]}, {sequences}>"


STEP = Program(KERNEL, *(kernel_name(dtype, sequences) for dtype in SUFFIX for sequences in (1, 4)))


class Native:
    """The native op of csrc/cuda/conv_step.cu, with its launch run by the emulator."""

    def __init__(self, warps=3, order=0, detect="memory", edit=None):
        self.warps, self.order, self.detect, self.edit = warps, order, detect, edit

    def conv_step_launch(
        self, x, ring, position, weight, bias, out_weight, out_bias, skip_weight, skip_bias, skip_sum, dilation, groups,
        activation, slope, share, sequences, y, skip, partial, tickets,
    ):  # fmt: skip
        (batch, channels), (rows, _, kernel) = x.shape, weight.shape
        gated = activation == "tanh_sigmoid"
        out, skips = (0 if w is None else w.shape[0] for w in (out_weight, skip_weight))
        for t in (y, skip, partial):
            t.fill_(torch.nan)
        parameters = (
            x, *x.stride(), ring, position, weight, bias, out_weight, out_bias, skip_weight, skip_bias, skip_sum, y, skip,
            partial, tickets, batch, channels, rows, kernel, dilation, groups, out, skips, share, gated,
            0 if gated else ACTIVATIONS.index(activation), float(slope),
        )  # fmt: skip
        name = kernel_name(x.dtype, sequences)
        program = STEP if self.edit is None and self.detect == "memory" else Program(KERNEL, name, edit=self.edit)
        values = rows // 2 if gated else rows
        grid = max(1, -(-values // share)), max(1, -(-batch // sequences))
        size = cuda.shared_bytes(rows, channels, kernel, groups, gated, share, sequences, x.element_size())
        program.run(
            name, grid, 32 * self.warps, parameters, shared_bytes=size, seed=self.order, detect=self.detect
        )  # fmt: skip
        assert not tickets.any()


# batch, channels, rows, kernel, dilation, groups, activation; whether there is a residual; rows of the skip sum, or None
CASES = {
    "wavenet": (1, 16, 32, 2, 2, 1, "tanh_sigmoid", True, 16),
    "two groups of sequences": (5, 8, 40, 3, 1, 1, "tanh_sigmoid", True, 24),
    "odd": (2, 5, 14, 3, 2, 1, "tanh_sigmoid", True, 9),
    "no residual": (3, 6, 36, 2, 1, 1, "tanh_sigmoid", False, 7),
    "no skip": (1, 7, 38, 2, 3, 1, "tanh_sigmoid", True, None),
    "relu in groups": (2, 6, 9, 5, 1, 3, "relu", False, None),
    "gate in groups": (2, 8, 40, 2, 1, 2, "tanh_sigmoid", True, 3),
    "depthwise": (4, 35, 35, 4, 1, 35, "silu", False, None),
    "slope": (1, 7, 3, 2, 3, 1, ("leaky_relu", 0.3), False, 2),
    "no memory": (2, 20, 40, 1, 7, 1, None, False, None),
    "wide": (1, 150, 6, 3, 1, 1, "gelu", False, None),
}
STEPS = 3  # past the ring's end, where it has one, from the position below
START = 4


def problem(name: str, dtype: torch.dtype, seed: int = 0):
    """x for every step, strided as a column of a sequence is, the state before, and what else the call takes."""
    batch, channels, rows, kernel, dilation, groups, activation, residual, skips = CASES[name]
    values = rows // 2 if activation == "tanh_sigmoid" else rows
    of_group = channels // groups

    def tensor(*shape, scale=1.0):
        nonlocal seed
        seed += 1
        return (make(*shape, seed=seed) * scale).to(dtype)

    x = tensor(batch, channels, STEPS)
    state = bmk.ConvState(tensor(batch, dilation * (kernel - 1), channels), torch.tensor([START]))
    call = {
        "weight": tensor(rows, of_group, kernel, scale=(of_group * kernel) ** -0.5), "bias": tensor(rows),
        "dilation": dilation, "groups": groups, "activation": activation,
    }  # fmt: skip
    if residual:
        call |= {"out_weight": tensor(channels, values, 1, scale=values**-0.5), "out_bias": tensor(channels)}
    if skips:
        call |= {"skip_weight": tensor(skips, values, 1, scale=values**-0.5), "skip": tensor(batch, skips)}
    return x, state, call


def steps(x, state, call, dtype, backend):
    """y and the skip sum of every step, each stacked; then the state."""
    cast = {name: t.to(dtype) if isinstance(t, torch.Tensor) else t for name, t in call.items()}
    state, x, results = bmk.ConvState(state.ring.to(dtype, copy=True), state.position.clone()), x.to(dtype), []
    with torch.no_grad():
        for t in range(STEPS):
            y, total, state = bmk.conv_step(x[..., t], state, **cast, backend=backend)
            results.append((y, total))
    return [torch.stack(part) for part in zip(*results) if part[0] is not None], state


def run_emulated(name, monkeypatch, dtype=torch.bfloat16, seed=0, in_blocks=False, **native):
    x, state, call = problem(name, dtype, seed)
    if in_blocks:
        monkeypatch.setattr(cuda, "ONE_BLOCK_BYTES", 0)
    with emulated(monkeypatch, "conv_step", conv_step_launch=Native(**native).conv_step_launch):
        return steps(x, state, call, dtype, "cuda")


def check_step(name, monkeypatch, dtype=torch.bfloat16, seed=0, **options):
    found, after = run_emulated(name, monkeypatch, dtype, seed, **options)
    x, state, call = problem(name, dtype, seed)
    exact, expected = steps(x, state, call, torch.float64, "torch")
    baseline, _ = steps(x, state, call, dtype, "torch")
    for part, *results in zip(("y", "skip"), found, exact, baseline):
        assert_matches(*results, dtype=dtype, magnitude=0.1, name=part)
    assert torch.equal(after.ring.double(), expected.ring)
    assert int(after.position) == START + STEPS


@pytest.mark.parametrize("in_blocks", [False, True], ids=["one block", "blocks"])
@pytest.mark.parametrize("dtype", SUFFIX, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_matches_float64(name, dtype, in_blocks, monkeypatch):
    check_step(name, monkeypatch, dtype, in_blocks=in_blocks)


@pytest.mark.parametrize("seed", [10, 20, 30])
def test_other_numbers_and_all_warps(seed, monkeypatch):
    check_step("two groups of sequences", monkeypatch, seed=seed, in_blocks=True, warps=16)


def test_weights_that_are_not_aligned(monkeypatch):
    x, state, call = problem("wavenet", torch.float16)
    expected, _ = run_emulated("wavenet", monkeypatch, torch.float16)
    for name in ("weight", "out_weight"):
        call[name] = torch.cat([call[name].new_zeros(1), call[name].flatten()])[1:].view(call[name].shape)
    with emulated(monkeypatch, "conv_step", conv_step_launch=Native().conv_step_launch):
        found, _ = steps(x, state, call, torch.float16, "cuda")
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)


def test_integers_are_exact(monkeypatch):
    """Sums of small integers, through the ring and both products, to the bit."""
    x, state, call = problem("no skip", torch.float32)
    call |= {"activation": "relu", "out_weight": make(7, 38, 1, seed=9)}
    call = {k: (t * 3).round() if isinstance(t, torch.Tensor) else t for k, t in call.items()}
    x, state = (x * 3).round(), bmk.ConvState((state.ring * 3).round(), state.position)
    exact, _ = steps(x, state, call, torch.float64, "torch")
    monkeypatch.setattr(cuda, "ONE_BLOCK_BYTES", 0)
    with emulated(monkeypatch, "conv_step", conv_step_launch=Native().conv_step_launch):
        found, _ = steps(x, state, call, torch.float32, "cuda")
    assert torch.equal(found[0].double(), exact[0])


@pytest.mark.parametrize("order", range(1, 21))
def test_any_order_of_threads_gives_the_same_without_races(order, monkeypatch):
    found = [
        run_emulated("two groups of sequences", monkeypatch, in_blocks=True, **options)
        for options in ({}, {"order": order, "detect": "races"})
    ]
    (expected, state), (actual, after) = found
    assert all(torch.equal(a, b) for a, b in zip((*expected, *state), (*actual, *after)))


TICKET = "const bool last = ptx::atom_add_acq_rel_gpu(tickets, 1) == holders - 1;"
BARRIERS = {  # what is taken out; whether it matters in one block
    "the inputs": ("  __syncthreads();\n\n  constexpr int kVector", "\n  constexpr int kVector", True),
    "the values": ("  __syncthreads();\n\n  const auto finish", "\n  const auto finish", True),
    "before the ticket": (
        "    __syncthreads();\n    if (threadIdx.x == 0) is_last",
        "    if (threadIdx.x == 0) is_last",
        False,
    ),
    "after the ticket": ("    __syncthreads();\n    if (!is_last", "    if (!is_last", False),
    "the ticket": (TICKET, "const bool last = true;", False),
    "the ticket's return to zero": ("    if (last) *tickets = 0;\n", "", False),
}


@pytest.mark.parametrize("barrier", BARRIERS)
def test_no_barrier_can_be_left_out(barrier, monkeypatch):
    *change, in_one_block = BARRIERS[barrier]
    for in_blocks in (True, False) if in_one_block else (True,):
        with pytest.raises((EmulatorError, AssertionError)):
            check_step(
                "two groups of sequences", monkeypatch, in_blocks=in_blocks, detect="races", edit=(KERNEL, *change)
            )


def test_no_sequences(monkeypatch):
    x, weight = torch.ones(0, 3), torch.ones(4, 3, 2)
    state = bmk.ConvState.start(0, 3, 2, 2, x)
    with emulated(monkeypatch, "conv_step", conv_step_launch=Native().conv_step_launch), torch.no_grad():
        y, _, state = bmk.conv_step(x, state, weight, dilation=2, backend="cuda")
    assert y.shape == (0, 4)
    assert int(state.position) == 1


def test_refuses(monkeypatch):
    x, weight = torch.zeros(1, 4096), torch.zeros(2, 4096, 8)
    with (
        emulated(monkeypatch, "conv_step", gpu=_gpu.L40S),
        pytest.raises(RuntimeError, match="do not fit in shared memory"),
    ):
        bmk.conv_step(x, bmk.ConvState.start(1, 4096, 8, 1, x), weight, backend="cuda")
    with pytest.raises(NotImplementedError, match=r"make cuda|no GPU was found"):
        bmk.conv_step(x, bmk.ConvState.start(1, 4096, 8, 1, x), weight, backend="cuda")


def test_blocks_share_what_one_would_take_long_for():
    assert cuda.share_of(64, 48 << 10) == 64
    assert cuda.share_of(5, 100) == 16
    assert cuda.share_of(256, 768 << 10) == 16
    assert cuda.share_of(1024, 12 << 20) == 32
