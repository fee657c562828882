"""bmk.encoder_layer: the error rule over sizes, masks and dtypes, its backends, transforms and refusals."""

import itertools

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.ops.encoder_layer import op, reference, torch_op
from bigmodel_kernels.ops.encoder_layer.op import PARAMETERS
from bigmodel_kernels.testing import check_whole_model, make
from tests.rerun import rerun
from tests.triton_interpreter import interpreted

# batch, tokens, width, heads, hidden
SIZES = {
    "middling": (3, 17, 32, 4, 64), "one token": (2, 1, 24, 3, 40), "odd": (1, 37, 21, 3, 35), "one head": (2, 9, 16, 1, 16),
    "many keys": (1, 200, 32, 2, 48), "wide": (2, 5, 272, 17, 300), "heads of one": (2, 6, 5, 5, 1),
}  # fmt: skip


def problem(name, dtype=torch.float64, seed=0):
    """x and the twelve parameters, in order."""
    batch, tokens, width, _, hidden = SIZES[name]
    shapes = (
        (3 * width, width), (3 * width,), (width, width), (width,), (hidden, width), (hidden,), (width, hidden), (width,),
        (width,), (width,), (width,), (width,),
    )  # fmt: skip
    tensors = [make(batch, tokens, width, dtype=torch.float64, seed=seed)]
    for i, shape in enumerate(shapes):
        t = make(*shape, dtype=torch.float64, seed=seed + i + 1)
        tensors.append(t / shape[-1] ** 0.5 if len(shape) == 2 else 0.3 * t + (i in (8, 10)))
    return [t.to(dtype) for t in tensors]


def mask_of(kind, name, dtype):
    batch, tokens, _, heads, _ = SIZES[name]
    if kind == "padding":  # the last sequence has one token
        ends = torch.arange(batch, 0, -1) * tokens // batch
        ends[-1] = 1
        return (torch.arange(tokens) < ends[:, None])[:, None, None]
    if kind == "scores":
        return make(1, heads, tokens, tokens, dtype=torch.float64, seed=70).to(dtype)
    if kind == "square":
        return make(tokens, tokens, dtype=torch.float64, seed=71) > -1
    return None


def layer(tensors, name, backend, **options):
    with torch.no_grad():
        return bmk.encoder_layer(*tensors, num_heads=SIZES[name][3], backend=backend, **options)


def check(name, dtype, backend="cpu", mask=None, **options):
    tensors = problem(name, dtype)
    given, wide = ({**options, "attn_mask": mask_of(mask, name, kind)} for kind in (dtype, torch.float64))
    if given["attn_mask"] is not None and given["attn_mask"].is_floating_point():
        wide["attn_mask"] = given["attn_mask"].double()
    exact = layer([t.double() for t in tensors], name, "torch", **wide)
    report = check_whole_model(
        layer(tensors, name, backend, **given), exact, layer(tensors, name, "torch", **given), dtype=dtype
    )
    assert report.ok, report.message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", SIZES)
def test_is_the_formula(name, norm_first, dtype):
    for activation, mask, is_causal in (
        ("relu", None, False),
        ("gelu", "padding", False),
        ("silu", "scores", True),
        ("gelu_tanh", "square", False),
    ):
        check(name, dtype, mask=mask, norm_first=norm_first, activation=activation, is_causal=is_causal)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa):
    rerun(__file__, "test_is_the_formula", isa)


def check_triton():
    check("middling", torch.float32, "triton", mask="padding", activation="silu")
    check("middling", torch.float32, "triton", is_causal=True, activation="gelu_tanh", norm_first=True)


def test_triton_runs_the_kernels_of_its_parts():
    interpreted(check_triton)


