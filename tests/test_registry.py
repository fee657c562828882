"""The choice of a backend, and the reasons it gives, on an op made for the test."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bigmodel_kernels as bmk
from bigmodel_kernels import _extension, _library, _registry


def _fake(x, scales, n):
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _fake_backward(dy, saved, x, scales, n):
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _gradients(op, args, outputs, grads, needs, backend):
    dx, dscale = op.bwd(grads[0], outputs[1], *args, backend)
    return dx, [dscale, None], None


def _formula(x, scales, n):
    return (x * scales[0] + scales[1].detach()) * n, None


scaled = _library.Op(
    "scaled",
    "(Tensor x, Tensor[] scales, int n) -> (Tensor y, Tensor saved)",
    "(Tensor dy, Tensor saved, Tensor x, Tensor[] scales, int n) -> (Tensor dx, Tensor dscale)",
    fake_fwd=_fake,
    fake_bwd=_fake_backward,
    prefer=lambda x, scales, n: ("cpu", "torch") if x.shape[0] > 1 else ("torch", "cpu"),
    backward=_gradients,
    differentiable=_formula,
    results=1,
)


def call(x, *scales, n=3, backend="auto"):
    return scaled(x, list(scales), n, backend=backend)[0]


call.prepare = lambda x, *scales, n=3: (x, list(scales), n)
call.op = scaled


@pytest.fixture
def ran(monkeypatch):
    """Backends `cpu` (refuses n > 5) and `torch`; the names of those that ran, in order."""
    ran = []

    def backend(name, refuses):
        def fwd(x, scales, n):
            ran.append(name)
            return (x * scales[0] + scales[1]) * n, x.clone()

        def bwd(dy, saved, x, scales, n):
            ran.append(name + " backward")
            return dy * scales[0] * n, dy * saved * n

        def supports(x, scales, n):
            return f"n is {n}, at most 5 here" if refuses and n > 5 else None

        return SimpleNamespace(
            supports=supports, fwd=fwd, bwd=bwd, call=lambda *args: (ran.append(name), _formula(*args))[1]
        )

    modules = {"cpu": backend("cpu", True), "torch": backend("torch", False)}

    def missing(op, name):
        return None if name in modules else f"this version has no {name} kernel of {op}"

    monkeypatch.setattr(_registry, "availability", missing)
    monkeypatch.setattr(_registry, "module", lambda op, name: modules[name])
    return ran


def tensors(rows=4, **options):
    return [torch.randn(rows, 5, dtype=torch.float64, **options) for _ in range(3)]


def test_auto_takes_the_first_preferred_backend_that_can(ran):
    call(*tensors())
    call(*tensors(), n=7)  # cpu refuses
    call(*tensors(rows=1))  # torch is preferred
    assert ran == ["cpu", "torch", "torch"]


def test_an_explicit_backend_never_falls_back(ran):
    with pytest.raises(RuntimeError) as raised:
        call(*tensors(), n=7, backend="cpu")
    message = str(raised.value)
    assert "backend 'cpu' cannot run this call: n is 7, at most 5 here" in message
    assert "torch: ok" in message
    assert "this version has no triton kernel of scaled" in message
    with pytest.raises(RuntimeError, match="no cuda kernel"):
        call(*tensors(), backend="cuda")


@pytest.mark.parametrize("name", ["Torch", "", "gpu", None, 3])
def test_an_unknown_backend_is_named_with_the_known_ones(ran, name):
    with pytest.raises(ValueError, match=r"backend must be one of auto, cpu, cuda, triton, torch; got"):
        call(*tensors(), backend=name)
    with pytest.raises(ValueError, match="name must be one of"), bmk.use_backend(name):
        pass


def test_use_backend_holds_for_its_block_and_nests(ran):
    with bmk.use_backend("torch"):
        call(*tensors())
        with bmk.use_backend("auto"):
            call(*tensors())
        call(*tensors(), backend="cpu")  # a call's own word goes before the block's
    call(*tensors())
    assert ran == ["torch", "cpu", "cpu", "cpu"]


def test_forward_and_backward_run_on_the_same_backend(ran):
    x, *scales = tensors(requires_grad=True)
    call(x, *scales).sum().backward()
    assert ran == ["cpu", "cpu backward"]


def test_gradients_of_gradients(ran):
    inputs = tensors(requires_grad=True)
    inputs[2].requires_grad_(False)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_compiled_call_chooses_on_real_tensors(ran):
    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    x, *scales = tensors(requires_grad=True)
    compiled(x, *scales).sum().backward()
    with bmk.use_backend("torch"):
        compiled(x, *scales)
    assert ran == ["cpu", "cpu backward", "torch"]


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(ran, requires_grad):
    x, *scales = tensors(requires_grad=requires_grad)
    torch.library.opcheck(torch.ops.bigmodel_kernels.scaled_fwd.default, (x, scales, 3, "auto"))


def test_explain_gives_the_choice_and_every_reason(ran):
    explanation = bmk.explain(call, *tensors(), n=7)
    assert explanation.backend == "torch"
    assert explanation.reasons["cpu"] == "n is 7, at most 5 here"
    assert explanation.reasons["torch"] == "chosen"
    assert "no cuda kernel" in explanation.reasons["cuda"]
    assert not ran
    assert "measured slower than cpu" in bmk.explain(call, *tensors()).reasons["torch"]


def test_explain_of_a_model_lists_its_calls(ran):
    explanation = bmk.explain(lambda x, *s: call(x, *s) + call(x, *s, n=9), *tensors())
    assert [c.backend for c in explanation.calls] == ["cpu", "torch"]
    assert explanation.backend == "cpu+torch"
    assert "scaled: cpu" in str(explanation)


def test_threads_do_not_share_the_choice(ran):
    from concurrent.futures import ThreadPoolExecutor

    def run(name):
        with bmk.use_backend(name):
            return bmk.explain(call, *tensors()).backend

    with ThreadPoolExecutor(8) as pool:
        names = ["torch", "cpu"] * 100
        assert list(pool.map(run, names)) == names


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "auto"),
        ({"BIGMODEL_BACKEND": "torch"}, "torch"),
        ({"BIGMODEL_DISABLE": "1", "BIGMODEL_BACKEND": "cpu"}, "torch"),
    ],
)
def test_environment(environment, expected):
    code = "from bigmodel_kernels import _registry; print(_registry._environment)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)
    assert done.stdout.strip() == expected


def test_unknown_backend_in_the_environment_is_refused():
    environment = os.environ | {"BIGMODEL_BACKEND": "tpu"}
    done = subprocess.run(
        [sys.executable, "-c", "import bigmodel_kernels"], env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "BIGMODEL_BACKEND must be one of auto, cpu, cuda, triton, torch; got 'tpu'" in done.stderr


def test_log_names_each_signature_once():
    code = (
        "import torch, bigmodel_kernels as bmk\n"
        "q = torch.randn(1, 2, 16, 8)\n"
        "for _ in range(3): bmk.attention(q, q, q, backend='torch')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"BIGMODEL_LOG": "1"}, capture_output=True, text=True
    )
    assert done.stderr.count("attention -> torch") == 1, done.stderr


def test_import_is_lean():
    code = (
        "import sys, torch; before = set(sys.modules); import bigmodel_kernels\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not new & {'triton', 'matplotlib', 'rich', 'numpy', 'sklearn', 'bigmodel_models'}, new\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_plain_eager_calls_go_straight_to_the_backend_and_all_others_through_the_operators(ran):
    """A mode that watches operators, such as a FLOP counter, a profiler or a tracer, must see one opaque operator."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    x, *scales = tensors(requires_grad=True)
    with Watch():
        call(x, *scales, backend="cpu").sum().backward()
    assert "bigmodel_kernels.scaled_fwd.default" in seen
    assert "bigmodel_kernels.scaled_bwd.default" in seen
    watched = [t.grad.clone() for t in (x, *scales) if t.grad is not None]
    with torch.no_grad():
        for t in (x, *scales):
            t.grad = None
    call(x, *scales, backend="cpu").sum().backward()
    assert ran == ["cpu", "cpu backward"] * 2
    assert all(torch.equal(a, t.grad) for a, t in zip(watched, (t for t in (x, *scales) if t.grad is not None)))


