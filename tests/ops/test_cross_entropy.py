"""bmk.cross_entropy: contract, PyTorch's op, the CPU kernels, and the Triton kernels interpreted and compiled."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F

import bigmodel_kernels as bmk
from bigmodel_kernels.ops.cross_entropy import triton_kernels
from bigmodel_kernels.testing import make
from tests.ops.fused import DTYPES, check, check_compiled, check_compiles_for, check_operators, run
from tests.triton_interpreter import interpreted

SHAPES = [(1, 2), (3, 5), (7, 64), (2, 65), (20, 100), (2, 5000)]
OPTIONS = {
    "mean": {},
    "sum": {"reduction": "sum", "label_smoothing": 0.1},
    "none": {"reduction": "none", "ignore_index": 1},
    "smooth": {"label_smoothing": 0.3, "ignore_index": 0},
}


def problem(rows, classes, seed=0, scale=3.0, **options):
    """(function of the logits, [logits in float64], targets)."""
    logits = make(rows, classes, dtype=torch.float64, seed=seed) * scale
    target = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(seed))
    target[0] = classes - 1  # one that counts

    def function(z, backend="auto"):
        return bmk.cross_entropy(z, target, **options, backend=backend)

    return function, [logits], target


def check_problem(shape, options, dtype, seed=0, backend="triton"):
    check(*problem(*shape, seed=seed, **OPTIONS[options])[:2], dtype, backend)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_matches_float64(shape, dtype, options):
    interpreted(check_problem, shape, options, dtype)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_triton_with_other_numbers(seed):
    interpreted(check_problem, (33, 77), "smooth", torch.float32, seed)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (300, 10), (3, 9001)], ids=str)
def test_cpu_matches_float64(shape, dtype, options):
    check_problem(shape, options, dtype, backend="cpu")


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("options", OPTIONS)
def test_cpu_with_other_numbers(options, seed):
    check_problem((133, 277), options, torch.float32, seed, "cpu")


def test_cpu_gives_the_same_bits_for_any_number_of_threads():
    function, tensors, _ = problem(500, 97, label_smoothing=0.1)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(run(function, tensors, torch.float32, "cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0][0], results[1][0][0])
    assert torch.equal(results[0][1][0], results[1][1][0])


@pytest.mark.parametrize("target", [[1, 4], [-1, 0]])
def test_cpu_raises_for_a_target_that_is_no_class_as_torch_does(target):
    z, target = make(2, 4), torch.tensor(target)
    with pytest.raises(IndexError) as expected:
        F.cross_entropy(z, target)
    with pytest.raises(IndexError) as found:
        bmk.cross_entropy(z, target, backend="cpu")
    assert str(found.value) == str(expected.value)


def check_layouts_and_values(backend):
    target = torch.tensor([1, 0, 3])
    z = make(3, 4) * 2
    wanted = F.cross_entropy(z, target, reduction="none")
    for t in (z.mT.contiguous().mT, torch.cat([z, z], 1)[:, :4], z[:1].expand(3, 4)):
        ours = bmk.cross_entropy(t, target, reduction="none", backend=backend)
        torch.testing.assert_close(ours, F.cross_entropy(t, target, reduction="none"))
    for shift in (1e4, -1e4):  # only differences count
        ours = bmk.cross_entropy(z + shift, target, reduction="none", backend=backend)
        torch.testing.assert_close(ours, wanted, rtol=1e-2, atol=1e-2)
    for value in (math.nan, math.inf, -math.inf):
        one = z.clone()
        one[0, 2] = value
        ours = bmk.cross_entropy(one, target, reduction="none", backend=backend)
        torch.testing.assert_close(ours, F.cross_entropy(one, target, reduction="none"), equal_nan=True)
    assert bmk.cross_entropy(z[0], target[0], backend=backend).shape == ()
    none = torch.full_like(target, -100)
    assert bmk.cross_entropy(z, none, backend=backend).isnan()
    leaf = z.clone().requires_grad_()
    bmk.cross_entropy(leaf, none, reduction="sum", backend=backend).backward()
    assert torch.equal(leaf.grad, torch.zeros_like(z))


def test_layouts_and_values_that_are_not_finite():
    check_layouts_and_values("cpu")
    interpreted(check_layouts_and_values, "triton")


def check_no_class():
    wrong = bmk.cross_entropy(make(3, 4), torch.tensor([1, 4, -1]), reduction="none", backend="triton")
    assert wrong.isnan().tolist() == [False, True, True]


def test_triton_gives_nan_for_a_target_that_is_no_class():
    interpreted(check_no_class)


def pair_inputs(dtype=torch.float64, **options):
    function, (logits,), target = problem(4, 6, **options)
    return function, list(bmk.cross_entropy.prepare(logits.to(dtype), target, **options))


@pytest.mark.parametrize("options", OPTIONS)
def test_reference_agrees_with_autograd(options):
    function, args = pair_inputs(**OPTIONS[options])
    (loss,), (d_logits,) = run(function, [args[0]], torch.float64, "torch")
    op = torch.ops.bigmodel_kernels
    found, parts = op.cross_entropy_fwd(*args, "torch")
    torch.testing.assert_close(found.view_as(loss), loss)
    torch.testing.assert_close(parts.sum(0), args[0].logsumexp(1))
    d_loss = make(*found.shape, dtype=torch.float64, seed=90)
    torch.testing.assert_close(op.cross_entropy_bwd(d_loss, parts, *args, "torch"), d_logits)


def check_opcheck(backend):
    for options in OPTIONS.values():
        for transposed in (False, True):
            _, args = pair_inputs(torch.float32, **options)
            if transposed:
                args[0] = args[0].mT.contiguous().mT
            check_operators("cross_entropy", args, lambda outputs: (torch.ones_like(outputs[0]), outputs[1]), backend)


def test_opcheck():
    check_opcheck("torch")
    check_opcheck("cpu")
    interpreted(check_opcheck, "triton")


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_gradcheck(backend, options):
    function, tensors, _ = problem(3, 4, **OPTIONS[options])
    leaves = [t.requires_grad_() for t in tensors]
    call = functools.partial(function, backend=backend)
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_compile():
    target = torch.tensor([1, 3, 0, 2])

    def function(z, backend="auto"):
        return bmk.cross_entropy(z, target[: z.shape[0]], label_smoothing=0.1, backend=backend)

    check_compiled(function, [[make(4, 5)], [make(3, 5)]])


def test_torch_is_what_a_user_would_have_written():
    z, target = make(3, 7), torch.tensor([1, -100, 6])
    assert torch.equal(bmk.cross_entropy(z, target), F.cross_entropy(z, target))
    assert bmk.cross_entropy(z, target, reduction="none").shape == (3,)
    assert bmk.explain(bmk.cross_entropy, z, target).backend == "torch"


ERRORS = [
    (TypeError, "logits must be a tensor", dict(logits=None)),
    (TypeError, "target must be a tensor", dict(target=1)),
    (TypeError, "ignore_index must be an int", dict(ignore_index=1.0)),
    (TypeError, "label_smoothing must be a number", dict(label_smoothing=None)),
    (ValueError, "label_smoothing must be from 0 to 1, got 2", dict(label_smoothing=2)),
    (ValueError, "reduction must be one of mean, sum, none; got 'max'", dict(reduction="max")),
    (RuntimeError, "logits must have a floating dtype, got torch.int64", dict(logits=torch.zeros(2, 3).long())),
    (
        RuntimeError,
        r"logits must have shape \[N, C\] or \[C\] with classes, got \[2, 0\]",
        dict(logits=torch.zeros(2, 0)),
    ),
    (RuntimeError, "target must be class indices, torch.int64 on cpu, got torch.float32", dict(target=torch.zeros(2))),
    (RuntimeError, r"target must have shape \[2\], got \[3\]", dict(target=torch.zeros(3).long())),
    (ValueError, "backend must be one of", dict(backend="fast")),
    (RuntimeError, "backend 'cpu' cannot run this call", dict(logits=torch.zeros(2, 3).half(), backend="cpu")),
]


@pytest.mark.parametrize(("kind", "message", "arguments"), ERRORS)
def test_errors(kind, message, arguments):
    with pytest.raises(kind, match=message):
        bmk.cross_entropy(**{"logits": torch.zeros(2, 3), "target": torch.zeros(2, dtype=torch.int64)} | arguments)


def check_far():
    """Rows, and classes, 2^31 elements apart, in memory of which only what is touched exists."""
    far = 2**31 + 64
    target = torch.tensor([1, 0])
    for strides in ((far, 1), (1, far)):
        memory = torch.empty(far + 8, dtype=torch.float16)
        z = memory.as_strided((2, 2), strides)
        z.copy_(make(2, 2, dtype=torch.float16))
        results = []
        for t in (z, z.contiguous()):
            args = bmk.cross_entropy.prepare(t, target)
            loss, parts = triton_kernels.fwd(*args)
            results.append((loss, parts, triton_kernels.bwd(loss, parts, *args)))
        assert all(torch.equal(a, b) for a, b in zip(*results))


def test_offsets_beyond_32_bits():
    interpreted(check_far)


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("classes", "dtype"), [(1024, torch.bfloat16), (50304, torch.float32)])
def test_compiles_within_its_budget(classes, dtype, gpu, monkeypatch):
    logits, target = torch.empty(16, classes, dtype=dtype), torch.zeros(16, dtype=torch.int64)

    def launch():
        args = bmk.cross_entropy.prepare(logits, target, label_smoothing=0.1)
        loss, parts = triton_kernels.fwd(*args)
        triton_kernels.bwd(loss, parts, *args)

    assert len(check_compiles_for(gpu, launch, monkeypatch, 128)) == 2
