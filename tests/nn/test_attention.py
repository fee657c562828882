"""bmk.nn.MultiheadAttention against torch.nn's: results, gradients, state_dict, errors, and rows that attend to nothing."""

import copy
import itertools
import math

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.testing import make

E, H, L, S, N = 8, 2, 3, 5, 2


def pair(**options):
    """torch's layer and ours with the same weights."""
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(E, H, **options)
    torch.manual_seed(0)
    ours = bmk.nn.MultiheadAttention(E, H, **options)
    return theirs, ours


def sequences(batched=True, batch_first=False, kdim=E, vdim=E, seed=0):
    def shape(length, width):
        if not batched:
            return length, width
        return (N, length, width) if batch_first else (length, N, width)

    return [
        make(*shape(length, width), seed=seed + i).requires_grad_()
        for i, (length, width) in enumerate([(L, E), (S, kdim), (S, vdim)])
    ]


def masks(kind, padding, batched=True):
    attn_mask = {
        None: None,
        "bool": make(L, S, seed=7) > 0.3,
        "float": make(L, S, seed=7),
        "heads": make((N if batched else 1) * H, L, S, seed=7) > 0.3,
    }[kind]
    key_padding_mask = {None: None, "bool": make(N, S, seed=8) > 0.3, "float": make(N, S, seed=8)}[padding]
    for mask in (attn_mask, key_padding_mask):
        if mask is not None and mask.dtype == torch.bool:
            mask[..., 0] = False  # torch gives NaN for a row without keys
    if key_padding_mask is not None and not batched:
        key_padding_mask = key_padding_mask[0]
    return attn_mask, key_padding_mask


def assert_same(theirs, ours, inputs, **call):
    results = []
    for layer in (theirs, ours):
        out, weights = layer(*inputs, **call)
        loss = out.square().sum() + (0 if weights is None else weights.square().sum())
        leaves = [t for t in dict.fromkeys(inputs) if t.requires_grad] + list(layer.parameters())
        results.append((out, weights, torch.autograd.grad(loss, leaves, materialize_grads=True)))
    (out, weights, grads), (our_out, our_weights, our_grads) = results
    torch.testing.assert_close(our_out, out, rtol=1e-5, atol=1e-6)
    assert (weights is None) == (our_weights is None)
    if weights is not None:
        torch.testing.assert_close(our_weights, weights, rtol=1e-5, atol=1e-6)
    for a, e in zip(our_grads, grads):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("padding", [None, "bool", "float"])
@pytest.mark.parametrize("kind", [None, "bool", "float", "heads"])
@pytest.mark.parametrize("batched", [True, False])
def test_masks_mean_the_same(batched, kind, padding):
    for batch_first, need_weights, average in itertools.product((False, True), repeat=3):
        theirs, ours = pair(batch_first=batch_first)
        attn_mask, key_padding_mask = masks(kind, padding, batched)
        call = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
        inputs = sequences(batched, batch_first)
        assert_same(theirs, ours, inputs, need_weights=need_weights, average_attn_weights=average, **call)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", [None, "bool"])
