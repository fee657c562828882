"""The LSTM cell's CUDA kernels, emulated: against float64, forward and every gradient."""

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.testing import assert_matches, make
from tests.emulator.backend import SUFFIX, emulated
from tests.emulator.emulator import Program, needs_compiler

pytestmark = needs_compiler
CELL = Program(
    "lstm_cell.cuh",
    *(f"bmk::lstm_cell_{direction}<{name}>" for direction in ("forward", "backward") for name in SUFFIX.values()),
)
UNITS, ROWS = 32, 4  # of a block


def _grid(batch: int, hidden: int) -> tuple[int, int]:
    return -(-hidden // UNITS), -(
        -batch // (2 * ROWS)
    )  # half as many rows of blocks as would do: each takes several rows


def step_fwd(from_input, from_state, c, b_ih, b_hh, save):
    batch, hidden = c.shape
    h_new, c_new = torch.full((2, batch, hidden), torch.nan, dtype=c.dtype)
    gates, cells = (torch.full((int(save), batch, n * hidden), torch.nan) for n in (4, 1))
    if c.numel():
        arguments = (
            batch, hidden, from_input, from_state, b_ih, b_hh, c, h_new, c_new, gates if save else None, cells if save else None
        )  # fmt: skip
        CELL.run(
            f"bmk::lstm_cell_forward<{SUFFIX[c.dtype]}>", _grid(batch, hidden), (UNITS, ROWS), arguments, detect="races"
        )
    return h_new, c_new, gates, cells


def step_bwd(d_h, d_c, gates, cells, c):
    batch, hidden = c.shape
    d_gates = torch.full((batch, 4 * hidden), torch.nan, dtype=c.dtype)
    d_c_before = torch.full_like(c, torch.nan)
    if c.numel():
        arguments = (batch, hidden, d_h, d_c, gates, cells, c, d_gates, d_c_before)
        CELL.run(f"bmk::lstm_cell_backward<{SUFFIX[c.dtype]}>", _grid(batch, hidden), (UNITS, ROWS), arguments)
    return d_gates, d_c_before


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    with emulated(monkeypatch, "lstm_cell", lstm_cell_step_fwd=step_fwd, lstm_cell_step_bwd=step_bwd):
        yield


def problem(batch, inputs, hidden, bias, dtype):
    shapes = [(batch, inputs), (batch, hidden), (batch, hidden), (4 * hidden, inputs), (4 * hidden, hidden)]
    shapes += [(4 * hidden,)] * 2 if bias else []
    return [(make(*shape, seed=i) * (hidden**-0.5 if i > 2 else 1)).to(dtype) for i, shape in enumerate(shapes)]


def run(tensors, backend, dtype, which=(0, 1)):
    x, h, c, *weights = leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    results = bmk.lstm_cell(x, (h, c), *weights, backend=backend)
    upstream = [make(*h.shape, dtype=dtype, seed=20 + i) for i in which]
    grads = torch.autograd.grad([results[i] for i in which], leaves, upstream)
    return [r.detach() for r in results], grads


@pytest.mark.parametrize("which", [(0, 1), (0,), (1,)], ids=str)
@pytest.mark.parametrize("dtype", SUFFIX, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(0, 3, 4), (1, 2, 3), (5, 5, 17), (9, 9, 33), (17, 1, 64)], ids=str)
def test_matches_float64(size, bias, dtype, which):
    tensors = problem(*size, bias, dtype)
    runs = [run(tensors, *of, which) for of in (("cuda", dtype), ("torch", torch.float64), ("torch", dtype))]
    for gradient, *found in zip((False, True), *runs):
        for i, (actual, exact, baseline) in enumerate(zip(*found)):
            assert actual.dtype == dtype
            few = actual.numel() < 16  # as in tests/ops/test_lstm.py
            assert_matches(
                actual, exact, None if few else baseline,
                dtype=dtype, gradient=gradient, magnitude=0.1 * (few and gradient), name=f"{i}",
            )  # fmt: skip


def test_nothing_saved_gives_the_same():
    tensors = problem(3, 4, 5, True, torch.float32)
    x, h, c, *weights = tensors
    results = bmk.lstm_cell(x, (h, c), *weights, backend="cuda")
    for actual, expected in zip(results, run(tensors, "cuda", torch.float32)[0]):
        assert torch.equal(actual, expected)


def test_large_sums_saturate():
    tensors = problem(2, 3, 4, True, torch.float32)
    tensors[0] *= 1e4
    for actual, exact in zip(run(tensors, "cuda", torch.float32)[0], run(tensors, "torch", torch.float64)[0]):
        assert_matches(actual, exact, None, dtype=torch.float32)
