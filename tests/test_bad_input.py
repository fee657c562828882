"""Every argument of every public function in turn replaced by what does not belong there: the function takes it, or raises
what torch would raise, and never fails by accident."""

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.testing import make

CALLS = {
    "attention": (bmk.attention, {
        "q": make(1, 4, 5, 8), "k": make(1, 4, 5, 8), "v": make(1, 4, 5, 8), "attn_mask": make(5, 5), "scale": 0.5,
        "dropout_p": 0.0, "window": (2, 0), "softcap": 2.0, "alibi_slopes": make(4),
    }),
    "lstm": (bmk.lstm, {
        "x": make(3, 2, 5), "hx": (make(1, 2, 4), make(1, 2, 4)), "weights": [make(16, 5), make(16, 4), make(16), make(16)],
        "num_layers": 1, "dropout": 0.0, "batch_sizes": None,
    }),
    "lstm_cell": (bmk.lstm_cell, {
        "x": make(2, 5), "hx": (make(2, 4), make(2, 4)), "w_ih": make(16, 5), "w_hh": make(16, 4), "b_ih": make(16),
        "b_hh": make(16),
    }),
    "attention_varlen": (bmk.attention_varlen, {
        "q": make(7, 4, 8), "k": make(7, 4, 8), "v": make(7, 4, 8), "cu_seqlens_q": torch.tensor([0, 3, 7]),
        "cu_seqlens_k": torch.tensor([0, 3, 7]), "max_seqlen_q": 4, "max_seqlen_k": 4, "alignment": "upper_left",
        "scale": 0.5, "dropout_p": 0.0, "window": (2, 0), "softcap": 2.0,
    }),
    "attention_decode": (bmk.attention_decode, {
        "q": make(2, 4, 1, 8), "k_cache": make(3, 2, 4, 8), "v_cache": make(3, 2, 4, 8), "cache_seqlens": torch.tensor([4, 7]),
        "block_table": torch.tensor([[0, 0], [1, 2]]), "scale": 0.5, "window": (2, 0), "softcap": 2.0, "k_scale": None,
        "v_scale": None,
    }),
    "conv": (bmk.conv, {
        "x": make(2, 3, 9), "weight": make(4, 3, 2), "bias": make(4), "stride": 1, "padding": 0, "dilation": 1, "groups": 1,
        "output_padding": 0, "scale": make(4), "shift": make(4), "residual": make(2, 4, 8), "activation": "relu",
        "pool": ("max", 2),
    }),
    "gated_conv": (bmk.gated_conv, {
        "x": make(2, 3, 9), "weight": make(8, 3, 2), "bias": make(8), "out_weight": make(3, 4, 1), "out_bias": make(3),
        "skip_weight": make(5, 4, 1), "skip_bias": make(5), "skip": make(2, 5, 9), "dilation": 1,
    }),
    "conv_step": (bmk.conv_step, {
        "x_t": make(2, 3), "state": None, "weight": make(8, 3, 2), "bias": make(8), "out_weight": make(3, 4, 1),
        "out_bias": make(3), "skip_weight": make(5, 4, 1), "skip_bias": make(5), "skip": make(2, 5), "dilation": 1, "groups": 1,
        "activation": "tanh_sigmoid",
    }),
    "linear": (bmk.linear, {
        "x": make(4, 6), "weight": make(5, 6), "bias": make(5), "activation": "relu", "residual": make(4, 5),
    }),
    "layer_norm": (bmk.layer_norm, {
        "x": make(4, 6), "weight": make(6), "bias": make(6), "residual": make(4, 6), "eps": 1e-5,
    }),
    "rms_norm": (bmk.rms_norm, {"x": make(4, 6), "weight": make(6), "residual": make(4, 6), "eps": 1e-5}),
    "norm_lstm": (bmk.norm_lstm, {
        "a": make(3, 2, 16), "hx": (make(2, 4), make(2, 4)), "w": make(16, 4), "gain": make(16), "gain_c": make(4),
        "bias_c": make(4), "eps": 1e-5, "eps_c": 1e-5,
    }),
    "bias_act": (bmk.bias_act, {
        "x": make(4, 6), "bias": make(6), "activation": "relu", "dropout_p": 0.1, "residual": make(4, 6),
    }),
    "decoder_step": (torch.no_grad()(bmk.decoder_step), {
        "x": make(2, 8), "k_cache": make(2, 2, 5, 4), "v_cache": make(2, 2, 5, 4), "lengths": torch.tensor([0, 3]),
        "in_proj_weight": make(24, 8), "in_proj_bias": make(24), "out_proj_weight": make(8, 8), "out_proj_bias": make(8),
        "linear1_weight": make(6, 8), "linear1_bias": make(6), "linear2_weight": make(8, 6), "linear2_bias": make(8),
        "num_heads": 2, "activation": "relu", "eps": 1e-5,
    }),
    "encoder_layer": (bmk.encoder_layer, {
        "x": make(2, 3, 8), "in_proj_weight": make(24, 8), "in_proj_bias": make(24), "out_proj_weight": make(8, 8),
        "out_proj_bias": make(8), "linear1_weight": make(6, 8), "linear1_bias": make(6), "linear2_weight": make(8, 6),
        "linear2_bias": make(8), "norm1_weight": make(8), "norm1_bias": make(8), "norm2_weight": make(8), "norm2_bias": make(8),
        "num_heads": 2, "attn_mask": make(3, 3), "activation": "relu", "eps": 1e-5,
    }),
    "cross_entropy": (bmk.cross_entropy, {
        "logits": make(4, 6), "target": torch.tensor([0, 1, 5, -100]), "ignore_index": -100, "label_smoothing": 0.1,
        "reduction": "mean",
    }),
}  # fmt: skip
FLAGS = {
    "attention": ("is_causal", "enable_gqa", "return_lse", "deterministic"),
    "attention_varlen": ("is_causal", "enable_gqa", "return_lse", "deterministic"),
    "attention_decode": ("is_causal", "return_lse"),
    "conv": ("transposed",),
    "decoder_step": ("norm_first",),
    "encoder_layer": ("is_causal", "norm_first"),
    "lstm": ("bidirectional", "batch_first", "training"),
}
JUNK = (None, "abc", -3, 0, 10**6, 2.5, float("nan"), [1, 2], {}, object(), ("max",), (), float("inf"))
JUNK += (2**70, 1j, (None, None))
ACCIDENTS = (
    "unpack",
    "too large to convert",
    "not iterable",
    "float() argument",
    "could not convert string",
    "has no attribute",
    "not supported between",
    "unsupported operand",
    "unhashable",
    "INTERNAL ASSERT",
)