@pytest.mark.parametrize("norm_first", [False, True])
def test_reference_is_torchs_layer(norm_first):
    tensors = problem("middling")
    _, _, width, heads, hidden = SIZES["middling"]
    theirs = torch.nn.TransformerEncoderLayer(
        width, heads, hidden, 0.0, "gelu", batch_first=True, norm_first=norm_first, dtype=torch.float64
    ).eval()
    order = [n.replace("in_proj", "self_attn.in_proj").replace("out_proj_", "self_attn.out_proj.") for n in PARAMETERS]
    order = [
        n if n in theirs.state_dict() else n.replace("_weight", ".weight").replace("_bias", ".bias") for n in order
    ]
    theirs.load_state_dict(dict(zip(order, tensors[1:])))
    args = op.prepare(*tensors, num_heads=heads, activation="gelu", norm_first=norm_first)
    for ours in (reference.fwd(*args), torch_op.call(*args)):
        torch.testing.assert_close(ours, theirs(tensors[0]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("left_out", [PARAMETERS[1::2], PARAMETERS[8:], PARAMETERS[9::2]])
def test_without_biases_and_norm_weights(left_out):
    tensors = problem("middling", torch.float32)
    some = [tensors[0], *(None if n in left_out else t for n, t in zip(PARAMETERS, tensors[1:]))]
    neutral = {
        n: torch.ones_like(t) if "norm" in n and "weight" in n else torch.zeros_like(t)
        for n, t in zip(PARAMETERS, tensors[1:])
    }
    full = [tensors[0], *(neutral[n] if n in left_out else t for n, t in zip(PARAMETERS, tensors[1:]))]
    torch.testing.assert_close(layer(some, "middling", "cpu"), layer(full, "middling", "cpu"), rtol=1e-6, atol=1e-6)


def test_any_strides():
    tensors = problem("middling", torch.float32)
    expected = layer(tensors, "middling", "cpu")
    strided = [
        t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 1 else t.repeat_interleave(2)[::2] for t in tensors
    ]
    result = layer(strided, "middling", "cpu")
    assert result.is_contiguous()
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_nothing_in_nothing_out(shape, backend):
    tensors = problem("middling", torch.float32)
    tensors[0] = torch.zeros(*shape, 32)
    assert layer(tensors, "middling", backend).shape == (*shape, 32)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_query_that_may_attend_to_nothing_is_no_nan(backend):
    tensors = problem("middling", torch.float32)
    mask = torch.ones(3, 1, 17, 17, dtype=torch.bool)
    mask[1, :, 4] = False
    result = layer(tensors, "middling", backend, attn_mask=mask)
    assert result.isfinite().all()
    alone = torch.ones(3, 1, 17, 17, dtype=torch.bool)
    torch.testing.assert_close(result[[0, 2]], layer(tensors, "middling", backend, attn_mask=alone)[[0, 2]])


def test_a_nan_stays_in_its_sequence():
    tensors = problem("middling", torch.float32)
    clean = layer(tensors, "middling", "cpu")
    tensors[0][1, 3, 0] = float("nan")
    result = layer(tensors, "middling", "cpu")
    assert result[1].isnan().all()
    assert torch.equal(result[[0, 2]], clean[[0, 2]])


def test_gradients_are_pytorchs():
    tensors = [t.requires_grad_() for t in problem("middling")]
    options = {"num_heads": 4, "activation": "gelu", "is_causal": True}
    y = bmk.encoder_layer(*tensors, **options)
    theirs = reference.fwd(*op.prepare(*tensors, **options))
    for a, e in zip(*(torch.autograd.grad(t.square().sum(), tensors) for t in (y, theirs))):
        torch.testing.assert_close(a, e)
    with pytest.raises(RuntimeError, match="no gradient"):
        bmk.encoder_layer(*tensors, num_heads=4, backend="cpu")


def test_transforms_autocast_and_compile():
    tensors = problem("middling", torch.float32)
    run = lambda x: bmk.encoder_layer(x, *tensors[1:], num_heads=4)  # noqa: E731
    x = tensors[0]
    with torch.no_grad():
        expected = run(x)
        torch.testing.assert_close(
            torch.func.vmap(run)(x[None].expand(2, -1, -1, -1))[1], expected, rtol=1e-4, atol=1e-5
        )
        compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
        for some in (x, x[:2, :9].contiguous()):
            torch.testing.assert_close(compiled(some), run(some), rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(run(x), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("mask", [None, "padding"])
def test_the_operator(mask):
    args = op.prepare(
        *problem("middling", torch.float32), num_heads=4, attn_mask=mask_of(mask, "middling", torch.float32)
    )
    for backend in ("cpu", "torch"):
        operator = torch.ops.bigmodel_kernels.encoder_layer.default
        torch.library.opcheck(operator, (*args, backend), test_utils=("test_schema", "test_faketensor"))


def test_explain_tells_of_one_call():
    tensors = problem("middling", torch.float32)
    with torch.no_grad():
        told = bmk.explain(bmk.encoder_layer, *tensors, num_heads=4)
        run = bmk.explain(lambda: bmk.encoder_layer(*tensors, num_heads=4)).calls
    assert [(call.op, call.backend) for call in run] == [("encoder_layer", told.backend)]
    assert set(told.reasons) == {"cpu", "cuda", "triton", "torch"}


def test_refusals():
    tensors = problem("middling", torch.float32)
    for argument, i in zip(PARAMETERS, itertools.count(1)):
        for wrong, error, words in (
            (tensors[i][:-1], RuntimeError, f"{argument} must have shape"),
            (tensors[i].double(), RuntimeError, f"{argument} must be torch.float32"),
            ("abc", TypeError, f"{argument} must be a tensor"),
        ):
            if argument == "linear1_weight" and isinstance(wrong, torch.Tensor) and wrong.dtype == torch.float32:
                continue  # which says how many values there are
            with pytest.raises(error, match=words):
                layer([*tensors[:i], wrong, *tensors[i + 1 :]], "middling", "auto")
    for options, error, words in (
        ({"num_heads": 5}, ValueError, "num_heads must divide the last dimension of x, 32, got 5"),
        (
            {"num_heads": 4, "activation": "tanh"},
            ValueError,
            "activation must be one of relu, gelu, gelu_tanh, silu; got 'tanh'",
        ),
        ({"num_heads": 4, "eps": -1.0}, ValueError, "eps must not be negative"),
        ({"num_heads": 4, "is_causal": 1}, TypeError, "is_causal must be a bool"),
        ({"num_heads": 4, "attn_mask": torch.ones(5, 17)}, RuntimeError, "attn_mask must broadcast"),
        ({"num_heads": 4, "backend": "cuda"}, RuntimeError, "no cuda kernel of encoder_layer"),
    ):
        with pytest.raises(error, match=words), torch.no_grad():
            bmk.encoder_layer(*tensors, **options)
