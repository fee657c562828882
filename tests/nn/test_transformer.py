"""bmk.nn's transformer layers against torch.nn's, alone and in torch's containers."""

import copy

import pytest
import torch
import torch.nn.functional as F

import bigmodel_kernels as bmk
from bigmodel_kernels.testing import make

D, HEADS, WIDTH, L, N = 8, 2, 16, 5, 3


def pair(name, *args, **options):
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(*args, **options)
    torch.manual_seed(0)
    ours = getattr(bmk.nn, name)(*args, **options)
    return theirs, ours


def padding():
    mask = torch.zeros(N, L, dtype=torch.bool)
    mask[1, 3:], mask[2, 4:] = True, True
    return mask


def assert_same_gradients(theirs, ours, *inputs, **call):
    results = []
    for layer in (theirs, ours):
        out = layer(*inputs, **call)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(layer.parameters()))])
    for e, a in zip(*results):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu", F.silu], ids=["relu", "gelu", "callable"])
def test_encoder_layer(activation, batch_first, norm_first, training):
    options = {"batch_first": batch_first, "norm_first": norm_first}
    theirs, ours = pair("TransformerEncoderLayer", D, HEADS, WIDTH, 0.0, activation, **options)
    theirs.train(training), ours.train(training)
    x = make(N, L, D) if batch_first else make(L, N, D)
    causal = torch.nn.Transformer.generate_square_subsequent_mask(L)
    for call in (
        {},
        {"src_mask": causal},
        {"src_mask": causal, "is_causal": True},
        {"src_key_padding_mask": padding()},
    ):
        assert_same_gradients(theirs, ours, x, **call)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_decoder_layer(batch_first, norm_first):
    options = {"batch_first": batch_first, "norm_first": norm_first}
    theirs, ours = pair("TransformerDecoderLayer", D, HEADS, WIDTH, 0.0, **options)
    x, memory = (make(N, L, D, seed=s) if batch_first else make(L, N, D, seed=s) for s in (0, 1))
    causal = torch.nn.Transformer.generate_square_subsequent_mask(L)
    for call in ({}, {"tgt_mask": causal, "tgt_is_causal": True}, {"memory_key_padding_mask": padding()}):
        assert_same_gradients(theirs, ours, x, memory, **call)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer(batch_first, training):
    theirs, ours = pair("Transformer", D, HEADS, 2, 2, WIDTH, 0.0, batch_first=batch_first)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for a, b in zip(theirs.state_dict().values(), ours.state_dict().values()):
        assert torch.equal(a, b)
    theirs.train(training), ours.train(training)
    source, target = (make(N, L, D, seed=s) if batch_first else make(L, N, D, seed=s) for s in (0, 1))
    call = {
        "tgt_mask": torch.nn.Transformer.generate_square_subsequent_mask(L),
        "src_key_padding_mask": padding(),
        "memory_key_padding_mask": padding(),
        "tgt_is_causal": True,
    }
    assert_same_gradients(theirs, ours, source, target, **call)


def attention_calls(model, *args, **call):
    """Of layers by their blocks, which they go by where gradients are recorded."""
    return [c.backend for c in bmk.explain(model, *args, **call).calls if c.op == "attention"]


