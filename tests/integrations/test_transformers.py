"""transformers on bmk.attention: against a stand-in with its documented interfaces, and where it is installed, against itself."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bigmodel_kernels as bmk
import bigmodel_models as models
from bigmodel_kernels.integrations.transformers import NAME, attention_forward


class Interface(dict):
    """AttentionInterface and AttentionMaskInterface: names and functions, shared by all instances."""

    @classmethod
    def register(cls, key, value):
        cls.known[key] = value


def sdpa_mask(batch_size, q_length, kv_length, q_offset=0, attention_mask=None, **kwargs):
    """As transformers': None where is_causal says the same, else [B, 1, Sq, Sk] bool with the padding of [B, Sk] in it."""
    if q_length == kv_length and (attention_mask is None or bool(attention_mask.all())):
        return None
    mask = (torch.arange(kv_length) <= torch.arange(q_length)[:, None] + q_offset)[None, None]
    mask = mask.expand(batch_size, -1, -1, -1)
    return mask if attention_mask is None else mask & attention_mask[:, None, None].bool()


@pytest.fixture
def stand_in(monkeypatch):
    library, masks = types.ModuleType("transformers"), types.ModuleType("transformers.masking_utils")
    library.__version__ = "5.0.0"
    library.AttentionInterface = type("AttentionInterface", (Interface,), {"known": {}})
    masks.AttentionMaskInterface = type("AttentionMaskInterface", (Interface,), {"known": {}})
    masks.sdpa_mask = sdpa_mask
    library.masking_utils = masks
    monkeypatch.setitem(sys.modules, "transformers", library)
    monkeypatch.setitem(sys.modules, "transformers.masking_utils", masks)
    return library


class Model(nn.Module):
    """A decoder layer as transformers writes one: packed projections, grouped keys, everything else through the interfaces."""

    def __init__(self, library, supports=True):
        super().__init__()
        self.library, self.supports = library, supports
        self.config = types.SimpleNamespace(_attn_implementation="sdpa")
        self.heads, self.kv_heads, self.is_causal = 4, 2, True
        self.num_key_value_groups = 2
        self.proj = nn.Linear(16, (4 + 2 * 2) * 8).double()

    def set_attn_implementation(self, name):
        if self.supports:
            self.config._attn_implementation = name

    def forward(self, x, padding=None):
        name = self.config._attn_implementation
        masks = self.library.masking_utils.AttentionMaskInterface.known
        mask = masks[name](x.shape[0], x.shape[1], x.shape[1], attention_mask=padding) if name in masks else None
        packed = self.proj(x).unflatten(-1, (8, 8)).transpose(1, 2)
        q, k, v = packed.split((4, 2, 2), 1)
        function = self.library.AttentionInterface.known[name]
        out, weights = function(self, q, k, v, mask, dropout=0.0, scaling=0.3, position_ids=None, use_cache=False)
        assert weights is None
        assert out.is_contiguous()
        return out.flatten(2)


def expected(model, x, padding=None):
    q, k, v = model.proj(x).unflatten(-1, (8, 8)).transpose(1, 2).split((4, 2, 2), 1)
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()[None, None]
    mask = mask if padding is None else mask & padding[:, None, None].bool()
    scores = (q @ k.mT * 0.3).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1).nan_to_num() @ v).transpose(1, 2).flatten(2)


