"""bmk.decoder_step: step by step it gives the columns of the causal layer; caches, backends, refusals."""

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.ops.decoder_step import op
from bigmodel_kernels.ops.encoder_layer.op import PARAMETERS
from bigmodel_kernels.ops.encoder_layer.torch_op import layer
from bigmodel_kernels.testing import check_whole_model, make
from tests.rerun import rerun
from tests.triton_interpreter import interpreted

# batch, steps, width, heads, key heads, head dimension, hidden
SIZES = {
    "middling": (3, 19, 32, 4, 4, 8, 64), "grouped": (2, 9, 24, 6, 2, 5, 40), "one key head": (1, 33, 16, 16, 1, 4, 16),
    "wide": (1, 4, 272, 17, 17, 16, 300), "many": (20, 3, 64, 1, 1, 64, 64),
}  # fmt: skip


def problem(name, dtype=torch.float64, seed=0):
    """x [N, S, E] and the twelve parameters."""
    batch, steps, width, heads, kv_heads, depth, hidden = SIZES[name]
    packed, inner = (heads + 2 * kv_heads) * depth, heads * depth
    matrices = (packed, width), (width, inner), (hidden, width), (width, hidden)
    shapes = [s for m in matrices for s in (m, m[:1])] + [(width,)] * 4
    tensors = [make(batch, steps, width, dtype=torch.float64, seed=seed)]
    for i, shape in enumerate(shapes):
        t = make(*shape, dtype=torch.float64, seed=seed + i + 1)
        tensors.append(t / shape[-1] ** 0.5 if len(shape) == 2 else 0.3 * t + (i in (8, 10)))
    return [t.to(dtype) for t in tensors]


def caches_of(name, dtype, capacity=None):
    batch, steps, _, _, kv_heads, depth, _ = SIZES[name]
    shape = (batch, kv_heads, capacity or steps + 3, depth)
    return [torch.full(shape, float("nan"), dtype=dtype) for _ in range(2)]  # what is not written must not be read


@torch.no_grad()
def stream(name, tensors, starts=0, **options):
    """All columns, [N, S, E]; sequence n begins `starts * n` places on, behind zeros."""
    batch, _, _, heads, *_ = SIZES[name]
    x, *weights = tensors
    caches = caches_of(name, x.dtype, x.shape[1] + starts * batch)
    lengths = starts * torch.arange(batch)
    columns = []
    for t in range(x.shape[1]):
        columns.append(bmk.decoder_step(x[:, t], *caches, lengths, *weights, num_heads=heads, **options))
        lengths = lengths + 1
    return torch.stack(columns, 1), caches


def repeated(name, tensors):
    """The parameters with every key head as often as queries share it, for the layer over the whole sequence."""
    _, _, width, heads, kv_heads, depth, _ = SIZES[name]
    x, weight, bias, *rest = tensors
    queries, keys, values = (
        t.unflatten(0, (-1, depth))
        for t in torch.cat([weight, bias[:, None]], 1).split([heads * depth, *[kv_heads * depth] * 2])
    )
    share = heads // kv_heads
    packed = torch.cat([queries, keys.repeat_interleave(share, 0), values.repeat_interleave(share, 0)]).flatten(0, 1)
    return [x, packed[:, :width], packed[:, width], *rest]


def whole(name, tensors, norm_first, activation):
    """By the plain formula in the dtype of the tensors."""
    heads, depth = SIZES[name][3], SIZES[name][5]
    x, *weights = repeated(name, tensors)

    def attend(packed):
        q, k, v = packed.unflatten(-1, (3, heads, depth)).permute(2, 0, 3, 1, 4).unbind()
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).flatten(2)

    with torch.no_grad():
        return layer(x, *weights, activation, norm_first, 1e-5, attend=attend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("name", SIZES)
def test_gives_the_columns_of_the_causal_layer(name, backend, dtype):
    for norm_first, activation in ((True, "gelu_tanh"), (False, "relu")):
        tensors = problem(name, dtype)
        exact, theirs = (
            whole(name, [t.to(kind) for t in tensors], norm_first, activation) for kind in (torch.float64, dtype)
        )
        ours, _ = stream(name, tensors, backend=backend, norm_first=norm_first, activation=activation)
        report = check_whole_model(ours, exact, theirs, dtype=dtype)
        assert report.ok, report.message


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa):
    rerun(__file__, "columns and cpu", isa)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_sequences_of_different_lengths(backend):
    """Each attends to what its own cache holds, here zeros before its tokens."""
    name, tensors = "grouped", problem("grouped", torch.float32)
    batch, steps, _, heads, kv_heads, depth, _ = SIZES[name]
    x, *weights = tensors
    together = [torch.zeros(batch, kv_heads, steps + 7, depth) for _ in range(2)]
    lengths = torch.tensor([0, 6])
    options = {"num_heads": heads, "backend": backend}
    with torch.no_grad():
        for t in range(steps):
            y = bmk.decoder_step(x[:, t], *together, lengths + t, *weights, **options)
        for n in range(batch):
            alone = [torch.zeros(1, kv_heads, steps + 7, depth) for _ in range(2)]
            for t in range(steps):
                expected = bmk.decoder_step(x[n : n + 1, t], *alone, lengths[n : n + 1] + t, *weights, **options)
            torch.testing.assert_close(y[n], expected[0], rtol=1e-5, atol=1e-6)