def test_torchs_containers_take_our_layers_and_never_the_fast_path():
    layer = bmk.nn.TransformerEncoderLayer(D, HEADS, WIDTH, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    x = make(N, L, D)
    assert attention_calls(encoder, x, src_key_padding_mask=padding()) == ["cpu"] * 3
    nested = torch.nn.TransformerEncoder(layer, 2).eval()
    assert attention_calls(nested, x, src_key_padding_mask=padding()) == ["cpu"] * 2
    model = bmk.nn.Transformer(D, HEADS, 2, 1, WIDTH, batch_first=True).eval()
    masks = {f"{name}_key_padding_mask": padding() for name in ("src", "tgt", "memory")}
    assert attention_calls(model, x, x, **masks) == ["cpu"] * 4


def test_padded_sequences_keep_their_length_in_eval():
    """torch's own encoder drops the padding, and the last columns with it, in eval mode alone."""
    model = bmk.nn.Transformer(D, HEADS, 1, 1, WIDTH, 0.0, batch_first=True)
    x = make(N, L, D)
    mask = torch.zeros(N, L, dtype=torch.bool)
    mask[:, -1] = True
    with torch.no_grad():
        trained, evaluated = (model.train(mode).encoder(x, src_key_padding_mask=mask) for mode in (True, False))
    assert evaluated.shape == x.shape
    torch.testing.assert_close(evaluated, trained)


def test_from_torch_shares_parameters_and_leaves_the_model_alone():
    theirs = torch.nn.Transformer(D, HEADS, 2, 2, WIDTH, 0.0, batch_first=True).eval()
    ours = bmk.nn.Transformer.from_torch(theirs)
    assert all(a is b for a, b in zip(theirs.parameters(), ours.parameters()))
    assert type(theirs.encoder.layers[0]) is torch.nn.TransformerEncoderLayer
    assert type(theirs.encoder.layers[0].self_attn) is torch.nn.MultiheadAttention
    assert type(ours.decoder.layers[1]) is bmk.nn.TransformerDecoderLayer
    x = make(N, L, D)
    torch.testing.assert_close(ours(x, x), theirs(x, x), rtol=1e-4, atol=1e-5)


def test_a_custom_encoder_stays():
    class Identity(torch.nn.Module):
        def forward(self, src, mask=None, src_key_padding_mask=None, is_causal=None):
            return src

    model = bmk.nn.Transformer(D, HEADS, 1, 1, WIDTH, custom_encoder=Identity(), batch_first=True)
    assert isinstance(model.encoder, Identity)
    model(make(N, L, D), make(N, L, D))


@pytest.mark.parametrize(
    ("name", "compiler"), [("TransformerEncoderLayer", "inductor"), ("TransformerDecoderLayer", "aot_eager")]
)
def test_trains_compiled(name, compiler):
    torch._dynamo.reset()
    layer = getattr(bmk.nn, name)(D, HEADS, WIDTH, 0.0, batch_first=True)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=compiler)
    for length in (4, 7):
        x = make(N, length, D, seed=length)
        args = (x,) if "Encoder" in name else (x, x + 1)
        for run, module in ((compiled, layer), (twin, twin)):
            module.zero_grad()
            run(*args).square().sum().backward()
        for a, e in zip(layer.parameters(), twin.parameters()):
            torch.testing.assert_close(a.grad, e.grad, rtol=1e-3, atol=1e-4)


def test_dropout_trains_and_follows_manual_seed():
    layer = bmk.nn.TransformerEncoderLayer(D, HEADS, WIDTH, 0.3, batch_first=True)
    x = make(N, L, D)
    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.equal(layer(x), first)


def test_wrong_sizes_raise_as_torch_does():
    model = bmk.nn.Transformer(D, HEADS, 1, 1, WIDTH, batch_first=True)
    with pytest.raises(RuntimeError, match="batch number of src and tgt"):
        model(make(N, L, D), make(N + 1, L, D))
    with pytest.raises(RuntimeError, match="feature number of src and tgt"):
        model(make(N, L, D + 1), make(N, L, D + 1))
    with pytest.raises(AssertionError, match="query"):
        bmk.nn.TransformerEncoderLayer(D, HEADS, WIDTH)(make(1, 1, L, D))


def calls_of(layer, x):
    return [(call.op, call.backend) for call in bmk.explain(layer, x).calls]


@pytest.fixture
def torchs_choice(monkeypatch):
    """As on a processor where PyTorch's products are fast."""
    monkeypatch.setattr("bigmodel_kernels.nn.transformer.is_faster", lambda *args: False)
    monkeypatch.setattr("bigmodel_kernels.nn.transformer.linear_prefer", lambda *args: ("torch", "cpu"))