def test_a_model_runs_on_it(stand_in):
    model = Model(stand_in)
    assert bmk.integrations.transformers.register(model) == NAME
    assert model.config._attn_implementation == NAME
    x = torch.randn(3, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(model(x), expected(model, x))
    padding = torch.arange(7) < torch.tensor([[7], [4], [1]])
    torch.testing.assert_close(model(x, padding), expected(model, x, padding))
    torch.testing.assert_close(
        model(x, padding.flip(1)), expected(model, x, padding.flip(1))
    )  # left: rows of padding are 0


def test_its_name_is_none_that_transformers_treats_as_special(stand_in):
    assert not any(word in NAME for word in ("flash", "sdpa", "flex", "eager", "/", "|", ":"))
    bmk.integrations.transformers.register()
    bmk.integrations.transformers.register()  # twice is once
    assert set(stand_in.AttentionInterface.known) == set(stand_in.masking_utils.AttentionMaskInterface.known) == {NAME}


def test_a_model_that_does_not_use_the_interface(stand_in):
    with pytest.raises(RuntimeError, match=r"Model does not take .*'sdpa' as before.*optimize"):
        bmk.integrations.transformers.register(Model(stand_in, supports=False))


class TestFunction:
    def tensors(self, queries=5, keys=5, heads=4, kv_heads=4):
        shapes = ((2, heads, queries, 8), (2, kv_heads, keys, 8), (2, kv_heads, keys, 8))
        return [torch.randn(shape, dtype=torch.float64) for shape in shapes]

    def run(self, *args, causal=True, **options):
        return attention_forward(types.SimpleNamespace(is_causal=causal), *args, **options)[0].transpose(1, 2)

    def test_causality_is_the_arguments_then_the_modules_then_on(self):
        q, k, v = self.tensors()
        full, causal = (F.scaled_dot_product_attention(q, k, v, is_causal=flag) for flag in (False, True))
        torch.testing.assert_close(self.run(q, k, v, None, causal=False), full)
        torch.testing.assert_close(self.run(q, k, v, None, causal=True), causal)
        torch.testing.assert_close(self.run(q, k, v, None, causal=True, is_causal=False), full)
        torch.testing.assert_close(self.run(q, k, v, None, causal=False, is_causal=True), causal)
        torch.testing.assert_close(attention_forward(object(), q, k, v, None)[0].transpose(1, 2), causal)

    def test_a_single_query_sees_every_key(self):
        q, k, v = self.tensors(queries=1)
        torch.testing.assert_close(self.run(q, k, v, None), F.scaled_dot_product_attention(q, k, v))

    def test_more_keys_than_queries_are_aligned_at_the_first(self):
        q, k, v = self.tensors(queries=3, keys=6)
        torch.testing.assert_close(self.run(q, k, v, None), F.scaled_dot_product_attention(q, k, v, is_causal=True))

    @pytest.mark.parametrize("floating", [False, True])
    def test_a_mask_is_all_there_is(self, floating):
        q, k, v = self.tensors()
        mask = torch.rand(2, 1, 5, 5) > 0.4
        mask[..., 0] = True
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf")) if floating else mask
        longer = F.pad(mask, (0, 3))  # of a cache of fixed size
        for given in (mask, longer):
            found = self.run(q, k, v, given, is_causal=True, sliding_window=2)
            torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, mask))

    def test_grouped_queries_and_scaling(self):
        q, k, v = self.tensors(kv_heads=2)
        exact = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7, enable_gqa=True)
        torch.testing.assert_close(self.run(q, k, v, None, scaling=0.7), exact)

    @pytest.mark.parametrize("queries", [6, 1])
    def test_sliding_window_without_a_mask(self, queries):
        q, k, v = self.tensors(queries=queries, keys=6)
        position = torch.arange(6)[6 - queries :, None]
        seen = (torch.arange(6) <= position) & (torch.arange(6) > position - 3)
        exact = F.scaled_dot_product_attention(q, k, v, seen)
        torch.testing.assert_close(self.run(q, k, v, None, sliding_window=3), exact)

    def test_softcap(self):
        q, k, v = self.tensors()
        scores = 2.0 * torch.tanh(q @ k.mT / 8**0.5 / 2.0)
        scores = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), float("-inf"))
        torch.testing.assert_close(self.run(q, k, v, None, softcap=2.0), scores.softmax(-1) @ v)

    def test_dropout(self):
        q, k, _ = self.tensors(queries=64, keys=64)
        out = self.run(q, k, torch.ones_like(k), None, causal=False, dropout=0.5)
        assert out.std() > 0.01
        assert out.mean().item() == pytest.approx(1.0, abs=0.05)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"s_aux": torch.ones(4)}, "s_aux: .*'eager'"),
            ({"position_bias": torch.ones(1)}, "position_bias: "),
            ({"head_mask": torch.ones(4)}, "head_mask: "),
            ({"cache": object()}, "cache: "),
            ({"output_attentions": True}, "output_attentions: "),
        ],
    )
    def test_what_it_does_not_have_is_refused(self, options, words):
        with pytest.raises(ValueError, match=words):
            self.run(*self.tensors(), None, **options)


class TestMissing:
    def test_not_installed(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(ImportError, match=r"transformers is not installed: pip install 'transformers>=4.53'"):
            bmk.integrations.transformers.register()

    @pytest.mark.parametrize("missing", ["AttentionInterface", "AttentionMaskInterface", "sdpa_mask"])
    def test_too_old(self, stand_in, missing):
        delattr(stand_in if missing == "AttentionInterface" else stand_in.masking_utils, missing)
        stand_in.__version__ = "4.40.0"
        with pytest.raises(ImportError, match=f"transformers 4.40.0 is too old .*{missing}.*pip install"):
            bmk.integrations.transformers.register()

    def test_too_old_to_have_masks(self, stand_in, monkeypatch):
        del stand_in.masking_utils
        monkeypatch.setitem(sys.modules, "transformers.masking_utils", None)
        with pytest.raises(ImportError, match="too old"):
            bmk.integrations.transformers.register()


@pytest.mark.parametrize("kind", ["Bert", "GPT2", "Llama"])
def test_with_transformers_itself(kind):
    """Small models with random weights: the same logits as its eager attention, padding included."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 31}
    options = {
        "Bert": sizes | {"intermediate_size": 64},
        "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 31, "bos_token_id": 0, "eos_token_id": 0},
        "Llama": sizes | {"intermediate_size": 64, "num_key_value_heads": 2},
    }[kind]
    config = getattr(transformers, kind + "Config")(**options)
    config._attn_implementation = "eager"
    model = getattr(transformers, kind + "Model")(config).eval()
    tokens = torch.randint(1, 31, (2, 9))
    padding = torch.ones(2, 9, dtype=torch.int64)
    padding[1, 6:] = 0
    with torch.no_grad():
        exact = model(tokens, attention_mask=padding).last_hidden_state
        bmk.integrations.transformers.register(model)
        found = model(tokens, attention_mask=padding).last_hidden_state
    torch.testing.assert_close(found[padding.bool()], exact[padding.bool()], rtol=1e-4, atol=1e-5)


def test_weights_of_transformers_go_into_our_models():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokens = torch.randint(1, 31, (2, 9))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    bert = transformers.BertConfig(vocab_size=31, max_position_embeddings=12, **sizes)
    gpt = transformers.GPT2Config(
        vocab_size=31, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    for theirs, ours in (
        (transformers.BertForMaskedLM(bert), models.BERTForMaskedLM(31, 32, 2, 4, 64, max_length=12)),
        (
            transformers.BertForSequenceClassification(bert),
            models.BERTForClassification(2, 31, 32, 2, 4, 64, max_length=12),
        ),
        (transformers.GPT2LMHeadModel(gpt), models.GPT(31, 32, 2, 4, max_length=16)),
    ):
        ours.load_state_dict(theirs.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(ours.eval()(tokens), theirs.eval()(tokens).logits, rtol=1e-4, atol=1e-5)
