"""The vector functions and the product that all CPU kernels are made of, for every instruction set this machine has."""

import os
import subprocess
import sys

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels import testing

native = torch.ops.bigmodel_native

# One tile is 8 x 48 (AVX-512) or 6 x 16 (AVX2) floats; the depth is walked in blocks of 384.
SIZES = [
    (0, 3, 4),
    (3, 0, 4),
    (3, 4, 0),
    (1, 1, 1),
    (7, 13, 5),
    (8, 16, 48),
    (9, 17, 49),
    (96, 384, 47),
    (97, 385, 96),
    (5, 1000, 33),
]


def worst_ulp(actual, exact, dtype):
    step = torch.finfo(dtype).eps * exact.abs().clamp_min(torch.finfo(dtype).tiny / torch.finfo(dtype).eps)
    return ((actual.double() - exact.double()).abs() / step.double()).max().item()


@pytest.mark.parametrize("name", ["exp", "tanh", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_function_is_within_three_ulp(name, dtype):
    limit = 80 if dtype == torch.float32 else 700
    x = torch.cat(
        [torch.linspace(-limit, limit, 50_001), torch.linspace(-1, 1, 50_001), torch.tensor([0.0, 1e-30])]
    ).to(dtype)
    actual = native.unary(x, name)
    exact = (
        getattr(torch, name)(x.double()) if dtype == torch.float32 else torch.from_numpy(long_double(name, x.numpy()))
    )
    assert worst_ulp(actual, exact, dtype) <= 3


def long_double(name, x):
    import numpy as np

    x = x.astype(np.longdouble)
    values = {"exp": lambda: np.exp(x), "tanh": lambda: np.tanh(x), "sigmoid": lambda: 1 / (1 + np.exp(-x))}[name]()
    return values.astype(np.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_keep_the_meaning_of_infinities_and_nan(dtype):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30], dtype=dtype)
    for name in ("exp", "tanh", "sigmoid"):
        torch.testing.assert_close(native.unary(x, name), getattr(torch, name)(x), equal_nan=True)


@pytest.mark.parametrize(("dtype", "mantissa"), [(torch.float32, 23), (torch.float64, 52)])
def test_a_nan_stays_one_whatever_its_bits(dtype, mantissa):
    words = torch.int32 if dtype == torch.float32 else torch.int64
    size = torch.iinfo(words).bits
    exponent = ((1 << (size - 1 - mantissa)) - 1) << mantissa
    generator = torch.Generator().manual_seed(0)
    payload = torch.randint(1, 1 << mantissa, (20_000,), dtype=words, generator=generator)
    payload[:mantissa] = 1 << torch.arange(mantissa, dtype=words)
    signs = torch.where(torch.arange(20_000) % 2 == 0, 0, torch.iinfo(words).min).to(words)
    x = (payload | exponent | signs).view(dtype)
    assert x.isnan().all()
    for name in ("exp", "tanh", "sigmoid"):
        assert native.unary(x, name).isnan().all(), name
    x = x.view(-1, 1).expand(-1, 3).clone()
    x[:, 1:] = 1.0
    target = torch.zeros(len(x), dtype=torch.int64)
    assert bmk.cross_entropy(x, target, reduction="none", backend="cpu").isnan().all()
    keys = x[:, :1].reshape(40, 1, 500, 1)
    ones = torch.ones(40, 1, 2, 1, dtype=dtype)
    assert bmk.attention(ones, keys, torch.ones_like(keys), backend="cpu").isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_product(size, dtype, layout):
    m, k, n = size
    a = testing.make(m, k, dtype=dtype, seed=1, layout=layout)
    b = testing.make(k, n, dtype=dtype, seed=2, layout=layout)
    testing.assert_matches(native.gemm(a, b), a.double() @ b.double(), a @ b, dtype=dtype, name="product")


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_product_of_integers_is_exact(size):
    m, k, n = size
    a, b = testing.make(m, k, integer=True, seed=3), testing.make(k, n, integer=True, seed=4)
    assert torch.equal(native.gemm(a, b), (a.double() @ b.double()).float())


def test_product_does_not_depend_on_the_number_of_threads():
    a, b = testing.make(301, 777), testing.make(777, 155, seed=1)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(native.gemm(a, b))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_lower_instruction_sets(isa):
    """The same checks in a process that is held to a lower instruction set."""
    environment = os.environ | {"BIGMODEL_ISA": isa}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "not lower_instruction_sets",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def test_bad_arguments_are_refused():
    a = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match=r"b must have shape \(k, n\) = \[3, 4\], got \[4, 4\]"):
        native.gemm(a, torch.ones(4, 4))
    with pytest.raises(RuntimeError, match="b must have the dtype of a"):
        native.gemm(a, torch.ones(3, 4, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="a must have 2 dimensions"):
        native.gemm(torch.ones(2), a)
    with pytest.raises(RuntimeError, match="float32, float64 and bfloat16"):
        native.gemm(a.half(), torch.ones(3, 4).half())
    with pytest.raises(RuntimeError, match="name must be exp, tanh or sigmoid"):
        native.unary(a, "log")
