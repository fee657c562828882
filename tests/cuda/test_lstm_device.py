"""LSTM layers and cells on the GPU: against float64 in every scope; under CUDA graphs; the same from run to run."""

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels import _gpu
from bigmodel_kernels.ops.lstm import cuda
from bigmodel_kernels.ops.lstm.cuda_plan import BACKWARD, plan
from bigmodel_kernels.testing import assert_matches, make
from tests.emulator.test_lstm import check_tf32, small, tf32_allowed
from tests.ops.test_lstm import Problem, check

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
VARIANTS = {
    "plain": {},
    "stacked": {"num_layers": 2, "bidirectional": True},
    "packed": {"packed": True},
    "packed_stacked": {"packed": True, "num_layers": 2, "bidirectional": True},
}
SCOPES = ["block", "cluster", "grid", "streamed"]


def on_gpu(problem: Problem) -> Problem:
    problem.x, problem.h0, problem.c0 = (t.cuda() for t in (problem.x, problem.h0, problem.c0))
    problem.weights = [w.cuda() for w in problem.weights]
    problem.upstream = [g.cuda() for g in problem.upstream]
    return problem


def in_scope(monkeypatch, scope: str) -> None:
    if scope == "cluster" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("this GPU has no clusters")
    if scope != "block":  # at small sizes: blocks of one warp
        monkeypatch.setattr(cuda, "plan", lambda kernel, *sizes: small(scope, kernel))


@pytest.mark.parametrize("scope", SCOPES)
def test_tiny(scope, monkeypatch):
    """For the sanitizer: all kernels, few steps."""
    in_scope(monkeypatch, scope)
    check(on_gpu(Problem(3, 9, 4, 20, **VARIANTS["packed_stacked"], dtype=torch.bfloat16)), "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(1, 1, 2, 3), (5, 9, 7, 16), (12, 30, 9, 33), (50, 17, 20, 56)], ids=str)
@pytest.mark.parametrize("scope", SCOPES)
def test_matches_float64(scope, size, variant, dtype, monkeypatch):
    in_scope(monkeypatch, scope)
    check(on_gpu(Problem(*size, **VARIANTS[variant], dtype=dtype)), "cuda")


@pytest.mark.parametrize("scope", SCOPES)
def test_tf32_where_torch_allows_it(scope, monkeypatch):
    in_scope(monkeypatch, scope)
    with tf32_allowed():
        check_tf32(on_gpu(Problem(5, 9, 7, 33, **VARIANTS["packed_stacked"], dtype=torch.float32)), "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [64, 100, 128, 136, 256, 384, 512, 640, 768, 1024])
def test_matches_float64_by_plan(hidden, dtype):
    if plan(BACKWARD[dtype.itemsize], hidden, 1, _gpu.properties(0)) is None:
        pytest.skip("the states of so many units do not fit on this GPU")
    check(on_gpu(Problem(30, 20, 40, hidden, dtype=dtype)), "cuda")


def test_matches_float64_over_many_steps():
    check(on_gpu(Problem(1000, 9, 16, 200, dtype=torch.bfloat16)), "cuda")


@pytest.mark.parametrize("hidden", [96, 320, 640])
def test_same_from_run_to_run(hidden):
    problem = on_gpu(Problem(40, 16, 8, hidden, bidirectional=True, dtype=torch.bfloat16))
    first = problem.run("cuda")
    for _ in range(5):
        for expected, found in zip(first, problem.run("cuda")):
            assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("hidden", [96, 320, 640])
def test_in_a_cuda_graph(hidden):
    p = on_gpu(Problem(20, 8, 8, hidden, dtype=torch.float16))

    def run():
        with torch.no_grad():
            return bmk.lstm(p.x, (p.h0, p.c0), p.weights, backend="cuda")[0]

    expected = run().clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for _ in range(3):
        found.zero_()
        graph.replay()
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(0, 3, 4), (1, 2, 3), (9, 9, 33), (300, 64, 600)], ids=str)
def test_cell_tiny_and_not(size, dtype):
    batch, inputs, hidden = size
    shapes = [(batch, inputs), (batch, hidden), (batch, hidden), (4 * hidden, inputs), (4 * hidden, hidden)]
    shapes += [(4 * hidden,)] * 2
    tensors = [(make(*s, seed=i) * (hidden**-0.5 if i > 2 else 1)).to(dtype).cuda() for i, s in enumerate(shapes)]
    upstream = [make(batch, hidden, dtype=dtype, seed=seed).cuda() for seed in (20, 21)]

    def run(backend, dtype):
        x, h, c, *weights = leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        results = bmk.lstm_cell(x, (h, c), *weights, backend=backend)
        return results, torch.autograd.grad(results, leaves, [g.to(dtype) for g in upstream])

    for gradient, *found in zip((False, True), run("cuda", dtype), run("torch", torch.float64), run("torch", dtype)):
        for actual, exact, baseline in zip(*found):
            few = actual.numel() < 16
            assert_matches(
                actual, exact, None if few else baseline,
                dtype=dtype, gradient=gradient, magnitude=0.1 * (few and gradient),
            )  # fmt: skip
