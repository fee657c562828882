"""The textbook's models against the same models written in plain torch.nn.

Inference is the forward pass; training is a whole step: loss, gradients of all parameters, update.
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigmodel_kernels as bmk
import bigmodel_models
from benchmarks.baselines import channels_last
from benchmarks.cases import Case, Problem, on_grid
from benchmarks.cases.conv import GRID
from benchmarks.cases.lstm import lstm_flops
from benchmarks.contestant import FWD, Contestant

CLASSES = 10


class PlainCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3, padding=1)
        self.fc1 = nn.Linear(64 * 7 * 7, 128)
        self.fc2 = nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # [B, 1, 28, 28] -> [B, 10]
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.reshape(-1, 64 * 7 * 7))))


class PlainRNN(nn.Module):
    def __init__(self, input_size: int, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(input_size, hidden_size, num_layers, batch_first=True)
        self.fc = nn.Linear(hidden_size, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, input_size] -> [B, 10]
        return self.fc(self.lstm(x)[0][:, -1])


class PlainTransformer(nn.Module):
    """The positions are added by the same table as in the library's model: no layer of ours is in it."""

    def __init__(self, width: int, embedding: int, hidden: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(width, embedding)
        self.positions = bigmodel_models.transformer.SinusoidalPositions(embedding, 512)
        layer = nn.TransformerEncoderLayer(embedding, heads, hidden, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.fc = nn.Linear(embedding, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # [B, S, width] -> [B, 10]
        return self.fc(self.encoder(self.positions(self.embedding(x))).mean(dim=1))


class Classify(nn.Module):
    """The cross-entropy of a model's logits: what training differentiates."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:  # [B, ...], [B] -> []
        return F.cross_entropy(self.model(x), labels)


def decide_relu(linear: nn.Linear) -> None:
    """Biases of +-4 before a ReLU: half of the units pass and half do not, for every input, and none is near 0, where
    rounding would decide its gradient (see on_grid). The time does not depend on the values."""
    with torch.no_grad():
        linear.bias.fill_(4.0)[::2] = -4.0


def build(dtype, pass_, *, plain: nn.Module, ours: nn.Module, x: Tensor, flops: float, steps: int = 0) -> Problem:
    """The same weights in both; images also in channels_last."""
    ours.load_state_dict(plain.state_dict())
    inputs: tuple[Tensor, ...] = (x.to(dtype),)
    if pass_ != FWD:
        plain, ours = Classify(plain), Classify(ours)
        inputs += (torch.randint(CLASSES, x.shape[:1]),)
    eager = Contestant("eager", plain.to(dtype), inputs)
    images = x.dim() == 4
    return Problem(
        ours=Contestant("ours", ours.to(dtype), inputs),
        stock=[eager, *([channels_last(eager)] if images else [])],
        flops=flops,
        steps=steps,
        compile=["eager", "channels_last"],
    )


def optimized(model: nn.Module) -> nn.Module:
    """A copy of a plain model, made faster by one line."""
    model = copy.deepcopy(model)
    bmk.optimize(model)
    return model


def build_cnn(dtype, pass_, *, b: int, optimize: bool = False) -> Problem:
    plain = PlainCNN()
    for layer in (plain.conv1, plain.conv2):
        on_grid(layer.weight, GRID)
        on_grid(layer.bias, GRID)
    decide_relu(plain.fc1)
    pixels = 28 * 28 * 9 * 32 + 14 * 14 * 9 * 32 * 64
    return build(
        dtype,
        pass_,
        plain=plain,
        ours=optimized(plain) if optimize else bigmodel_models.CNN(CLASSES),
        x=on_grid(torch.randn(b, 1, 28, 28), 1 / 8),
        flops=2.0 * b * (pixels + 64 * 7 * 7 * 128 + 128 * CLASSES),
    )


def build_rnn(dtype, pass_, *, b: int, t: int, i: int, h: int, layers: int) -> Problem:
    problem = build(
        dtype,
        pass_,
        plain=PlainRNN(i, h, layers),
        ours=bigmodel_models.RNN(i, h, layers, CLASSES),
        x=torch.randn(b, t, i),
        flops=lstm_flops(t * b, i, h, layers, 1) + 2.0 * b * h * CLASSES,
        steps=t,
    )
    if pass_ != FWD:
        problem.compile = []  # dynamo has no backward pass of oneDNN's LSTM
    return problem


def build_transformer(dtype, pass_, *, b: int, s: int, i: int, e: int, hidden: int, layers: int, heads: int) -> Problem:
    plain = PlainTransformer(i, e, hidden, layers, heads)
    for layer in plain.encoder.layers:
        decide_relu(layer.linear1)
    ours = bigmodel_models.Transformer(i, e, hidden, layers, heads, CLASSES, input_kind="vectors", dropout=0.0)
    products = i * e + layers * (4 * e * e + 2 * e * hidden + 2 * s * e)
    return build(dtype, pass_, plain=plain, ours=ours, x=torch.randn(b, s, i), flops=2.0 * b * s * products)


CASES = [
    Case("cnn", "textbook B64 28x28", partial(build_cnn, b=64), quick=True),
    Case("cnn", "plain + optimize() B64 28x28", partial(build_cnn, b=64, optimize=True)),
    Case("rnn", "textbook B64 T28 I28 H128 L2", partial(build_rnn, b=64, t=28, i=28, h=128, layers=2)),
    Case(
        "transformer",
        "B64 S28 E128 F256 L2 H4",
        partial(build_transformer, b=64, s=28, i=28, e=128, hidden=256, layers=2, heads=4),
    ),
]