def test_writes_its_place_and_no_other():
    tensors = problem("middling", torch.float32)
    x, *weights = tensors
    caches, lengths = caches_of("middling", torch.float32), torch.tensor([0, 0, 0])
    before = [c.clone() for c in caches]
    with torch.no_grad():
        bmk.decoder_step(x[:, 0], *caches, lengths, *weights, num_heads=4)
    assert torch.equal(lengths, torch.zeros(3, dtype=torch.int64))
    for cache, old in zip(caches, before):
        assert cache[:, :, 0].isfinite().all()
        assert torch.equal(cache[:, :, 1:].isnan(), old[:, :, 1:].isnan())


def test_caches_of_any_order_in_memory():
    tensors = problem("middling", torch.float32)
    expected, _ = stream("middling", tensors)
    x, *weights = tensors
    batch, steps, _, heads, kv_heads, depth, _ = SIZES["middling"]
    for order in ((0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 3, 2)):  # the last has rows that are not adjacent
        sizes = (batch, kv_heads, steps, depth)
        shape, back = [sizes[i] for i in order], [order.index(i) for i in range(4)]
        caches = [torch.zeros(shape).permute(back) for _ in range(2)]
        with torch.no_grad():
            for t in range(steps):
                lengths = torch.full((batch,), t)
                y = bmk.decoder_step(x[:, t], *caches, lengths, *weights, num_heads=heads)
        torch.testing.assert_close(y, expected[:, -1], rtol=1e-5, atol=1e-6)


def test_triton_runs_the_kernels_of_its_parts():
    interpreted(check_triton)


def check_triton():
    tensors = problem("middling", torch.float32)
    tensors[0] = tensors[0][:, :3]
    expected, _ = stream("middling", tensors, backend="torch")
    x, *weights = tensors
    caches = [torch.zeros(3, 4, 5, 8) for _ in range(2)]
    with torch.no_grad():
        for t in range(3):
            y = bmk.decoder_step(x[:, t], *caches, torch.full((3,), t), *weights, num_heads=4, backend="triton")
            torch.testing.assert_close(y, expected[:, t], rtol=1e-4, atol=1e-5)


def test_compiled_and_under_autocast():
    tensors = problem("middling", torch.float32)
    x, *weights = tensors
    expected, held = stream("middling", [x[:, :3], *weights])

    def run(x_t, k, v, lengths):
        return bmk.decoder_step(x_t, k, v, lengths, *weights, num_heads=4)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for function, autocast in ((compiled, False), (run, True)):
        caches = caches_of("middling", torch.float32, 3)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            for t in range(3):
                y = function(x[:, t], *caches, torch.full((3,), t))
                torch.testing.assert_close(y, expected[:, t], rtol=1e-5, atol=1e-6)
        for a, e in zip(caches, held):
            torch.testing.assert_close(a, e[:, :, :3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_the_operator(backend):
    x, *weights = problem("middling", torch.float32)
    caches = [torch.zeros(3, 4, 5, 8) for _ in range(2)]
    args = op.prepare(x[:, 0], *caches, torch.tensor([0, 1, 2]), *weights, num_heads=4)
    operator = torch.ops.bigmodel_kernels.decoder_step.default
    torch.library.opcheck(operator, (*args, backend), test_utils=("test_schema", "test_faketensor"))


def test_refusals_write_nothing():
    x, *weights = problem("middling", torch.float32)
    caches = [torch.zeros(3, 4, 5, 8) for _ in range(2)]
    right = {"x": x[:, 0], "k_cache": caches[0], "v_cache": caches[1], "lengths": torch.tensor([0, 4, 2])}
    right |= dict(zip(PARAMETERS, weights)) | {"num_heads": 4}
    full = torch.tensor([0, 5, 2])
    for wrong, error, words in (
        ({"lengths": full}, RuntimeError, r"lengths must leave a place of the 5 of k_cache, got \[0, 5, 2\]"),
        ({"lengths": -full}, RuntimeError, "lengths must leave a place"),
        ({"lengths": full.int()}, RuntimeError, "lengths must be int64"),
        ({"lengths": None}, TypeError, "lengths must be a tensor"),
        ({"x": x}, RuntimeError, r"x must have shape \[N, E\]"),
        ({"x": x[:2, 0]}, RuntimeError, r"k_cache must have shape \[2, Hkv, capacity, D\]"),
        ({"v_cache": caches[1][:, :, 1:]}, RuntimeError, "v_cache must have the shape of k_cache"),
        ({"k_cache": caches[0].double()}, RuntimeError, "k_cache must be torch.float32"),
        ({"num_heads": 6}, ValueError, "num_heads must be a multiple of the 4 heads"),
        ({"num_heads": 8}, RuntimeError, r"in_proj_weight must have shape \[128, 32\]"),
        ({"linear2_weight": weights[6].t()}, RuntimeError, r"linear2_weight must have shape \[32, 64\]"),
        ({"norm2_bias": weights[0]}, RuntimeError, "norm2_bias must have shape"),
        ({"activation": "tanh"}, ValueError, "activation must be one of"),
        ({"eps": -1.0}, ValueError, "eps must not be negative"),
    ):
        for backend in ("auto", "cpu", "torch"):
            with pytest.raises(error, match=words), torch.no_grad():
                bmk.decoder_step(**right | wrong, backend=backend)
    with pytest.raises(RuntimeError, match="no derivative"):
        bmk.decoder_step(**right | {"linear1_weight": weights[4].requires_grad_()})
    assert not caches[0].any()
    assert not caches[1].any()