def test_torch_func_takes_gradients(ran):
    x, *scales = tensors()
    grad = torch.func.grad(lambda x: call(x, *scales, backend="cpu").sum())(x)
    x.requires_grad_()
    call(x, *scales, backend="cpu").sum().backward()
    torch.testing.assert_close(grad, x.grad)


def test_lack_of_memory_is_told_as_pytorch_tells_it():
    x = torch.ones(2_000_000, 1)  # a product of 16 terabytes
    with pytest.raises(RuntimeError, match=r"linear: DefaultCPUAllocator: can't allocate memory"):
        bmk.linear(x, x, backend="cpu")
    other = RuntimeError("torch_call_dispatcher(aten::fill_) API call failed")
    assert _extension.lack_of_memory(other, "linear", (x,)) is None
    assert _extension.lack_of_memory(RuntimeError("empty input"), "linear", (x,)) is None


def test_what_older_compilers_do_not_trace_is_not_asked_in_a_call(monkeypatch):
    """torch.compile of 2.11 stops at is_autocast_available."""
    monkeypatch.setattr(torch.amp, "is_autocast_available", None)
    assert bmk.linear(torch.ones(2, 3), torch.ones(4, 3)).shape == (2, 4)


X, W = torch.randn(2, 4, 8, 8), torch.randn(8, 8)
ONE_TENSOR_TWICE = {
    "attention": lambda x: bmk.attention(x, x, x),
    "linear": lambda x: bmk.linear(x, W, residual=x),
    "layer_norm": lambda x: bmk.layer_norm(x, residual=x)[0],
    "rms_norm": lambda x: bmk.rms_norm(x),
    "bias_act": lambda x: bmk.bias_act(x, None, residual=x),
    "lstm_cell": lambda x: bmk.lstm_cell(x[0, 0], (x[0, 1], x[0, 1]), torch.ones(32, 8) / 9, torch.ones(32, 8) / 9)[0],
}


@pytest.mark.parametrize("call", ONE_TENSOR_TWICE.values(), ids=ONE_TENSOR_TWICE)
def test_a_compiled_call_may_be_given_a_tensor_twice(call):
    """The compiler refused it; and a normalisation without weight or sum met an empty gradient of the sum it does not return."""
    torch._dynamo.reset()
    results = []
    for run in (call, torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")):
        x = X.clone().requires_grad_()
        y = run(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
