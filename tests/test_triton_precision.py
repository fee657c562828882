"""float32 products of the Triton kernels are IEEE unless PyTorch's own switches allow TF32: what kernels are launched with."""

import pytest
import torch

pytest.importorskip("triton")

import bigmodel_kernels as bmk
from benchmarks.launch import stubbed
from bigmodel_kernels import _triton

MATMUL, CONV, RNN = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn


def attention(dtype):
    q = torch.zeros(1, 1, 4, 8, dtype=dtype, requires_grad=True)
    bmk.attention(q, q, q, backend="triton").sum().backward()


def conv(dtype):
    x = torch.zeros(1, 4, 5, 5, dtype=dtype, requires_grad=True)
    weight = torch.zeros(4, 4, 3, 3, dtype=dtype, requires_grad=True)
    bmk.conv(x, weight, backend="triton").sum().backward()


def lstm(dtype):
    x, state = torch.zeros(2, 1, 4, dtype=dtype, requires_grad=True), torch.zeros(1, 1, 16, dtype=dtype)
    weights = [torch.zeros(64, n, dtype=dtype, requires_grad=True) for n in (4, 16)]
    bmk.lstm(x, (state, state), weights, backend="triton")[0].sum().backward()


@pytest.fixture
def switches(monkeypatch):
    """Sets switches by name; all are as before afterwards."""
    named = {"matmul": MATMUL, "conv": CONV, "rnn": RNN}
    before = {name: switch.fp32_precision for name, switch in named.items()}

    def switch_to(**values):
        for name, value in values.items():
            named[name].fp32_precision = value

    switch_to(matmul="ieee", conv="ieee", rnn="ieee")
    yield switch_to
    switch_to(**before)


@pytest.fixture
def precisions(monkeypatch):
    """What PRECISION the kernels launched in a call have, forward and backward."""

    def of(call, dtype=torch.float32):
        found = []
        with stubbed():
            monkeypatch.setattr(_triton, "launch", lambda *args, **constants: found.append(constants.get("PRECISION")))
            call(dtype)
        return {precision for precision in found if precision is not None}, len(found)

    return of


@pytest.mark.parametrize(("call", "needed"), [(attention, ["matmul"]), (conv, ["conv"]), (lstm, ["matmul", "rnn"])])
def test_float32_follows_the_switches(call, needed, switches, precisions):
    found, launches = precisions(call)
    assert found == {"ieee"}
    assert launches >= 2  # forward and backward
    switches(**{name: "tf32" for name in ("matmul", "conv", "rnn") if name not in needed})
    assert precisions(call)[0] == {"ieee"}  # another op's
    for name in needed:
        switches(matmul="ieee", conv="ieee", rnn="ieee")
        switches(**{other: "tf32" for other in needed if other != name})
        assert precisions(call)[0] == {"ieee"}  # one of two
    switches(**dict.fromkeys(needed, "tf32"))
    assert precisions(call)[0] == {"tf32"}
    assert precisions(call, torch.float16)[0] == {"ieee"}


def test_the_older_switch_counts(switches):
    before = MATMUL.allow_tf32
    MATMUL.allow_tf32 = True
    assert _triton.precision(torch.float32) == "tf32"
    MATMUL.allow_tf32 = False
    assert _triton.precision(torch.float32) == "ieee"
    MATMUL.allow_tf32 = before
