"""One step of a causal convolution on the GPU: against float64; the same from run to run; replayed from one CUDA graph."""

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.ops.conv_step import cuda
from bigmodel_kernels.testing import assert_matches, make

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
STEPS, DILATION = 9, 4
SIZES = [(1, 64, 2), (1, 256, 3), (3, 128, 2), (9, 40, 2), (33, 512, 2), (1, 1024, 2)]  # sequences, channels, kernel


@pytest.fixture(autouse=True)
def _ieee(monkeypatch):
    """PyTorch's own float32 products as a yardstick: without TF32."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def problem(batch, channels, kernel, dtype):
    """x of every step and the weights of a WaveNet layer."""
    shapes = [(batch, channels, STEPS), (2 * channels, channels, kernel), (2 * channels,), (channels, channels, 1)]
    shapes += [(channels,), (channels + 8, channels, 1), (channels + 8,)]
    drawn = [make(*shape, seed=i) for i, shape in enumerate(shapes)]
    scaled = [t * t[0].numel() ** -0.5 if t.dim() == 3 and i else t for i, t in enumerate(drawn)]
    return [t.to(dtype).cuda() for t in scaled]


def start(x, kernel):
    return bmk.ConvState.start(x.shape[0], x.shape[1], kernel, DILATION, x)


def step(x_t, state, weights, backend):
    with torch.no_grad():
        return bmk.conv_step(x_t, state, *weights, dilation=DILATION, activation="tanh_sigmoid", backend=backend)


def stream(tensors, backend, dtype=None):
    x, *weights = tensors if dtype is None else [t.to(dtype) for t in tensors]
    state, columns = start(x, weights[0].shape[2]), []
    for t in range(STEPS):
        y, total, state = step(x[..., t], state, weights, backend)
        columns.append(torch.cat([y, total], 1))
    assert int(state.position) == STEPS
    return torch.stack(columns), state.ring


def check(size, dtype):
    tensors = problem(*size, dtype)
    found, ring = stream(tensors, "cuda")
    exact, _ = stream(tensors, "torch", torch.float64)
    baseline, expected = stream(tensors, "torch")
    assert_matches(found, exact, baseline, dtype=dtype, magnitude=0.1)
    assert torch.equal(ring, expected)


@pytest.mark.parametrize("in_blocks", [False, True])
def test_tiny(in_blocks, monkeypatch):
    """For the sanitizer: in one block and in several."""
    if in_blocks:
        monkeypatch.setattr(cuda, "ONE_BLOCK_BYTES", 0)
    check((5, 24, 3), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_float64(size, dtype):
    check(size, dtype)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_same_from_run_to_run(size):
    tensors = problem(*size, torch.bfloat16)
    first, _ = stream(tensors, "cuda")
    for _ in range(20):
        assert torch.equal(stream(tensors, "cuda")[0], first)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_one_graph_for_every_step(size):
    """The position is on the device: replays of the same graph are one step after the other."""
    x, *weights = tensors = problem(*size, torch.float16)
    expected, ring = stream(tensors, "cuda")
    held, state = x[..., 0].clone(), start(x, size[2])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, total, _ = step(held, state, weights, "cuda")
    for t in range(STEPS):
        held.copy_(x[..., t])
        graph.replay()
        assert torch.equal(torch.cat([y, total], 1), expected[t])
    assert torch.equal(state.ring, ring)
