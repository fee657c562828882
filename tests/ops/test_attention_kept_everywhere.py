"""What the CPU's forward in bfloat16 keeps for its backward comes through every way to a gradient: eager calls, torch.compile,
torch.func, modes, the operators themselves; and any backend may stand on either side."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import bigmodel_kernels as bmk
from bigmodel_kernels import _cpu
from bigmodel_kernels.ops.attention import cpu
from bigmodel_kernels.ops.attention.op import PROBABILITIES, REST
from bigmodel_kernels.testing import make
from tests.ops.attention_problem import Problem, Sequences
from tests.rerun import rerun

SIZES = [
    (1, 2, 2, 70, 400, 24, 40),
    (2, 4, 2, 40, 450, 64, 64),  # heads that share keys
    (1, 2, 2, 60, 130, 64, 64),  # probabilities
]
FEW_KEYS = {400: [3, 205], 450: [0, 449], 130: [3, 60, 129]}


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch._dynamo.reset()


def peaked(sizes, masked):
    problem = Problem(sizes, "plain", torch.bfloat16)
    problem.options["scale"] = 2.0 if masked else 30.0
    if masked:
        problem.mask = torch.zeros(1, 1, 1, sizes[4], dtype=torch.bool)
        problem.mask[..., FEW_KEYS[sizes[4]]] = True
    return problem


def by_autograd(function, tensors, grad):
    leaves = [t.detach().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*leaves), leaves, grad)


def by_pullback(function, tensors, grad):
    return torch.func.vjp(function, *tensors)[1](grad)


def by_a_mode(function, tensors, grad):
    with FlopCounterMode(display=False):
        return by_autograd(function, tensors, grad)


def compiled(**options):
    def run(function, tensors, grad):
        return by_autograd(torch.compile(function, fullgraph=True, **options), tensors, grad)

    return run


WAYS = {
    "inductor": compiled(),
    "aot_eager": compiled(backend="aot_eager"),
    "dynamic": compiled(backend="aot_eager", dynamic=True),
    "mode": by_a_mode,
    "vjp": by_pullback,
}


def check(problem, found):
    exact, sizes = problem.exact(with_grad_lse=False)
    for name, a, e, size in zip(("dq", "dk", "dv"), found, exact[2:], sizes[2:], strict=True):
        error, cap = (a.double() - e).norm().item(), 6e-3 * e.norm().item() + 1e-6 * size.norm().item()
        assert error <= cap, f"{name}: {error:.1e} past {cap:.1e}"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_peaked_rows(sizes, masked, way):
    """Gradients by the error rule, and the bits of an eager call."""
    problem = peaked(sizes, masked)
    tensors = problem.q, problem.k, problem.v

    def call(q, k, v):
        return bmk.attention(q, k, v, attn_mask=problem.mask, backend="cpu", **problem.options)

    found = WAYS[way](call, tensors, problem.grad_out)
    check(problem, found)
    for a, b in zip(found, by_autograd(call, tensors, problem.grad_out)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("way", ["eager", "dynamic", "vjp"])
@pytest.mark.parametrize("options", [{"scale": 30.0}, {"scale": -30.0}, {"scale": 8.0, "window": (2, 0)}], ids=str)
@pytest.mark.parametrize(
    "lengths", [[(70, 400)], [(3, 900), (40, 450), (50, 60), (0, 7), (65, 300), (1, 200)]], ids=str
)
def test_peaked_rows_of_sequences(lengths, options, way):
    """Alone, and beside sequences of which nothing is kept; with few rows and many."""
    problem = Sequences(lengths, (2, 2, 24, 40), "plain", torch.bfloat16)
    problem.options.update(options)
    for one in problem.problems:
        one.options.update(options)
    grad = torch.cat([p.grad_out[0].transpose(0, 1) for p in problem.problems])
    run = by_autograd if way == "eager" else WAYS[way]
    found = run(lambda *tensors: problem.call(*tensors, backend="cpu"), problem.tensors, grad)
    ends = [ends[1:-1].long() for ends in problem.cu_seqlens]
    parts = [t.tensor_split(e) for t, e in zip(found, (ends[0], ends[1], ends[1]))]
    for one, *of_one in zip(problem.problems, *parts):
        check(one, [t.transpose(0, 1)[None] for t in of_one])


def calls():
    """Arguments of calls of which something is kept, and of others."""
    sizes = [
        *((1, 2, 2, 60, keys, 32, 48) for keys in (0, 1, 40, 192, 193, 400)),
        (2, 4, 2, 15, 64, 16, 16),
        (2, 4, 2, 16, 64, 16, 16),
        (1, 2, 2, 192, 192, 32, 32),  # more than q, k, v and out take
        (0, 2, 2, 60, 300, 16, 16),
        (1, 2, 2, 0, 64, 16, 16),
    ]
    for B, Hq, Hkv, Sq, Sk, D, Dv in sizes:
        for dtype in (torch.bfloat16, torch.float32):
            q, k, v = (
                make(B, Hq, Sq, D, dtype=dtype),
                make(B, Hkv, Sk, D, dtype=dtype),
                make(B, Hkv, Sk, Dv, dtype=dtype),
            )
            for dropout_p, softcap, record in ((0.0, 0.0, True), (0.0, 0.0, False), (0.3, 0.0, True), (0.0, 2.0, True)):
                options = {"dropout_p": dropout_p, "softcap": softcap, "enable_gqa": True}
                args = list(bmk.attention.prepare(q.requires_grad_(record), k, v, **options))
                args[5] = torch.tensor([3]) if dropout_p else None
                yield [a.detach() if isinstance(a, torch.Tensor) else a for a in args]


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_the_operator_gives_what_its_fake_tells(backend):
    for args in calls():
        actual = torch.ops.bigmodel_kernels.attention_fwd(*args, backend)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
            told = torch.ops.bigmodel_kernels.attention_fwd(*fakes, backend)
        for a, t in zip(actual, told, strict=True):
            assert (a.shape, a.dtype) == (t.shape, t.dtype)
            assert a.stride() == t.stride() or a.numel() == 0
        # And for what the backend keeps, which is no probabilities where there are no dot products.
        keeps = args[-1] == REST or (args[-1] == PROBABILITIES and _cpu.dot_products())
        assert (len(cpu.fwd(*args)) == 3) == keeps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_the_operator_of_sequences_gives_what_its_fake_tells(backend, save, dtype):
    q, k, ends = make(70, 2, 16, dtype=dtype), make(700, 2, 16, dtype=dtype), torch.tensor([[0, 30, 70], [0, 300, 700]])
    args = (q, k, k, *ends, None, None, 40, 400, 0.3, 0.0, 0.0, -1, -1, False, False, False, save, backend)
    actual = torch.ops.bigmodel_kernels.attention_varlen_fwd(*args)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
        told = torch.ops.bigmodel_kernels.attention_varlen_fwd(*fakes)
    for a, t in zip(actual, told, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (t.shape, t.stride(), t.dtype)
    assert (actual[2].numel() > 0) == (save and dtype == torch.bfloat16)


@pytest.mark.parametrize("keys", [128, 400])
def test_opcheck(keys):
    q, k, v = (make(1, 2, n, 32, dtype=torch.bfloat16, seed=n).requires_grad_() for n in (48, keys, keys))
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in bmk.attention.prepare(q, k, v)]
    assert args[-1] == (REST if keys > 192 else PROBABILITIES)
    out, lse, kept = torch.ops.bigmodel_kernels.attention_fwd(*args, "cpu")
    # Where nothing is kept but a place for it has to be given, that holds anything behind its first number.
    some = () if keys > 192 or _cpu.dot_products() else ("test_schema", "test_autograd_registration", "test_faketensor")
    options = {"test_utils": some} if some else {}
    torch.library.opcheck(torch.ops.bigmodel_kernels.attention_fwd.default, (*args, "cpu"), **options)
    backward = (torch.ones_like(out), None, out, lse, kept, False, *args, "cpu")
    torch.library.opcheck(torch.ops.bigmodel_kernels.attention_bwd.default, backward)


def test_a_compiled_call_that_records_nothing_keeps_nothing():
    told = []

    def look(graph, inputs):
        def run(*inputs):
            for node in graph.graph.nodes:
                if "attention_fwd" in str(node.target):
                    told.append(node.args[-2])
            return graph(*inputs)

        return run

    q = make(1, 2, 300, 16, dtype=torch.bfloat16)
    call = torch.compile(lambda q: bmk.attention(q, q, q, backend="cpu"), fullgraph=True, backend=look)
    call(q)
    with torch.no_grad():
        call(q.requires_grad_())
    args = (q.detach(), q.detach(), q.detach(), None, None, None, 0.3, 0.0, 0.0, -1, -1, False, False, False, 0)
    assert torch.ops.bigmodel_kernels.attention_fwd(*args, "cpu")[2].numel() == 0
    assert told == [0, 0]


@pytest.mark.parametrize("varlen", [False, True])
def test_a_number_of_keys_that_the_compiler_does_not_know(varlen):
    def attend(q, keys, count):
        count = count.item()
        torch._check(count <= keys.shape[-2])
        if not varlen:
            k = keys.narrow(2, 0, count)
            return bmk.attention(q, k, k, backend="cpu")
        ends = torch.tensor([0, q.shape[2]]), torch.tensor([0, keys.shape[2]])
        q, k = q[0].transpose(0, 1), keys[0].transpose(0, 1)
        return bmk.attention_varlen(q, k, k, *ends, q.shape[0], count, backend="cpu")

    q, keys = make(1, 2, 60, 16, dtype=torch.bfloat16), make(1, 2, 300, 16, dtype=torch.bfloat16)
    found = []
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
            leaf = q.clone().requires_grad_()
            (dq,) = torch.autograd.grad(function(leaf, keys, torch.tensor(300)).square().sum(), leaf)
            found.append(dq)
    torch.testing.assert_close(*found, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("forward", ["cpu", "torch"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_other_half_may_be_of_another_backend(sizes, forward):
    """A compiled graph asks for the backend at every operator: what a forward of PyTorch's leaves out must be read as nothing."""
    problem = Problem(sizes, "plain", torch.bfloat16)
    args = (*problem.arguments(torch.bfloat16)[:-1], REST if sizes[4] > 192 else PROBABILITIES)
    outputs = torch.ops.bigmodel_kernels.attention_fwd(*args, forward)
    backward = "torch" if forward == "cpu" else "cpu"
    found = torch.ops.bigmodel_kernels.attention_bwd(problem.grad_out, None, *outputs, False, *args, backward)
    check(problem, found[:3])


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "amx_emulated"])
def test_every_instruction_set(isa):
    if isa == "amx_emulated" and bmk.build_info()["isa"] not in ("avx512_bf16", "amx"):
        pytest.skip(f"this CPU has {bmk.build_info()['isa']}")
    rerun(__file__, "(peaked and (mode or vjp or -eager)) or tells or other_half", isa)
