"""The CUDA kernels of whole LSTM layers, emulated: against float64, forward and every gradient, in all four scopes."""

import contextlib
import itertools

import pytest
import torch

from bigmodel_kernels import _gpu
from bigmodel_kernels.ops.lstm import cuda, cuda_plan
from bigmodel_kernels.ops.lstm.cuda_plan import BACKWARD, FORWARD, ROWS, STREAMED_REGISTERS, Kernel, Plan
from bigmodel_kernels.testing import relative_l2
from tests.emulator.backend import SUFFIX, emulated
from tests.emulator.emulator import EmulatorError, Program, needs_compiler
from tests.ops.test_lstm import Problem, check

pytestmark = needs_compiler
SCOPES = {"block": 0, "cluster": 1, "grid": 2, "streamed": 3}
KERNELS = {"forward": FORWARD, "backward": BACKWARD}


def small(scope: str, kernel: Kernel) -> Plan:
    """Several blocks of one warp where one block could hold all units, so that small sizes have some."""
    return Plan(scope, registers_of(scope, kernel), 1)


def registers_of(scope: str, kernel: Kernel) -> int:
    return STREAMED_REGISTERS if scope == "streamed" else kernel.registers


def type_of(dtype: torch.dtype, tf32: bool) -> str:
    return "bmk::Tf32" if tf32 and dtype == torch.float32 else SUFFIX[dtype]


def stream_name(direction: str, kind: str) -> str:
    return f"bmk::lstm_{direction}_stream<{kind}>"


def kernel_name(direction: str, kind: str, scope: str, registers: int) -> str:
    return f"bmk::lstm_{direction}<{kind}, static_cast<bmk::Scope>({SCOPES[scope]}), {registers}>"


def program(direction: str, kind: str, size: int, scope: str) -> Program:
    kernel = KERNELS[direction][size]
    registers = [r for _, r in kernel.one_block] if scope == "block" else [registers_of(scope, kernel)]
    streams = [stream_name(direction, kind)] if scope == "streamed" else []
    return Program(f"lstm_{direction}.cuh", *(kernel_name(direction, kind, scope, r) for r in registers), *streams)