def wrong_tensors(t):
    yield from (torch.zeros(()), torch.zeros(0), t[None], t[0], torch.cat([t, t]), t[..., :-1], t[:-1], t[:0])
    yield from (t.long(), t > 0, t.to(torch.complex64), t.double(), torch.empty_like(t, device="meta"), t * 0 + 10**6)


def refusal(function, given):
    try:
        function(**given)
    except (ValueError, TypeError, RuntimeError) as error:
        return error
    except IndexError as error:  # torch's own, of a class that is none
        if "Target" not in str(error):
            raise
        return error
    return None


@pytest.mark.parametrize("backend", ["auto", "cpu", "torch"])
@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments_are_refused_not_stumbled_over(name, backend):
    function, right = CALLS[name]
    refused = 0
    for argument, value in right.items():
        for junk in (*JUNK, *(wrong_tensors(value) if isinstance(value, torch.Tensor) else ())):
            given = right | {argument: junk, "backend": backend}
            if name == "conv_step" and argument != "state":
                given["state"] = bmk.ConvState.start(2, 3, 2, 1, right["x_t"])
            error = refusal(function, given)
            refused += error is not None
            assert not any(words in str(error) for words in ACCIDENTS), f"{argument}={junk!r}: {error}"
    assert refused >= 20


