"""Gradients of the CUDA kernels of convolutions, emulated: against float64 and PyTorch's own in the same dtype."""

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.ops.conv import cuda
from bigmodel_kernels.testing import assert_matches, make
from tests.emulator.backend import SUFFIX, emulated
from tests.emulator.conv_native import Native
from tests.emulator.emulator import EmulatorError, needs_compiler

pytestmark = needs_compiler
NAMES = ("x", "weight", "bias", "scale", "shift", "residual")


@pytest.fixture
def native(monkeypatch):
    native = Native()
    # Small tiles and short sums, so that small images have several of them.
    monkeypatch.setattr(cuda, "TILES", {1: [(1, 16), (1, 1)], 2: [(4, 6), (1, 1)]})
    monkeypatch.setattr(cuda, "SHORTEST_SUM", 1)
    with emulated(monkeypatch, "conv", **native.ops()):
        yield native


def problem(shape, channels, kernel, dtype, *, groups=1, extra=NAMES[2:5], integer=False):
    tensors = {"x": make(*shape, dtype=dtype, seed=1, integer=integer)}
    depth = shape[1] // groups
    weight = make(channels, depth, *kernel, dtype=dtype, seed=2, integer=integer)
    tensors["weight"] = weight if integer else weight * weight[0].numel() ** -0.5
    for i, name in enumerate(extra, 3):
        tensors[name] = make(channels, dtype=dtype, seed=i, integer=integer)
    return tensors


def gradients(backend, dtype, tensors, wanted, **options):
    leaves = {name: t.detach().to(dtype).requires_grad_(name in wanted) for name, t in tensors.items()}
    x, weight, bias, *rest = (leaves.get(name) for name in NAMES)
    named = {name: t for name, t in zip(NAMES[3:], rest) if t is not None}
    out = bmk.conv(x, weight, bias, **named, **options, backend=backend)
    upstream = make(*out.shape, dtype=dtype, seed=9, integer="integer" in wanted)
    return out, torch.autograd.grad(out, [leaves[name] for name in NAMES if name in wanted], upstream)


def check(tensors, wanted=None, residual=False, **options):
    wanted = set(tensors) if wanted is None else set(wanted)
    dtype = tensors["x"].dtype
    if residual:
        shape = bmk.conv(tensors["x"].double(), tensors["weight"].double(), backend="torch", **options).shape
        tensors = tensors | {"residual": make(*shape, dtype=dtype, seed=7)}
        wanted.add("residual")
    runs = [
        gradients(backend, d, tensors, wanted, **options)
        for backend, d in (("cuda", dtype), ("torch", torch.float64), ("torch", dtype))
    ]
    assert_matches(*(out.detach() for out, _ in runs), dtype=dtype)
    for name, actual, exact, own in zip([n for n in NAMES if n in wanted], *(found for _, found in runs)):
        assert actual.dtype == dtype
        few = actual.numel() < 32
        assert_matches(actual, exact, None if few else own, dtype=dtype, gradient=True, magnitude=few, name=name)


# batch, channels, size; output channels; kernel; options
STEMS = [
    ((2, 3, 10, 12), 16, (5, 5), {"padding": 2, "pool": ("max", 2), "activation": "relu"}),
    ((1, 3, 16, 19), 40, (7, 7), {"stride": 2, "padding": 3, "pool": ("max", 3, 2, 1), "activation": "gelu"}),
    ((2, 1, 9, 9), 6, (5, 5), {"pool": ("avg", 2), "activation": "tanh"}),
    ((1, 2, 10, 11), 9, (1, 1), {"pool": ("avg", 3, 2), "activation": "silu"}),
    ((1, 4, 9, 8), 8, (3, 2), {"stride": (1, 2), "dilation": (2, 1), "padding": (2, 0), "activation": "sigmoid"}),
    ((1, 24, 6, 5), 33, (3, 3), {"padding": 1}),
    ((2, 1, 50), 15, (9,), {"stride": 2, "padding": 4, "pool": ("max", 3, 1), "activation": ("leaky_relu", 0.3)}),
    ((1, 2, 37), 5, (4,), {"padding": "causal", "dilation": 3, "pool": ("max", 2, 3), "activation": "silu"}),
]


def formats(cases, dtypes):
    """The cases in every dtype (those of many channels not in bfloat16), images channels_last too."""
    for case in cases:
        for dtype in dtypes:
            if len(case) == 3 or case[1] <= 32 or dtype != torch.bfloat16:
                yield *case, dtype, False
                if len(case[0]) == 4 and dtype != torch.bfloat16:
                    yield *case, dtype, True


@pytest.mark.parametrize(
    ("shape", "channels", "kernel", "options", "dtype", "channels_last"), formats(STEMS, SUFFIX), ids=str
)
def test_few_channels(shape, channels, kernel, options, dtype, channels_last, native):
    tensors = problem(shape, channels, kernel, dtype)
    if channels_last:
        tensors["x"] = tensors["x"].contiguous(memory_format=torch.channels_last)
    check(tensors, **options)


