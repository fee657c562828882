"""No op keeps memory of the heap from one call to the next.

A few bytes lost at a call are more than they seem: each lies between two blocks of the heap and keeps them from becoming
one again, so that a training loop which lost 48 bytes a convolution grew by gigabytes.
"""

import ctypes
import gc

import pytest
import torch

import bigmodel_kernels as bmk

LIBC = ctypes.CDLL(None)
CALLS, ROUNDS = 100, 3

pytestmark = pytest.mark.skipif(
    not hasattr(LIBC, "mallinfo2"), reason="mallinfo2 of glibc 2.33 counts the bytes in use"
)


@pytest.fixture(autouse=True, scope="module")
def _collect_what_the_tests_make():
    """What was there before, imported modules and other tests', is not looked through at every count: 0.3 s each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class MallInfo(ctypes.Structure):
    NAMES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = tuple((name, ctypes.c_size_t) for name in NAMES)


def bytes_in_use() -> int:
    gc.collect()
    LIBC.mallinfo2.restype = MallInfo
    return LIBC.mallinfo2().uordblks


def bytes_kept_by_a_call(function) -> float:
    """The least of a few rounds: a cache or a table that grows once does not count, a loss at every call does."""
    for _ in range(CALLS):  # plans, pools, the allocator's own lists
        function()
    least = float("inf")
    for _ in range(ROUNDS):
        before = bytes_in_use()
        for _ in range(CALLS):
            function()
        least = min(least, (bytes_in_use() - before) / CALLS)
    return least


def image(channels=4, size=8):
    return torch.randn(2, channels, size, size)


def heads(keys=16, dtype=torch.float32):
    return torch.randn(1, 2, keys, 16, dtype=dtype)


ENDS = torch.tensor([0, 4, 16], dtype=torch.int32)  # of two sequences
CLASSES = torch.arange(8)
LENGTH = torch.tensor([20], dtype=torch.int32)

# Name -> function of the tensors that follow it.
CASES = {
    "conv": (
        lambda x, w, b: bmk.conv(x, w, b, padding=1, activation="relu", backend="cpu"),
        image(), torch.randn(8, 4, 3, 3), torch.randn(8),
    ),
    "conv_pool": (lambda x, w: bmk.conv(x, w, pool=("max", 2), backend="cpu"), image(1), torch.randn(8, 1, 3, 3)),
    "conv_depthwise": (lambda x, w: bmk.conv(x, w, groups=4, backend="cpu"), image(), torch.randn(4, 1, 3, 3)),
    "conv_transposed": (lambda x, w: bmk.conv(x, w, stride=2, transposed=True, backend="cpu"), image(), torch.randn(4, 8, 4, 4)),
    "conv_auto": (lambda x, w: bmk.conv(x, w, activation="silu"), image(), torch.randn(8, 4, 3, 3)),
    "gated_conv": (
        lambda x, w, o: bmk.gated_conv(x, w, out_weight=o, dilation=2, backend="cpu")[0],
        torch.randn(1, 8, 16), torch.randn(16, 8, 2), torch.randn(8, 8, 1),
    ),
    "linear": (
        lambda x, w, b: bmk.linear(x, w, b, activation="gelu", backend="cpu"),
        torch.randn(8, 16), torch.randn(16, 16), torch.randn(16),
    ),
    "attention": (lambda q, k, v: bmk.attention(q, k, v, backend="cpu"), heads(), heads(), heads()),
    "attention_mask": (
        lambda q, k, v, m: bmk.attention(q, k, v, attn_mask=m, backend="cpu"), heads(), heads(), heads(), torch.randn(16, 16),
    ),
    "attention_bf16": (
        lambda q, k, v: bmk.attention(q, k, v, is_causal=True, backend="cpu"),
        *(heads(dtype=torch.bfloat16) for _ in range(3)),
    ),
    "attention_varlen": (
        lambda q, k, v: bmk.attention_varlen(q, k, v, ENDS, ENDS, 12, 12, backend="cpu"),
        *(torch.randn(16, 2, 16) for _ in range(3)),
    ),
    "attention_decode": (
        lambda q, k, v: bmk.attention_decode(q, k.detach(), v.detach(), LENGTH, backend="cpu"), heads(1), heads(32), heads(32),
    ),
    "bias_act": (lambda x, b: bmk.bias_act(x, b, activation="gelu"), torch.randn(8, 16), torch.randn(16)),
    "rms_norm": (lambda x, w: bmk.rms_norm(x, w, backend="cpu"), torch.randn(8, 16), torch.randn(16)),
    "layer_norm": (lambda x, w, b: bmk.layer_norm(x, w, b, backend="cpu"), torch.randn(8, 16), torch.randn(16), torch.randn(16)),
    "cross_entropy": (lambda x: bmk.cross_entropy(x, CLASSES, backend="cpu"), torch.randn(8, 10)),
}  # fmt: skip

LAYERS = {
    "lstm": (lambda: bmk.nn.LSTM(8, 8, 2, bidirectional=True), torch.randn(5, 3, 8)),
    "lstm_cell": (lambda: bmk.nn.LSTMCell(8, 8), torch.randn(3, 8)),
    "norm_lstm": (lambda: bmk.nn.LayerNormLSTM(8, 8), torch.randn(5, 3, 8)),
    "multihead_attention": (lambda: bmk.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.randn(2, 8, 16)),
}


def first(result):
    return result[0] if isinstance(result, tuple) else result


def check(function, inputs, training):
    inputs = [t.clone().requires_grad_(training) for t in inputs]

    def call():
        with torch.set_grad_enabled(training):
            result = first(function(*inputs))
        if training and result.requires_grad:
            torch.autograd.grad(result.sum(), [t for t in inputs if t.requires_grad], allow_unused=True)

    kept = bytes_kept_by_a_call(call)
    assert kept < 16, f"{kept:.0f} bytes a call"


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", CASES)
def test_ops_keep_no_memory(name, training):
    function, *inputs = CASES[name]
    check(function, inputs, training)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_keep_no_memory(name, training):
    make, x = LAYERS[name]
    torch.manual_seed(0)
    check(make(), [x], training)


@torch.no_grad()
def test_a_streaming_step_keeps_no_memory():
    layer = bmk.nn.CausalConv1d(8, 8, 2, dilation=2)
    x, state = torch.randn(1, 8), None

    def step():
        nonlocal state
        _, state = layer.step(x, state)

    assert bytes_kept_by_a_call(step) < 16
