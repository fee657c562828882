"""Every op of backend `cpu` gives the same bits for any number of threads when torch asks for it: results and all gradients."""

import math

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels import _registry
from bigmodel_kernels.ops import names
from bigmodel_kernels.testing import make

STARTS = torch.tensor([0, 150, 153, 400], dtype=torch.int32)


def on_cpu(function, **options):
    return lambda *tensors: function(*tensors, backend="cpu", **options)


def attention(**options):
    return lambda q, k, v, mask: bmk.attention(q, k, v, attn_mask=mask, return_lse=True, backend="cpu", **options)


def varlen(q, k, v):
    return bmk.attention_varlen(q, k, v, STARTS, STARTS, 247, 247, is_causal=True, backend="cpu")


def decode(q, k, v):
    with torch.no_grad():
        return bmk.attention_decode(q, k, v, torch.tensor([700, 1999]), backend="cpu")


def gated(x, *tensors):
    return bmk.gated_conv(x, *tensors[:-1], skip=tensors[-1], dilation=3, backend="cpu")


def conv_step(x_t, weight, bias, out_weight, out_bias):
    with torch.no_grad():
        state = bmk.ConvState.start(x_t.shape[0], x_t.shape[1], weight.shape[2], 1, x_t)
        y, _, _ = bmk.conv_step(
            x_t, state, weight, bias, out_weight, out_bias, activation="tanh_sigmoid", backend="cpu"
        )
    return y


def conv_inference(x, weight, bias):
    with torch.no_grad():
        return bmk.conv(x, weight, bias, padding=1, activation="relu", pool=("max", 2), backend="cpu")


def lstm(**options):
    def run(x, h, c, *weights):
        output, states = bmk.lstm(x, (h, c), weights, backend="cpu", **options)
        return output, *states

    return run


def lstm_cell(x, h, c, *weights):
    return bmk.lstm_cell(x, (h, c), *weights, backend="cpu")


def norm_lstm(a, h, c, *rest):
    output, states = bmk.norm_lstm(a, (h, c), *rest, backend="cpu")
    return output, *states


def layer_norm(x, weight, bias, residual):
    return bmk.layer_norm(x, weight, bias, residual=residual, backend="cpu")


def smooth(logits):
    return bmk.cross_entropy(logits, torch.arange(len(logits)) % 90, label_smoothing=0.1, backend="cpu")


@torch.no_grad()
def encoder_layer(*tensors):
    return bmk.encoder_layer(*tensors, num_heads=6, activation="gelu_tanh", backend="cpu")


@torch.no_grad()
def decoder_step(x, k_cache, v_cache, *weights):
    lengths = torch.tensor([700, 3, 999])
    return bmk.decoder_step(x, k_cache, v_cache, lengths, *weights, num_heads=6, backend="cpu"), k_cache, v_cache


QKV = ((2, 3, 300, 33),) * 3
LAYER = ((1280, 40), (1280, 320), (1280,), (1280,))
CELL = ((37, 40), (37, 320), (37, 320), *LAYER)
ROWS, ROW = (700, 96), (96,)
CODER = ((288, 96), (288,), (96, 96), (96,), (330, 96), (330,), (96, 330), (96,), *(ROW,) * 4)
GATED = ((48, 24, 2), (48,), (24, 24, 1), (24,))

