"""Whole models in inference and training: ours on each backend against the same model in plain torch.nn, eager and compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import bigmodel_kernels as bmk
import bigmodel_models as models
from benchmarks import plain_models
from benchmarks.cases.models import PlainCNN, PlainRNN, PlainTransformer
from benchmarks.gpu_bench import Bench, gradients

BACKENDS = ("auto", "cuda", "triton")


@dataclass(frozen=True)
class Model:
    """A model, its plain twin, and what it is fed; each built at the sizes to measure or at tiny ones."""

    name: str
    ours: Callable[[bool], nn.Module]
    plain: Callable[[bool], nn.Module]
    inputs: Callable[[bool], tuple[Tensor, ...]]
    compiles: bool = True  # as a whole: dynamo takes no nn.LSTM
    float32: bool = (
        False  # measured in float32 too, as PyTorch's switches have it, which is how small models are trained
    )


def image(batch: int, channels: int, size: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, channels, size, size),)


def transformer(dry: bool, cls: type, **options) -> nn.Module:
    return cls(*((28, 16, 32, 1, 2) if dry else (28, 512, 2048, 6, 8)), **options)


def bert(dry: bool) -> tuple[int, ...]:  # vocabulary, width, layers, heads, feed-forward
    return (50, 16, 1, 2, 32) if dry else (30522, 768, 12, 12, 3072)


def gpt(dry: bool) -> tuple[int, ...]:  # vocabulary, width, layers, heads
    return (50, 16, 1, 2) if dry else (50257, 768, 12, 12)


def wavenet(dry: bool) -> tuple[int, ...]:  # classes, channels, skip channels, layers, stacks
    return (16, 16, 16, 2, 1) if dry else (256, 64, 256, 10, 3)


def speech(dry: bool) -> tuple[Tensor, ...]:
    batch, steps, frequencies = (2, 30, 48) if dry else (16, 1000, 161)
    return torch.randn(batch, steps, frequencies), torch.linspace(steps, steps // 2, batch).long()


MODELS = [
    Model(
        "textbook CNN",
        lambda dry: models.CNN(),
        lambda dry: PlainCNN(),
        lambda dry: image(2 if dry else 256, 1, 28),
        float32=True,
    ),
    Model(
        "textbook RNN",
        lambda dry: models.RNN(28, 16 if dry else 128, 2, 10),
        lambda dry: PlainRNN(28, 16 if dry else 128, 2),
        lambda dry: (torch.randn(2 if dry else 64, 28, 28),),
        compiles=False,
        float32=True,
    ),
    Model(
        "Transformer",
        lambda dry: transformer(dry, models.Transformer, num_classes=10, input_kind="vectors", dropout=0.0),
        lambda dry: transformer(dry, PlainTransformer),
        lambda dry: (torch.randn(2, 9, 28) if dry else torch.randn(32, 512, 28),),
        float32=True,
    ),
    Model(
        "ResNet-50",
        lambda dry: models.ResNet(models.resnet.Bottleneck, (1, 1), 10, widths=(8, 8)) if dry else models.resnet50(),
        lambda dry: plain_models.PlainResNet(
            *(((1, 1), (8, 8)) if dry else ((3, 4, 6, 3), (64, 128, 256, 512))), True, False, 10 if dry else 1000
        ),
        lambda dry: image(2, 3, 33) if dry else image(64, 3, 224),
    ),
    Model(
        "BERT base",
        lambda dry: models.BERTForMaskedLM(*bert(dry), dropout=0.0),
        lambda dry: plain_models.PlainBERT(*bert(dry), 512),
        lambda dry: (torch.randint(1, 50, (2, 9) if dry else (32, 128)),),
    ),
    Model(
        "GPT small",
        lambda dry: models.GPT(*gpt(dry), dropout=0.0),
        lambda dry: plain_models.PlainGPT(*gpt(dry), 1024),
        lambda dry: (torch.randint(50, (2, 9) if dry else (8, 1024)),),
    ),
    Model(
        "WaveNet",
        lambda dry: models.WaveNet(*wavenet(dry)),
        lambda dry: plain_models.PlainWaveNet(*wavenet(dry)),
        lambda dry: (torch.randint(16, (2, 20) if dry else (4, 16000)),),
    ),
    Model(
        "Deep Speech",
        lambda dry: models.DeepSpeech(29, 48 if dry else 161, 16 if dry else 800, 1 if dry else 5),
        lambda dry: plain_models.PlainDeepSpeech(29, 48 if dry else 161, 16 if dry else 800, 1 if dry else 5),
        speech,
        compiles=False,
    ),
]


def measure(bench: Bench) -> None:
    for model in MODELS:
        for dtype in dict.fromkeys((bench.dtypes[0], *([torch.float32] if model.float32 else []))):
            for training in (False, True):
                _case(bench, model, dtype, training)


class _On(nn.Module):
    """A model with all its ops on one backend."""

    def __init__(self, model: nn.Module, backend: str) -> None:
        super().__init__()
        self.model, self.backend = model, backend

    def forward(self, *inputs: Tensor) -> Tensor:
        with bmk.use_backend(self.backend):
            out = self.model(*inputs)
        return out if isinstance(out, Tensor) else out[0]


def _case(bench: Bench, model: Model, dtype: torch.dtype, training: bool) -> None:
    torch.manual_seed(0)
    plain = model.plain(bench.dry).to(bench.device).train(training)
    given = model.inputs(bench.dry)
    lengths = [t if t.dim() == 1 else t.to(bench.device) for t in given]  # lengths stay on the CPU

    def cast(to: torch.dtype) -> list[Tensor]:
        return [t.to(to) if t.is_floating_point() else t for t in lengths]

    double, inputs = copy.deepcopy(plain).double(), cast(dtype)
    plain = plain.to(dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        truth = double(*cast(torch.float64))
    flops = float(counter.get_total_flops()) + _recurrent_flops(double, inputs)
    traffic = float(sum(p.numel() * p.element_size() for p in plain.parameters()))

    def ours(backend: str) -> nn.Module:
        built = model.ours(bench.dry).to(bench.device).train(training)
        built.load_state_dict({k: v.detach() for k, v in double.state_dict().items()})
        return _On(built.to(dtype), backend)

    mine = {backend: (ours(backend), inputs) for backend in BACKENDS}
    stock = {"eager": (plain, inputs)}
    if inputs[0].dim() == 4:
        images = [inputs[0].contiguous(memory_format=torch.channels_last)]
        stock["channels_last"] = (copy.deepcopy(plain).to(memory_format=torch.channels_last), images)
        mine["auto channels_last"] = (ours("auto").to(memory_format=torch.channels_last), images)
    if model.compiles:
        last, fed = list(stock.values())[-1]
        stock["compile"] = (bench.compiled(copy.deepcopy(last)), fed)
    name = f"{model.name} {str(dtype)[6:]} {'x'.join(map(str, inputs[0].shape))}"
    if not training:
        with torch.no_grad():
            bench.compare(
                f"{name} fwd",
                {n: lambda m=m, x=x: m(*x) for n, (m, x) in mine.items()},
                {n: lambda m=m, x=x: m(*x) for n, (m, x) in stock.items()},
                truth, dtype=dtype, flops=flops, traffic=traffic, whole=True,
            )  # fmt: skip
        return
    upstream = torch.randn(truth.shape, device=bench.device).to(dtype)
    names = [n for n, _ in double.named_parameters()]
    wanted = gradients(lambda: double(*cast(torch.float64)), double.parameters(), upstream.double())()
    exact = torch.cat([g.flatten() for g in wanted])

    def trained(contestants: dict) -> dict[str, Callable]:
        return {n: _step(m, x, names, upstream) for n, (m, x) in contestants.items()}

    bench.compare(
        f"{name} fwd+bwd", trained(mine), trained(stock), exact,
        dtype=dtype, flops=3 * flops, traffic=3 * traffic, gradient=True, whole=True,
        part=lambda grads: torch.cat([g.flatten() for g in grads]),
    )  # fmt: skip


def _step(
    model: nn.Module, inputs: list[Tensor], names: list[str], upstream: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward; the gradients in the order of the plain model's parameters."""
    known = {name.removeprefix("model.").removeprefix("_orig_mod."): p for name, p in model.named_parameters()}
    return gradients(lambda: model(*inputs), [known[name] for name in names], upstream.to(next(iter(known.values()))))


def _recurrent_flops(model: nn.Module, inputs: list[Tensor]) -> float:
    """Of the LSTM layers, which torch's counter does not know; a speech model's run on half of the frames."""
    total = 0.0
    for layer in model.modules():
        if isinstance(layer, nn.LSTM):
            steps = inputs[0].shape[0] * inputs[0].shape[1]
            if len(inputs) > 1:
                steps = int(inputs[1].sum()) // 2
            total += 2.0 * steps * sum(w.numel() for w in layer.parameters() if w.dim() == 2)
    return total