@pytest.mark.parametrize(
    "options",
    [
        {"bias": False},
        {"kdim": 5, "vdim": 7},
        {"kdim": 5, "vdim": 7, "bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
        {"add_bias_kv": True, "kdim": 3},
    ],
    ids=str,
)
def test_constructor_options_mean_the_same(options, kind, need_weights):
    theirs, ours = pair(**options)
    attn_mask, key_padding_mask = masks(kind, kind)
    inputs = sequences(True, options.get("batch_first", False), options.get("kdim", E), options.get("vdim", E))
    assert_same(theirs, ours, inputs, attn_mask=attn_mask, key_padding_mask=key_padding_mask, need_weights=need_weights)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("same", ["self", "key_is_value"])
def test_products_of_the_same_tensor_are_shared(same, batched, batch_first):
    theirs, ours = pair(batch_first=batch_first)
    q, k, _ = sequences(batched, batch_first)
    inputs = (q, q, q) if same == "self" else (q, k, k)
    assert_same(theirs, ours, inputs, need_weights=False)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("padding", [None, "bool"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_is_causal_is_the_causal_mask(need_weights, padding, added):
    theirs, ours = pair(add_zero_attn=added)
    x = make(S, N, E).requires_grad_()
    _, key_padding_mask = masks(None, padding)
    mask = torch.ones(S, S, dtype=torch.bool).triu(1)
    call = {"attn_mask": mask, "key_padding_mask": key_padding_mask, "need_weights": need_weights}
    # Asked of torch without the promise: with it, torch leaves keys that were added out of reach.
    expected, got = theirs(x, x, x, **call), ours(x, x, x, is_causal=True, **call)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
    if need_weights:
        torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_row_that_attends_to_nothing_is_zero_in_every_mode(kind, need_weights, training):
    layer = bmk.nn.MultiheadAttention(E, H, dropout=0.2, batch_first=True).train(training)
    inputs = sequences(batch_first=True)
    mask = torch.zeros(N, S, dtype=torch.bool)
    mask[1] = True
    if kind == "float":
        mask = torch.zeros(N, S).masked_fill(mask, -math.inf)
    out, weights = layer(*inputs, key_padding_mask=mask, need_weights=need_weights)
    torch.testing.assert_close(out[1], layer.out_proj.bias.expand(L, E))
    if need_weights:
        assert weights[1].eq(0).all()
    for grad in torch.autograd.grad(out.sum(), [*inputs, *layer.parameters()]):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_padding_never_leaks(poison):
    layer = bmk.nn.MultiheadAttention(E, H, batch_first=True)
    q, k, v = (t.detach() for t in sequences(batch_first=True))
    mask = torch.zeros(N, S, dtype=torch.bool)
    mask[:, 3:] = True
    clean = layer(q, k, v, key_padding_mask=mask, need_weights=False)[0]
    k[:, 3:], v[:, 3:] = poison, poison
    torch.testing.assert_close(layer(q, k, v, key_padding_mask=mask, need_weights=False)[0], clean)


def test_state_dict_moves_both_ways_and_the_first_weights_are_torchs():
    for options in ({}, {"kdim": 3}, {"add_bias_kv": True, "bias": False}):
        theirs, ours = pair(**options)
        assert list(theirs.state_dict()) == list(ours.state_dict())
        for a, b in zip(theirs.state_dict().values(), ours.state_dict().values()):
            assert torch.equal(a, b)
        theirs.load_state_dict(ours.state_dict(), strict=True)


def test_from_torch_shares_the_parameters():
    theirs = torch.nn.MultiheadAttention(E, H)
    ours = bmk.nn.MultiheadAttention.from_torch(theirs)
    assert ours.in_proj_weight is theirs.in_proj_weight
    assert isinstance(theirs, torch.nn.MultiheadAttention)
    assert not isinstance(theirs, bmk.nn.MultiheadAttention)


def test_use_backend_torch_runs_the_same_layer_on_torchs_op():
    _, ours = pair()
    x = make(200, 4, E)
    with bmk.use_backend("torch"):
        theirs = ours(x, x, x, need_weights=False)[0]
        assert bmk.explain(ours, x, x, x, need_weights=False).backend == "torch"
    torch.testing.assert_close(ours(x, x, x, need_weights=False)[0], theirs, rtol=1e-5, atol=1e-6)
    calls = {call.op: call.backend for call in bmk.explain(ours, x, x, x, need_weights=False).calls}
    assert calls["attention"] == "cpu"


def test_eval_does_not_take_the_native_fast_path():
    layer = bmk.nn.MultiheadAttention(E, H, batch_first=True).eval()
    x = make(N, S, E)
    with torch.no_grad():
        calls = bmk.explain(layer, x, x, x, need_weights=False).calls
    assert [call.op for call in calls] == ["linear", "attention", "linear"]


@pytest.mark.parametrize("need_weights", [True, False])
def test_trains_compiled(need_weights):
    layer = bmk.nn.MultiheadAttention(E, H, batch_first=True)
    twin = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (4, 7):
        x = make(N, length, E, seed=length)
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        for run, module in ((compiled, layer), (twin, twin)):
            module.zero_grad()
            run(x, x, x, attn_mask=mask, is_causal=True, need_weights=need_weights)[0].square().sum().backward()
        for a, e in zip(layer.parameters(), twin.parameters()):
            torch.testing.assert_close(a.grad, e.grad, rtol=1e-4, atol=1e-5)


def error_call(query=(L, N, E), key=(S, N, E), value=(S, N, E), options=None, **call):
    return lambda layer: layer(torch.zeros(query), torch.zeros(key), torch.zeros(value), **call)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (error_call(query=(L,)), "query"),
        (error_call(key=(S, E)), "key"),
        (error_call(query=(L, N, E + 1)), "embedding dimension"),
        (error_call(value=(S + 1, N, E)), "value"),
        (error_call(key=(S, N, E + 1), value=(S, N, E + 1)), "key must have 8 features, got 9|size"),
        (error_call(key=(S, N + 1, E), value=(S, N + 1, E)), "batch size|shape"),
        (error_call(attn_mask=torch.zeros(S)), "attn_mask"),
        (error_call(attn_mask=torch.zeros(L, S + 1)), "attn_mask"),
        (error_call(attn_mask=torch.zeros(N * H + 1, L, S)), "attn_mask"),
        (error_call(attn_mask=torch.zeros(L, S).int()), "attn_mask"),
        (error_call(key_padding_mask=torch.zeros(S)), "key_padding_mask"),
        (error_call(key_padding_mask=torch.zeros(N, S + 1)), "key_padding_mask"),
        (error_call(key_padding_mask=torch.zeros(N, S).int()), "key_padding_mask"),
        (error_call(is_causal=True), "attn_mask"),
    ],
)
def test_wrong_input_raises_as_torch_does(function, message):
    theirs, ours = pair()
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        function(theirs)
    with pytest.raises((AssertionError, RuntimeError), match=message):
        function(ours)


def test_the_constructor_raises_as_torch_does():
    with pytest.raises(AssertionError, match="divisible"):
        bmk.nn.MultiheadAttention(7, 2)
    with pytest.raises(ValueError, match="embed_dim"):
        bmk.nn.MultiheadAttention(0, 2)