# id: op, call, shapes of its tensors. Large enough for every kernel to share its work among threads.
CALLS = {
    "attention": ("attention", attention(is_causal=True), (*QKV, (1, 3, 300, 300))),
    "attention dropout": ("attention", attention(dropout_p=0.3), (*QKV, (300, 300))),
    "attention one query": ("attention", attention(), ((1, 4, 1, 33), (1, 4, 1500, 33), (1, 4, 1500, 33), (1, 1500))),
    "attention varlen": ("attention_varlen", varlen, ((400, 3, 33),) * 3),
    "attention_decode": ("attention_decode", decode, ((2, 4, 1, 33), (2, 2, 2000, 33), (2, 2, 2000, 33))),
    "conv 1-d": ("conv", on_cpu(bmk.conv, padding="causal", dilation=3), ((2, 17, 700), (20, 17, 3), (20,))),
    "conv 2-d": ("conv", on_cpu(bmk.conv, padding=2, stride=2), ((3, 9, 40, 41), (20, 9, 5, 5), (20,))),
    "conv stem": ("conv", on_cpu(bmk.conv, padding=3, stride=2), ((2, 3, 80, 80), (40, 3, 7, 7), (40,))),
    "conv pointwise": ("conv", on_cpu(bmk.conv), ((2, 64, 24, 24), (130, 64, 1, 1), (130,))),
    "conv Winograd": ("conv", on_cpu(bmk.conv, padding=1), ((3, 40, 20, 21), (48, 40, 3, 3), (48,))),
    "conv Winograd, tiles of 4": ("conv", on_cpu(bmk.conv, padding=1), ((1, 64, 57, 64), (50, 64, 3, 3), (50,))),
    "conv filtered gradient": ("conv", on_cpu(bmk.conv, padding=1), ((40, 20, 14, 14), (70, 20, 3, 3), (70,))),
    "conv few pixels": ("conv", on_cpu(bmk.conv, padding=1), ((1, 128, 5, 5), (128, 128, 3, 3), (128,))),
    "conv depthwise": ("conv", on_cpu(bmk.conv, padding=1, groups=70), ((2, 70, 30, 31), (70, 1, 3, 3), (70,))),
    "conv groups": ("conv", on_cpu(bmk.conv, padding=1, groups=2), ((2, 32, 20, 20), (34, 16, 3, 3), (34,))),
    "conv transposed": (
        "conv",
        on_cpu(bmk.conv, transposed=True, stride=2, padding=1),
        ((2, 40, 17, 17), (40, 24, 4, 4), (24,)),
    ),
    "conv phases": ("conv", on_cpu(bmk.conv, stride=2, padding=1), ((17, 32, 9, 9), (40, 32, 4, 4), (40,))),
    "conv transposed in phases": (
        "conv",
        on_cpu(bmk.conv, transposed=True, stride=2, padding=1),
        ((2, 40, 17, 33), (40, 32, 4, 4), (32,)),
    ),
    "conv inference": ("conv", conv_inference, ((4, 3, 60, 61), (33, 3, 3, 3), (33,))),
    "conv_step": ("conv_step", conv_step, ((130, 24), *GATED)),
    "gated_conv": ("gated_conv", gated, ((2, 24, 900), *GATED, (30, 24, 1), (30,), (2, 30, 900))),
    "linear": ("linear", on_cpu(bmk.linear, activation="gelu"), ((300, 200), (170, 200), (170,))),
    "linear few rows": ("linear", on_cpu(bmk.linear, activation="relu"), ((5, 512), (600, 512), (600,))),
    "layer_norm": ("norm", layer_norm, (ROWS, ROW, ROW, ROWS)),
    "rms_norm": ("norm", on_cpu(bmk.rms_norm), (ROWS, ROW)),
    "cross_entropy": ("cross_entropy", smooth, (ROWS,)),
    "encoder_layer": ("encoder_layer", encoder_layer, ((3, 150, 96), *CODER)),
    "decoder_step": ("decoder_step", decoder_step, ((3, 96), *((3, 6, 1000, 16),) * 2, *CODER)),
    "lstm": ("lstm", lstm(), ((12, 9, 40), (1, 9, 320), (1, 9, 320), *LAYER)),
    "lstm both ways": (
        "lstm",
        lstm(bidirectional=True),
        ((9, 37, 40), (2, 37, 40), (2, 37, 40), *((160, 40), (160, 40), (160,), (160,)) * 2),
    ),
    "lstm_cell": ("lstm_cell", lstm_cell, CELL),
    "norm_lstm": ("norm_lstm", norm_lstm, ((9, 7, 160), (7, 40), (7, 40), (160, 40), (160,), (40,), (40,))),
}


@pytest.fixture
def deterministic():
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_the_number_of_threads_changes_no_bit(name, dtype, deterministic):
    _, call, shapes = CALLS[name]
    scales = (1 if len(shape) < 2 else min(1, 4 * math.prod(shape[1:]) ** -0.5) for shape in shapes)
    values = [(s * make(*shape, seed=i)).to(dtype) for i, (shape, s) in enumerate(zip(shapes, scales))]
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(4)
        leaves = [v.clone().requires_grad_() for v in values]
        results = call(*leaves)
        results = results if isinstance(results, tuple) else (results,)
        grads = ()
        if results[0].requires_grad:
            upstream = [make(*r.shape, dtype=r.dtype, seed=90 + i) for i, r in enumerate(results)]
            grads = torch.autograd.grad(results, leaves, upstream)
        found.append((*results, *grads))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_every_op_is_among_them():
    assert {op for op, *_ in CALLS.values()} == {op for op in names() if _registry.availability(op, "cpu") is None}