@pytest.mark.parametrize(("name", "argument"), [(name, flag) for name, flags in FLAGS.items() for flag in flags])
def test_a_flag_is_a_bool(name, argument):
    """It was taken by what Python takes for true, so that is_causal="False" was causal."""
    function, right = CALLS[name]
    for junk in ("abc", "False", 1, 0.0, [], (), {}, object(), *(() if argument == "deterministic" else (None,))):
        with pytest.raises(TypeError, match=f"{argument} must be a bool, got {type(junk).__name__}"):
            function(**right, **{argument: junk})


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("attention", "scale", 10**400),
        ("attention", "window", 2**70),
        ("attention", "window", (None, 2**70)),
        ("attention_varlen", "softcap", 10**400),
        ("attention_decode", "window", 2**63),
        ("conv", "stride", 2**70),
        ("conv", "activation", ("leaky_relu", 10**400)),
        ("gated_conv", "dilation", 2**70),
        ("layer_norm", "eps", 10**400),
        ("norm_lstm", "eps_c", 10**400),
        ("cross_entropy", "ignore_index", -(2**70)),
        ("lstm", "num_layers", 2**70),
    ],
)
def test_numbers_past_what_a_kernel_takes(name, argument, value):
    function, right = CALLS[name]
    with pytest.raises(ValueError, match=f"{argument} must (fit 64 bits|be a number that a float holds)"):
        function(**right | {argument: value})


@pytest.mark.parametrize("junk", [["cpu"], {}, 1, b"cpu"])
def test_a_backend_that_is_no_name(junk):
    with pytest.raises(ValueError, match="backend must be one of auto, cpu"):
        bmk.linear(make(2, 3), make(4, 3), backend=junk)


@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [
        (lambda: bmk.backends("conv2d"), ValueError, "op must be one of attention, .*; got 'conv2d'"),
        (lambda: bmk.explain(3), TypeError, "function must be an op or another callable, got int"),
        (lambda: bmk.explain(bmk.attention, 1, 2, 3), TypeError, "q must be a tensor, got int"),
        (lambda: bmk.optimize([torch.nn.Linear(2, 2)]), TypeError, "model must be a torch.nn.Module, got list"),
        (lambda: bmk.optimize(torch.nn.Linear(2, 2), filter_fn=3), TypeError, "filter_fn must be callable"),
        (lambda: bmk.optimize(torch.nn.Linear(2, 2), backend="fast"), ValueError, "backend must be one of"),
        (lambda: bmk.nn.WaveNetLayer(4)(torch.zeros(4, 5)), RuntimeError, r"x must have shape \[N, C, T\]"),
        (lambda: bmk.nn.WaveNetLayer(4).step(torch.zeros(1, 4), (1, 2)), TypeError, "state must be a tensor, got int"),
        (lambda: bmk.nn.LayerNormLSTM(0, 3), ValueError, "must be positive, got 0, 3, 1"),
        (lambda: bmk.nn.ConvBlock2d(3, 4, 3, pool=7), ValueError, "pool must be None or"),
    ],
)
def test_what_is_not_an_op(function, kind, message):
    with pytest.raises(kind, match=message):
        function()


@pytest.mark.parametrize("change", [{"transposed": 0}, {"stride": 1.0}, {"groups": True}, {"padding": False}], ids=str)
def test_a_call_like_a_valid_one_of_before_is_checked(change):
    """conv goes by what calls of the same arguments came down to, and 1, 1.0 and True were the same to it."""
    x, w = make(1, 2, 5, 5), make(3, 2, 3, 3)
    for _ in range(2):
        bmk.conv(x, w, stride=1, groups=1, padding=0, transposed=False)
    with pytest.raises((TypeError, ValueError), match=next(iter(change))):
        bmk.conv(x, w, **change)
