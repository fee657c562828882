"""What bmk.attention promises besides numbers: errors, torch.compile, opcheck, gradcheck, layouts, determinism, backends."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import bigmodel_kernels as bmk
from bigmodel_kernels.testing import make

SHAPE = (2, 4, 6, 8)


def qkv(*shape, dtype=torch.float32):
    return tuple(make(*(shape or SHAPE), dtype=dtype, seed=i) for i in range(3))


def with_sizes(q=SHAPE, k=SHAPE, v=SHAPE, **options):
    return lambda: bmk.attention(make(*q), make(*k), make(*v), **options)


def call(**options):
    return lambda: bmk.attention(*qkv(), **options)


ERRORS = [
    ("q is a list", lambda: bmk.attention([1.0], *qkv()[1:]), TypeError, "q must be a tensor"),
    ("v is None", lambda: bmk.attention(*qkv()[:2], None), TypeError, "v must be a tensor"),
    ("integers", lambda: bmk.attention(*(t.long() for t in qkv())), RuntimeError, "q must have a floating dtype"),
    ("integer v", lambda: bmk.attention(*qkv()[:2], qkv()[2].int()), RuntimeError, "v must have a floating dtype"),
    ("dtypes", lambda: bmk.attention(*qkv()[:2], qkv()[2].double()), RuntimeError, "v must be torch.float32"),
    ("devices", lambda: bmk.attention(qkv()[0], qkv()[1].to("meta"), qkv()[2]), RuntimeError, "k must be .* on cpu"),
    ("ranks", with_sizes(k=(4, 6, 8)), RuntimeError, "k and q must have the same"),
    ("rank 1", with_sizes((8,), (8,), (8,)), RuntimeError, "2 or more dimensions"),
    ("batch", with_sizes(k=(3, 4, 6, 8), v=(3, 4, 6, 8)), RuntimeError, "batch dimensions of q"),
    ("head_dim", with_sizes(k=(2, 4, 6, 7)), RuntimeError, "k must have the head dimension of q, 8, got 7"),
    ("length of v", with_sizes(v=(2, 4, 5, 8)), RuntimeError, "v must have as many positions as k, 6, got 5"),
    ("heads of v", with_sizes(v=(2, 2, 6, 8)), RuntimeError, "v must have as many heads as k"),
    ("heads without GQA", with_sizes(k=(2, 2, 6, 8), v=(2, 2, 6, 8)), RuntimeError, "enable_gqa=True, got 2 heads"),
    (
        "GQA of 4 and 3",
        with_sizes(k=(2, 3, 6, 8), v=(2, 3, 6, 8), enable_gqa=True),
        RuntimeError,
        "multiple of the 3 heads",
    ),
    ("mask type", call(attn_mask=[[True]]), TypeError, "attn_mask must be a tensor"),
    (
        "integer mask",
        call(attn_mask=torch.ones(6, 6, dtype=torch.int)),
        RuntimeError,
        "attn_mask must be bool or floating",
    ),
    ("mask size", call(attn_mask=torch.ones(6, 5).bool()), RuntimeError, r"attn_mask must broadcast to \[2, 4, 6, 6\]"),
    ("mask batch", call(attn_mask=torch.ones(3, 1, 6, 6).bool()), RuntimeError, "attn_mask must broadcast"),
    ("mask device", call(attn_mask=torch.ones(6, 6, device="meta")), RuntimeError, "attn_mask must be on cpu"),
    ("negative dropout", call(dropout_p=-0.1), ValueError, "dropout_p must be a probability in .*-0.1"),
    ("dropout above 1", call(dropout_p=1.5), ValueError, "dropout_p must be a probability in .*1.5"),
    ("dropout NaN", call(dropout_p=float("nan")), ValueError, "dropout_p"),
    ("dropout type", call(dropout_p="a"), TypeError, "dropout_p must be a number, got str"),
    ("negative softcap", call(softcap=-1.0), ValueError, "softcap must be 0 .none. or positive, got -1"),
    ("infinite softcap", call(softcap=float("inf")), ValueError, "softcap"),
    ("scale type", call(scale="1"), TypeError, "scale must be a number, got str"),
    (
        "alignment",
        call(alignment="middle"),
        ValueError,
        "alignment must be one of upper_left, lower_right; got 'middle'",
    ),
    ("window type", call(window=1.5), TypeError, "window must be None, an int or a pair"),
    ("window of three", call(window=(1, 2, 3)), TypeError, "window must be None, an int or a pair"),
    ("negative window", call(window=(-1, 2)), ValueError, "window must not be negative"),
    ("slopes type", call(alibi_slopes=1.0), TypeError, "alibi_slopes must be a tensor"),
    ("slopes size", call(alibi_slopes=torch.ones(3)), RuntimeError, r"alibi_slopes must have shape \[4\] or \[2, 4\]"),
    ("slopes dtype", call(alibi_slopes=torch.ones(4).int()), RuntimeError, "alibi_slopes must be floating"),
    (
        "slopes gradient",
        call(alibi_slopes=torch.ones(4, requires_grad=True)),
        ValueError,
        "alibi_slopes must not require",
    ),
    ("backend", call(backend="abacus"), ValueError, "backend must be one of .* got 'abacus'"),
    ("cuda on CPU tensors", call(backend="cuda"), RuntimeError, "backend 'cuda' cannot run this call"),
    (
        "half on cpu",
        lambda: bmk.attention(*(t.half() for t in qkv()), backend="cpu"),
        RuntimeError,
        "q is torch.float16",
    ),
]


@pytest.mark.parametrize(("function", "error", "message"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS])
def test_wrong_input_is_named(function, error, message):
    with pytest.raises(error, match=message):
        function()


NATIVE = torch.ops.bigmodel_native


def native(q=None, k=None, v=None, mask=None, slopes=None, seed=None, p=0.0):
    a, b, c = qkv()
    q, k, v = a if q is None else q, b if k is None else k, c if v is None else v
    return NATIVE.attention_fwd(q, k, v, mask, slopes, seed, 1.0, p, 0.0, -1, -1, False, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q": make(2, 4, 6)}, "q must have 4 dimensions"),
        ({"k": make(2, 4, 6, 7)}, "k must have shape"),
        ({"v": make(2, 4, 5, 8)}, "v must have shape"),
        ({"k": make(2, 3, 6, 8), "v": make(2, 3, 6, 8)}, "multiple of the heads"),
        ({"v": make(*SHAPE).double()}, "v must have the dtype of q"),
        (
            {"q": make(*SHAPE).half(), "k": make(*SHAPE).half(), "v": make(*SHAPE).half()},
            "float32, float64 and bfloat16",
        ),
        ({"mask": make(6, 6)}, "mask must have 4 dimensions"),
        ({"mask": make(1, 1, 6, 5)}, "attn_mask must broadcast"),
        ({"mask": torch.ones(1, 1, 6, 6, dtype=torch.int)}, "attn_mask must be bool"),
        ({"slopes": make(1, 3)}, "slopes must have shape"),
        ({"p": 0.5}, "seed must be given"),
        ({"p": 0.5, "seed": torch.zeros(2, dtype=torch.int64)}, "seed must have one element"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_the_native_op_itself_checks_what_memory_safety_needs(options, message):
    with pytest.raises(RuntimeError, match=message):
        native(**options)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("flags", ["plain", "everything"])
def test_opcheck(backend, transposed, flags):
    q, k, v = (t.transpose(1, 2) if transposed else t for t in qkv(2, 4, 4, 8))
    options = {}
    if flags == "everything":
        options = {
            "attn_mask": make(1, 4, 4, 4, seed=3),
            "alibi_slopes": torch.rand(4),
            "is_causal": True,
            "softcap": 2.0,
            "return_lse": True,
        }
    args = bmk.attention.prepare(q, k, v, **options)
    torch.library.opcheck(torch.ops.bigmodel_kernels.attention_fwd.default, (*args, backend))
    out, lse, kept = torch.ops.bigmodel_kernels.attention_fwd(*args, backend)
    grad_lse = lse.clone() if flags == "everything" else None
    backward = (torch.ones_like(out), grad_lse, out, lse, kept, flags == "everything", *args, backend)
    torch.library.opcheck(torch.ops.bigmodel_kernels.attention_bwd.default, backward)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "alignment": "lower_right"},
        {"softcap": 1.5, "window": (2, 1)},
        {"attn_mask": torch.tensor([[True, False, True, True, False], [True] * 5, [False] * 5])},
    ],
    ids=["plain", "causal", "softcap", "mask"],
)
def test_gradients_of_gradients(options):
    q, k, v = (make(1, h, s, 2, dtype=torch.float64, seed=h + s).requires_grad_() for h, s in ((2, 3), (1, 5), (1, 5)))

    def function(*tensors):
        out, lse = bmk.attention(*tensors, enable_gqa=True, return_lse=True, backend="cpu", **options)
        return out, lse.masked_fill(torch.isinf(lse), 0.0)

    assert torch.autograd.gradcheck(function, (q, k, v))
    assert torch.autograd.gradgradcheck(function, (q, k, v))


def test_gradient_of_a_mask_passes_gradcheck():
    q, k, v = (make(1, 2, s, 2, dtype=torch.float64, seed=s).requires_grad_() for s in (3, 4, 4))
    mask = make(1, 1, 3, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: bmk.attention(*t[:3], attn_mask=t[3], backend="cpu"), (q, k, v, mask))


@pytest.mark.parametrize(("backend", "compiler"), [("auto", "inductor"), ("auto", "aot_eager"), ("torch", "aot_eager")])
def test_compiles_whole_with_dynamic_shapes(backend, compiler):
    def loss(q, k, v, mask):
        out, lse = bmk.attention(q, k, v, attn_mask=mask, is_causal=True, return_lse=True)
        return bmk.attention(q, k, v, window=3).square().sum() + out.sum() + lse.sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=compiler)
    for length in (5, 9):
        leaves = [t.requires_grad_() for t in qkv(2, 3, length, 8)]
        mask = make(length, length, seed=7).requires_grad_()
        with bmk.use_backend(backend):
            actual = torch.autograd.grad(compiled(*leaves, mask), [*leaves, mask])
            expected = torch.autograd.grad(loss(*leaves, mask), [*leaves, mask])
        for a, e in zip(actual, expected):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dims", [2, 3, 5])
def test_other_ranks(dims):
    shape = {2: (6, 8), 3: (4, 6, 8), 5: (2, 3, 4, 6, 8)}[dims]
    q, k, v = qkv(*shape)
    mask = torch.rand(6, 6) > 0.3
    out, lse = bmk.attention(q, k, v, attn_mask=mask, return_lse=True, backend="cpu")
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask), rtol=1e-5, atol=1e-6)
    assert lse.shape == shape[:-1]


def test_batch_and_heads_broadcast_as_in_torch():
    q, k, v = make(2, 4, 6, 8), make(1, 1, 5, 8, seed=1).requires_grad_(), make(1, 4, 5, 8, seed=2)
    out = bmk.attention(q, k, v, backend="cpu")
    expected = F.scaled_dot_product_attention(q, k.expand(2, 4, 5, 8), v.expand(2, 4, 5, 8))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(t.sum(), k)[0] for t in (out, expected)), rtol=1e-4, atol=1e-5)


def test_result_is_stored_with_the_heads_inside():
    out = bmk.attention(*qkv(), backend="cpu")
    assert out.transpose(1, 2).is_contiguous()
    out.transpose(1, 2).view(2, 6, 32)


def test_offsets_past_two_to_the_31():
    """Keys 2^29 elements apart in an unfaulted mapping: the offset of the fifth is past 2^31 bytes and 2^31 elements."""
    step = 2**29 + 64
    storage = torch.empty(6 * step, dtype=torch.bfloat16)  # 6 GiB of address space, a few pages of memory
    k = storage.as_strided((1, 1, 6, 16), (0, 0, step, 1))
    values = make(1, 1, 6, 16, dtype=torch.bfloat16, seed=1)
    k.copy_(values)
    for rows in (1, 20, 40):
        q = make(1, 1, rows, 16, dtype=torch.bfloat16)
        assert torch.equal(bmk.attention(q, k, k, backend="cpu"), bmk.attention(q, values, values, backend="cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("flags", [{}, {"is_causal": True}, {"dropout_p": 0.3}], ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 300, 16), (2, 3, 70, 33), (1, 1, 2, 16)], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(shape, flags, dtype):
    q = make(*shape, dtype=dtype)
    k, v = (make(*shape[:2], 1500, shape[3], dtype=dtype, seed=s) for s in (1, 2))
    mask = make(1, 1, shape[2], 1500, seed=3)

    def run():
        torch.manual_seed(4)
        leaves = [t.clone().requires_grad_() for t in (q, k, v, mask)]
        out, lse = bmk.attention(*leaves[:3], attn_mask=leaves[3], return_lse=True, backend="cpu", **flags)
        return out, lse, *torch.autograd.grad(out.square().sum(), leaves)

    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "amx_emulated", "amx"])
def test_every_instruction_set_gives_the_same(isa):
    """The whole error rule on sizes around every tile, in a process of its own: the set is chosen once."""
    sizes = [(1, 2, 1, 5, 17, 7, 9), (1, 1, 1, 50, 66, 16, 12), (2, 2, 1, 2, 200, 33, 8)]
    if isa.startswith("amx"):
        needed = ("avx512_bf16", "amx") if isa == "amx_emulated" else ("amx",)
        if bmk.build_info()["isa"] not in (*needed, isa):
            pytest.skip(f"this CPU has {bmk.build_info()['isa']}")
        sizes += [(2, 4, 2, 100, 230, 64, 64), (1, 2, 1, 70, 33, 80, 40)]
    program = (
        "import torch\n"
        "from tests.ops.attention_problem import Problem\n"
        "torch.set_num_threads(1)\n"
        f"sizes = {sizes}\n"
        "for size in sizes:\n"
        "    for flags in ('plain', 'causal', 'everything'):\n"
        "        for dtype in (torch.float32, torch.bfloat16, torch.float64):\n"
        "            Problem(size, flags, dtype).check(baseline=False)\n"
    )
    environment = {**os.environ, "BIGMODEL_ISA": isa, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_autocast_computes_in_bfloat16():
    q, k, v = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        assert bmk.attention(q, k, v).dtype == torch.bfloat16


def test_auto_takes_what_the_kernels_cannot():
    q, k, v = (t.half() for t in qkv())
    assert bmk.attention(q, k, v).dtype == torch.float16
    explanation = bmk.explain(bmk.attention, q, k, v)
    assert explanation.backend == "torch"
    assert "float16" in explanation.reasons["cpu"]


def test_auto_takes_the_kernels_for_calls_of_any_size():
    def choice(*shape, **options):
        return bmk.explain(bmk.attention, *qkv(*shape), **options).backend

    assert choice(*SHAPE) == choice(2, 4, 200, 16) == "cpu"
    for options in ({"is_causal": True}, {"window": 2}, {"attn_mask": torch.ones(6, 6).bool()}, {"softcap": 1.0}):
        assert choice(*SHAPE, **options) == "cpu"


def test_deterministic_and_functional_call():
    layer = bmk.nn.MultiheadAttention(8, 2)
    x = make(5, 3, 8)
    doubled = {name: 2 * p for name, p in layer.named_parameters()}
    out = torch.func.functional_call(layer, doubled, (x, x, x))[0]
    torch.testing.assert_close(
        out, torch.func.functional_call(torch.nn.MultiheadAttention(8, 2), doubled, (x, x, x))[0]
    )
    assert torch.equal(*(bmk.attention(*qkv(), deterministic=d) for d in (True, None)))


def test_mask_of_any_strides_and_dtype():
    q, k, v = (t.bfloat16() for t in qkv(2, 4, 20, 8))
    full = make(2, 4, 20, 20, seed=5)
    expected = bmk.attention(q, k, v, attn_mask=full, backend="cpu")
    for mask in (
        full.transpose(-1, -2).contiguous().transpose(-1, -2),
        torch.stack([full, full], -1)[..., 1],
        full.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
    ):
        assert torch.equal(bmk.attention(q, k, v, attn_mask=mask, backend="cpu"), expected)
    row = full[:1, :1, :1]
    spread = bmk.attention(q, k, v, attn_mask=row.expand(2, 4, 20, 20), backend="cpu")
    assert torch.equal(spread, bmk.attention(q, k, v, attn_mask=row[0, 0, 0], backend="cpu"))
    double = bmk.attention(q, k, v, attn_mask=full.double(), backend="cpu")
    torch.testing.assert_close(double, expected, rtol=2e-2, atol=2e-2)