class Native:
    """The native ops of csrc/cuda/lstm.cu, with its launches run by the emulator."""

    def __init__(self, seed=0, detect="memory", together=2, edit=None, edited=None):
        self.seed, self.detect, self.together = seed, detect, together
        self.edit, self.edited = edit, edited  # a change in a header, in which direction's kernel

    def _run(self, direction, like, w_hh, firsts, lengths, steps, tokens, arguments, scope, registers, warps, tf32):
        directions, batch, hidden = like.shape
        kernel, kind = KERNELS[direction][like.element_size()], type_of(like.dtype, tf32)
        groups = -(-batch // ROWS)
        blocks = kernel.blocks(hidden, warps)
        words = (
            torch.zeros(directions, groups, 2, kernel.words(hidden, registers), dtype=torch.int64)
            if scope in ("grid", "streamed")
            else None
        )
        together = groups if words is None else self.together
        code = program(direction, kind, like.element_size(), scope)
        code = code.with_edit(*self.edit) if self.edited == direction else code
        shared = kernel.shared_bytes(hidden, registers, warps, scope == "streamed")
        streamed = None
        if scope == "streamed" and (rest := kernel.depth_tiles(hidden, registers) - registers):
            size = directions * blocks * rest * kernel.tiles * 16 * 16 * warps * like.element_size()
            streamed = torch.full((size,), 255, dtype=torch.uint8)  # NaNs
            code.run(
                stream_name(direction, kind), (blocks, rest, directions), 32 * warps, (w_hh, streamed, hidden, registers),
                seed=self.seed, detect=self.detect,
            )  # fmt: skip
        bias_at = shared - cuda_plan.BIAS_BYTES * kernel.units * warps
        for first in range(0, groups, together):
            shape = (tokens, batch, hidden, steps, firsts, lengths, words, streamed, first, groups, bias_at)
            code.run(
                kernel_name(direction, kind, scope, registers),
                (blocks, min(together, groups - first), directions), 32 * warps, (shape, *arguments),
                shared_bytes=shared, cluster=blocks if scope == "cluster" else 1, cooperative=words is not None,
                seed=self.seed, detect=self.detect,
            )  # fmt: skip

    def lstm_sequence_fwd(
        self,
        from_input,
        w_hh,
        bias,
        h0,
        firsts,
        lengths,
        steps,
        output,
        h_n,
        c,
        gates,
        cells,
        scope,
        registers,
        warps,
        tf32,
    ):
        arguments = (from_input, w_hh, bias, h0, output, h_n, c, gates, cells)
        tokens = from_input.shape[1]
        self._run("forward", h0, w_hh, firsts, lengths, steps, tokens, arguments, scope, registers, warps, tf32)

    def lstm_sequence_bwd(
        self, d_output, gates, cells, c0, w_hh, firsts, lengths, steps, d_h, d_c, d_gates, scope, registers, warps, tf32
    ):
        arguments = (d_output, gates, cells, c0, w_hh, d_h, d_c, d_gates)
        tokens = d_output.shape[0]
        self._run("backward", c0, w_hh, firsts, lengths, steps, tokens, arguments, scope, registers, warps, tf32)


def check_emulated(problem, monkeypatch, scope, gpu=_gpu.H100, function=check, **native):
    native = Native(**native)
    if scope != "block":
        monkeypatch.setattr(cuda, "plan", lambda kernel, *sizes: small(scope, kernel))
    ops = {name: getattr(native, name) for name in ("lstm_sequence_fwd", "lstm_sequence_bwd")}
    with emulated(monkeypatch, "lstm", gpu, **ops):
        return function(problem, "cuda")


VARIANTS = {
    "plain": {},
    "stacked": {"num_layers": 2, "bidirectional": True},
    "no_bias": {"bias": False, "bidirectional": True},
    "packed": {"packed": True},
    "packed_stacked": {"packed": True, "num_layers": 2, "bidirectional": True},
}
# T, B, I, H: single elements; one below, at and above a group of 8 rows, a warp of 8 or 16 units, a tile of 16.
SIZES = [(1, 1, 2, 3), (2, 5, 3, 8), (4, 3, 5, 15), (3, 9, 7, 16), (5, 8, 9, 17), (2, 17, 6, 31), (3, 2, 8, 33)]


def half_of_all():
    """Every other size for each scope, variant and dtype, those between them for the next dtype: every size meets every variant
    in each scope, every variant every dtype."""
    for scope, (i, size), (j, variant), (k, dtype) in itertools.product(
        ["block", "cluster", "grid"], enumerate(SIZES), enumerate(VARIANTS), enumerate(SUFFIX)
    ):
        if (i + j + k) % 2 == 0:
            yield scope, size, variant, dtype


@pytest.mark.parametrize(("scope", "size", "variant", "dtype"), list(half_of_all()), ids=str)
def test_matches_float64(scope, size, variant, dtype, monkeypatch):
    check_emulated(Problem(*size, **VARIANTS[variant], dtype=dtype), monkeypatch, scope)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        *itertools.product(
            [(2, 2, 3, 64), (2, 9, 3, 65), (2, 1, 3, 100), (2, 2, 3, 128)], [torch.float16, torch.bfloat16]
        ),
        *itertools.product([(2, 2, 3, 40), (2, 9, 3, 64)], [torch.float32]),
    ],
    ids=str,
)
def test_one_block_up_to_its_most_units(size, dtype, monkeypatch):
    check_emulated(Problem(*size, dtype=dtype), monkeypatch, "block")


@pytest.mark.parametrize("dtype", SUFFIX, ids=str)
@pytest.mark.parametrize("size", [(2, 2, 3, 150), (3, 9, 5, 40)], ids=str)
def test_streamed_weights(size, dtype, monkeypatch):
    """Sizes with tiles past the registers, forward (150 units) and backward."""
    check_emulated(Problem(*size, bidirectional=size[3] == 40, dtype=dtype), monkeypatch, "streamed")


@contextlib.contextmanager
def tf32_allowed():
    """PyTorch's switches allow TF32 in products and in RNNs."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn.rnn
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "tf32"
    try:
        yield
    finally:
        for switch, value in zip(switches, before):
            switch.fp32_precision = value


@pytest.fixture
def tf32():
    with tf32_allowed():
        yield


def errors(problem, backend):
    """Relative L2 errors of all results and gradients, by name, against float64."""
    found, exact = problem.run(backend), problem.run("torch", torch.float64)
    return {name: relative_l2(a[name], e[name]) for a, e in zip(found, exact) for name in e}


def check_tf32(problem, backend):
    """TF32 has the fraction of float16, hence float16's bounds on the error; it is not float32, or it would not be TF32."""
    found = errors(problem, backend)
    assert all(error < (6e-4 if name in ("output", "h_n", "c_n") else 1e-3) for name, error in found.items()), found
    assert found["output"] > 1e-5


