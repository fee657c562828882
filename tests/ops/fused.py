"""What the tests of the small fused ops (norm, bias_act, cross_entropy) share."""

import torch

from bigmodel_kernels.testing import assert_matches, make
from tests.triton_aot import SHARED_LIMIT, compiling

DTYPES = [torch.float32, torch.float16]  # those that Triton's interpreter has


def run(function, tensors, dtype, backend, grad_seed=90, upstream_dtype=None):
    """(results, gradients) of function(*tensors, backend=...) in `dtype`; None among the tensors stays.

    The upstream gradients are rounded to `upstream_dtype`, or `dtype`.
    """
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]
    results = function(*leaves, backend=backend)
    results = results if isinstance(results, tuple) else (results,)
    rounded = upstream_dtype or dtype
    upstream = [make(*r.shape, dtype=rounded, seed=grad_seed + i).to(dtype) for i, r in enumerate(results)]
    wanted = [t for t in leaves if t is not None]
    return [r.detach() for r in results], torch.autograd.grad(results, wanted, upstream)


def check(function, tensors, dtype, backend, least=16):
    """The error rule for every result and gradient; `tensors` are in float64.

    Of a result of fewer than `least` elements, torch's largest error is a draw of luck, and no yardstick.
    """
    tensors = [None if t is None else t.to(dtype) for t in tensors]
    exact, ours, theirs = (
        run(function, tensors, *how, upstream_dtype=dtype)
        for how in ((torch.float64, "torch"), (dtype, backend), (dtype, "torch"))
    )
    for gradient in (False, True):
        for i, (e, a, t) in enumerate(zip(exact[gradient], ours[gradient], theirs[gradient])):
            yardstick = t if e.numel() >= least else None
            assert_matches(
                a, e, yardstick, dtype=dtype, gradient=gradient, magnitude=0.1, name=f"{'gradient' * gradient} {i}"
            )


def check_operators(name, args, of_backward, backend):
    """opcheck of both operators; of_backward(outputs of the forward) are the arguments of the backward before `args`."""
    operators = torch.ops.bigmodel_kernels
    fwd, bwd = (getattr(operators, f"{name}_{direction}").default for direction in ("fwd", "bwd"))
    for op, inputs in ((fwd, args), (bwd, (*of_backward(fwd(*args, backend)), *args))):
        torch.library.opcheck(op, (*inputs, backend), test_utils=("test_schema", "test_faketensor"))


def check_compiled(function, tensors):
    """torch.compile(fullgraph=True, dynamic=True) gives what eager gives, with gradients, for two sizes."""
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for some in tensors:
        expected = run(function, some, torch.float32, "auto")
        actual = run(compiled, some, torch.float32, "auto")
        for a, e in zip((*actual[0], *actual[1]), (*expected[0], *expected[1])):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def check_compiles_for(gpu, launch, monkeypatch, registers):
    """What launch() would run on `gpu`: no spills, at most so many registers, 128-bit access to memory."""
    with compiling(gpu, monkeypatch) as binaries:
        launch()
    assert binaries
    for binary in binaries:
        assert binary.spills == 0, binary
        assert binary.registers <= registers, binary
        assert binary.shared <= SHARED_LIMIT["sm_86"], binary
        assert "LDG.E.128" in binary.sass, binary  # the loads were seen to be whole vectors
    return binaries
