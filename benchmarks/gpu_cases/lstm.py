"""LSTM layers against cuDNN's, dense and packed; in fp16 cuDNN has its persistent kernels."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import bigmodel_kernels as bmk
from benchmarks.cases.lstm import lstm_flops
from benchmarks.gpu_bench import Bench, gradients

BACKENDS = ("auto", "cuda", "triton")
# T, B, I, H, layers, bidirectional, packed
CASES = [
    (256, 16, 128, 128, 1, False, False),
    (256, 16, 512, 512, 1, False, False),
    (256, 64, 256, 256, 1, False, False),
    (256, 16, 256, 256, 2, True, False),
    (256, 32, 256, 256, 2, True, True),
    (1024, 16, 768, 768, 1, False, False),
]
DRY = [(5, 3, 4, 16, 1, False, False), (6, 3, 4, 16, 2, True, True)]


def measure(bench: Bench) -> None:
    for sizes in bench.pick(CASES, DRY):
        for dtype in bench.dtypes:
            _case(bench, *sizes, dtype)


def _case(bench, steps, batch, inputs, hidden, layers, both, packed, dtype) -> None:
    torch.manual_seed(0)
    stock = nn.LSTM(inputs, hidden, layers, bidirectional=both, device=bench.device, dtype=dtype)
    stock.flatten_parameters()
    double = copy.deepcopy(stock).double()
    x = bench.draw(steps, batch, inputs, dtype=dtype)
    lengths = torch.linspace(steps, max(1, steps // 5), batch).long()
    valid = int(lengths.sum()) if packed else steps * batch

    def sequence(x: Tensor) -> Tensor | PackedSequence:
        return pack_padded_sequence(x, lengths) if packed else x

    def output(layer: nn.Module, x: Tensor | PackedSequence) -> Tensor:
        out = layer(x)[0]
        return out.data if packed else out

    def ours(backend: str) -> nn.Module:
        layer = bmk.nn.LSTM(inputs, hidden, layers, bidirectional=both, device=bench.device, dtype=dtype)
        layer.load_state_dict(stock.state_dict())
        layer.backend = backend
        return layer

    given, models = sequence(x), {backend: ours(backend) for backend in BACKENDS}
    name = f"lstm {str(dtype)[6:]} T{steps} B{batch} H{hidden} L{layers}{' bi' * both}{' packed' * packed}"
    flops = lstm_flops(valid, inputs, hidden, layers, 1 + both)
    weights = sum(p.numel() for p in stock.parameters())
    traffic = x.element_size() * (valid * (inputs + hidden * (1 + both)) + weights)
    rules = {"dtype": dtype, "steps": steps}
    with torch.no_grad():
        exact = output(double, sequence(x.double()))
        bench.compare(
            f"{name} fwd",
            {backend: lambda m=m: output(m, given) for backend, m in models.items()},
            {"cuDNN": lambda: output(stock, given)},
            exact, flops=flops, traffic=traffic, **rules,
        )  # fmt: skip
    upstream = bench.draw(*exact.shape, dtype=dtype)
    truth = torch.autograd.grad(output(double, sequence(x.double())), list(double.parameters()), upstream.double())

    def trained(layer: nn.Module):
        return gradients(lambda: output(layer, given), layer.parameters(), upstream)

    bench.compare(
        f"{name} fwd+bwd",
        {backend: trained(m) for backend, m in models.items()},
        {"cuDNN": trained(stock)},
        truth, flops=3 * flops, traffic=3 * traffic, gradient=True, **rules,
    )  # fmt: skip