@pytest.mark.parametrize("variant", ["plain", "packed_stacked"])
@pytest.mark.parametrize("size", [(3, 9, 7, 16), (2, 5, 8, 33), (2, 2, 3, 64)], ids=str)
@pytest.mark.parametrize("scope", SCOPES)
def test_tf32_where_torch_allows_it(scope, size, variant, tf32, monkeypatch):
    check_emulated(Problem(*size, **VARIANTS[variant], dtype=torch.float32), monkeypatch, scope, function=check_tf32)


@pytest.mark.parametrize("scope", SCOPES)
def test_tf32_products_of_such_numbers_are_float32(scope, tf32, monkeypatch):
    """One step from a state of few digits, with weights of few digits: what rounding leaves as it was is exact in every place."""
    problem = Problem(1, 9, 5, 40, dtype=torch.float32)
    problem.weights[1] = problem.weights[1].to(torch.bfloat16).float()
    problem.h0 = problem.h0.to(torch.bfloat16).float()
    found = check_emulated(problem, monkeypatch, scope, function=errors)
    assert all(found[name] < 2e-6 for name in ("output", "h_n", "c_n")), found


def test_one_switch_is_not_enough(tf32, monkeypatch):
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    check_emulated(Problem(3, 9, 7, 16, dtype=torch.float32), monkeypatch, "block")


@pytest.mark.parametrize("seed", range(1, 21))
@pytest.mark.parametrize("scope", ["block", "cluster", "grid"])
def test_any_order_of_threads_gives_the_same_without_races(scope, seed, monkeypatch):
    """Another order of all threads for every seed; every access to memory is checked against all others."""
    problem = Problem(4, 9, 3, 20, packed=seed % 2 == 1, bidirectional=True, dtype=list(SUFFIX)[seed % 3])
    found = [
        check_emulated(problem, monkeypatch, scope, function=Problem.run, **options)
        for options in ({}, {"seed": seed, "detect": "races"})
    ]
    for expected, actual in zip(*found):
        assert all(torch.equal(expected[name], actual[name]) for name in expected)


EXCHANGE = "lstm_exchange.cuh"
BARRIERS = {  # scope, what is taken out of the kernel's headers
    "start of a block": ("block", "  } else {\n    __syncthreads();\n  }\n}", "  }\n}"),
    "start of blocks anywhere": ("grid", "  } else {\n    __syncthreads();\n  }\n}", "  }\n}"),
    "arrival at the start": ("cluster", "    ptx::cluster_arrive();\n    ptx::cluster_wait();\n", ""),
    "arrival after sending": ("cluster", "if constexpr (scope == Scope::cluster) ptx::cluster_arrive();", ""),
    "wait before reading": ("cluster", ") {\n    ptx::cluster_wait();\n  } else", ") {\n  } else"),
    "a block's wait before reading": ("block", "    }\n    __syncthreads();\n", "    }\n"),
    "wait for what was copied": ("grid", "    }\n    __syncthreads();\n", "    }\n"),
    "wait for the step's number": (
        "grid",
        "static_cast<unsigned>(found >> 32) != static_cast<unsigned>(step + 1)",
        "false",
    ),
    "two slots": ("block", "unsigned* slot = e.shared + step % 2 * e.words;", "unsigned* slot = e.shared;"),
}
# The backward kernel has no start but a cluster's: blocks must not write to one that is not there yet. Emulated, all are.
ONLY_FORWARD = ("start of a block", "start of blocks anywhere", "arrival at the start")
CASES = [
    (name, way) for name in BARRIERS for way in ("forward", "backward") if way == "forward" or name not in ONLY_FORWARD
]


@pytest.mark.parametrize(("barrier", "direction"), CASES, ids=str)
def test_no_barrier_can_be_left_out(barrier, direction, monkeypatch):
    scope, old, new = BARRIERS[barrier]
    problem = Problem(4, 9, 3, 20, dtype=torch.bfloat16)
    with pytest.raises((EmulatorError, AssertionError)):
        check_emulated(problem, monkeypatch, scope, detect="races", edit=(EXCHANGE, old, new), edited=direction)