# batch, channels, size; kernel; options
DEPTHWISE = [
    ((2, 8, 9, 7), (3, 3), {"padding": 1, "activation": "silu"}),
    ((1, 16, 5, 6), (3, 3), {}),
    ((2, 24, 8, 9), (3, 3), {"stride": 2, "padding": 1, "activation": "relu"}),
    ((1, 5, 9, 8), (3, 2), {"stride": (3, 1), "dilation": (1, 2), "padding": (2, 1), "activation": "gelu"}),
    ((2, 3, 40), (4,), {"padding": "causal", "activation": "silu"}),
    ((2, 3, 33), (3,), {"stride": 2, "padding": 5, "dilation": 2}),
]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("shape", "kernel", "options", "dtype", "channels_last"), formats(DEPTHWISE, SUFFIX), ids=str)
def test_depthwise(shape, kernel, options, dtype, channels_last, residual, native):
    tensors = problem(shape, shape[1], kernel, dtype, groups=shape[1])
    if channels_last:
        tensors["x"] = tensors["x"].contiguous(memory_format=torch.channels_last)
    check(tensors, residual=residual, groups=shape[1], **options)


def test_taller_depthwise_kernels(native):
    tensors = problem((1, 8, 9, 8), 8, (7, 7), torch.float16, groups=8)
    tensors["x"] = tensors["x"].contiguous(memory_format=torch.channels_last)
    check(tensors, padding=3, groups=8)
    check(problem((1, 2, 9, 8), 2, (5, 5), torch.float32, groups=2), padding=1, groups=2)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "scale", "x shift"], ids=str)
def test_only_what_is_wanted(wanted, native):
    for shape, channels, groups, pool in (((1, 3, 8, 8), 4, 1, ("max", 2)), ((1, 4, 6, 6), 4, 4, None)):
        tensors = problem(shape, channels, (3, 3), torch.float32, groups=groups)
        check(tensors, wanted.split(), groups=groups, pool=pool, activation="relu")


def test_integers_are_exact(native):
    for groups, channels in ((1, 8), (4, 4)):
        tensors = problem((2, 4, 8, 9), channels, (3, 3), torch.float16, groups=groups, extra=("bias",), integer=True)
        wanted = {"x", "weight", "bias", "integer"}
        found, exact = (
            gradients(*how, tensors, wanted, groups=groups, padding=1)[1]
            for how in (("cuda", torch.float16), ("torch", torch.float64))
        )
        for actual, truth in zip(found, exact):
            assert torch.equal(actual.double(), truth)


def test_the_first_of_equals_gets_the_gradient(native):
    tensors = {"x": torch.ones(1, 1, 6, 6), "weight": torch.ones(1, 1, 1, 1)}
    options = {"pool": ("max", 3, 2, 1), "activation": "leaky_relu"}
    found, exact = (gradients(how, torch.float32, tensors, {"x"}, **options)[1][0] for how in ("cuda", "torch"))
    assert torch.equal(found, exact)


def test_nothing_outside_leaks(native):
    """NaNs in rows of x that no window reaches, and a gradient that is expanded."""
    tensors = problem((1, 2, 12, 12), 4, (3, 3), torch.float32, extra=("bias",))
    tensors["x"][:, :, 11] = tensors["x"][:, :, :, 11] = torch.nan
    for t in (leaves := [t.clone().requires_grad_() for t in tensors.values()]):
        assert t.requires_grad
    found, exact = (
        torch.autograd.grad(bmk.conv(*leaves, stride=2, backend=backend).sum(), leaves[1:])
        for backend in ("cuda", "torch")
    )
    for actual, truth in zip(found, exact):
        torch.testing.assert_close(actual, truth)


def test_same_bits_in_any_order(native):
    stem = problem((2, 3, 10, 12), 16, (5, 5), torch.float16)
    depthwise = problem((2, 8, 9, 7), 8, (3, 3), torch.float16, groups=8)
    for tensors, options in ((stem, {"pool": ("max", 3, 2, 1)}), (depthwise, {"groups": 8})):
        runs = []
        for seed in range(3):
            native.how = {"seed": seed}
            runs.append(gradients("cuda", torch.float16, tensors, set(tensors), activation="relu", **options)[1])
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


RACY = {
    "few channels": ((2, 3, 10, 12), 16, (5, 5), {"padding": 2, "pool": ("max", 3, 2, 1), "activation": "relu"}),
    "depthwise": ((2, 8, 9, 7), 8, (3, 3), {"padding": 1, "groups": 8, "activation": "silu"}),
}


@pytest.mark.parametrize("case", RACY)
def test_no_races(case, native):
    shape, channels, kernel, options = RACY[case]
    native.how = {"detect": "races", "seed": 1}
    check(problem(shape, channels, kernel, torch.float16, groups=options.get("groups", 1)), **options)


@pytest.mark.parametrize(
    ("case", "file", "barrier"),
    [
        ("few channels", "conv_stem_backward.cuh", "before the tile is overwritten"),
        ("few channels", "conv_stem_backward.cuh", "input and gradients have come"),
        ("depthwise", "conv_depthwise_weights.cuh", "every warp's sums are there"),
    ],
)
def test_every_barrier_is_needed(case, file, barrier, native, monkeypatch):
    shape, channels, kernel, options = RACY[case]
    tensors = problem(shape, channels, kernel, torch.float16, groups=options.get("groups", 1))
    monkeypatch.setattr(cuda, "_splits", lambda *sizes: 1)
    native.how = {"detect": "races"}
    plant, run = (file, f"__syncthreads();  // {barrier}", ""), native.run

    def run_planted(programs, kernel, *rest, **sizes):
        native.edit = plant if "_weights" in kernel else None
        run(programs, kernel, *rest, **sizes)

    monkeypatch.setattr(native, "run", run_planted)
    with pytest.raises(EmulatorError, match=r"race in|never written"):
        gradients("cuda", torch.float16, tensors, {"weight"}, **options)