@pytest.mark.parametrize("activation", ["relu", "gelu", F.silu], ids=["relu", "gelu", "callable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_sequences_go_to_torchs_one_call_of_the_layer(dtype, activation, torchs_choice):
    theirs, ours = pair("TransformerEncoderLayer", D, HEADS, WIDTH, 0.1, activation, batch_first=True, dtype=dtype)
    theirs.eval(), ours.eval()
    x = make(N, L, D, dtype=dtype)
    whole = [("transformer_encoder_layer", "torch")]
    with torch.no_grad():
        assert (calls_of(ours, x) == whole) == (activation != F.silu)
        if activation != F.silu:
            assert torch.equal(ours(x), theirs(x))
        for name in ("cpu", "torch"):
            with bmk.use_backend(name):
                assert whole != calls_of(ours, x)
                torch.testing.assert_close(ours(x), theirs(x), rtol=1e-2, atol=2e-2)
    assert whole != calls_of(ours, x)  # there may be a gradient
    assert ours.activation_relu_or_gelu == 0
    assert type(ours.self_attn) is bmk.nn.MultiheadAttention
    with torch.no_grad():
        assert whole != calls_of(ours.train(), x)


@pytest.fixture
def our_choice(monkeypatch):
    monkeypatch.setattr("bigmodel_kernels._cpu.mkl_on_amd", lambda: True)


ONE_CALL = [("encoder_layer", "cpu")]


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_inference_is_one_call_of_the_layer(activation, batch_first, norm_first, our_choice):
    options = {"batch_first": batch_first, "norm_first": norm_first}
    _, ours = pair("TransformerEncoderLayer", D, HEADS, WIDTH, 0.1, activation, **options)
    ours.eval()
    for p in ours.parameters():
        torch.nn.init.normal_(p)
    x = make(N, L, D) if batch_first else make(L, N, D)
    causal = torch.nn.Transformer.generate_square_subsequent_mask(L)
    per_head = make(N * HEADS, L, L) > -1
    for call in (
        {},
        {"src_mask": causal},
        {"src_mask": causal, "is_causal": True},
        {"src_mask": per_head},
        {"src_key_padding_mask": padding()},
        {"src_mask": causal < 0, "src_key_padding_mask": padding()},
    ):
        expected = ours(x, **call).detach()  # with gradients recorded the layer goes by its blocks
        with torch.no_grad():
            assert [(c.op, c.backend) for c in bmk.explain(ours, x, **call).calls] == ONE_CALL
            result = ours(x, **call)
        assert result.is_contiguous()
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_no_call_of_the_whole_layer_where_its_parts_matter(our_choice):
    x = make(N, L, D)

    def layer():
        torch.manual_seed(0)
        return bmk.nn.TransformerEncoderLayer(D, HEADS, WIDTH, 0.5, batch_first=True).eval()

    def listen(part):
        part.register_forward_hook(lambda *args: None)

    changes = {
        "no change": lambda m: None,
        "training": lambda m: m.train(),
        "dropout alone": lambda m: m.dropout1.train(),
        "attention alone": lambda m: m.self_attn.train(),
        "hook on attention": lambda m: listen(m.self_attn),
        "hook on linear": lambda m: listen(m.linear2),
        "hook on dropout": lambda m: listen(m.dropout),
        "parametrization": lambda m: torch.nn.utils.parametrizations.weight_norm(m.linear1),
        "two eps": lambda m: setattr(m.norm2, "eps", 1e-3),
        "another norm": lambda m: setattr(m, "norm1", torch.nn.Identity()),
        "another activation": lambda m: setattr(m, "activation", torch.tanh),
        "another backend": lambda m: setattr(m.self_attn, "backend", "torch"),
    }
    for name, change in changes.items():
        changed = layer()
        change(changed)
        with torch.no_grad():
            assert (calls_of(changed, x) == ONE_CALL) == (name == "no change"), name
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert calls_of(layer(), x) != ONE_CALL
    with torch.no_grad(), bmk.use_backend("torch"):
        assert calls_of(layer(), x) != ONE_CALL
    for wrong in (make(N, L, D + 1), make(N, L, D, dtype=torch.float64)):
        with pytest.raises((RuntimeError, AssertionError)), torch.no_grad():
            layer()(wrong)
    with pytest.raises(RuntimeError, match="is_causal hint"), torch.no_grad():
        layer()(x, is_causal=True)


def test_the_one_call_reads_parameters_as_they_are(our_choice):
    layer = bmk.nn.TransformerEncoderLayer(D, HEADS, WIDTH, 0.0, batch_first=True).eval()
    x = make(N, L, D)
    for change in (lambda p: p.data.mul_(1.5), lambda p: setattr(p, "data", torch.randn_like(p))):
        for p in layer.parameters():
            change(p)
        expected = layer(x).detach()
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_torchs_one_call_does_not_pass_over_what_a_layer_was_given(torchs_choice):
    x = make(N, L, D)

    class Doubled(bmk.nn.TransformerEncoderLayer):
        def _ff_block(self, x):
            return 2 * super()._ff_block(x)

    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    torch.manual_seed(0)
    doubled = Doubled(D, HEADS, WIDTH, 0.0, batch_first=True).eval()
    adapted = bmk.nn.TransformerEncoderLayer(D, HEADS, WIDTH, 0.0, batch_first=True).eval()
    adapted.linear1 = Adapted(D, WIDTH)
    hooked = bmk.nn.TransformerEncoderLayer(D, HEADS, WIDTH, 0.0, batch_first=True).eval()
    hooked.linear2.register_forward_hook(lambda layer, args, out: out + 1)
    for layer in (doubled, adapted, hooked):
        expected = layer(x).detach()  # with gradients recorded the layer goes by its blocks
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
