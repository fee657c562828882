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
from benchmarks import plain_models
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


class Padded(nn.Module):
    """An encoder layer on sequences of which some end early, if it is told where."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:  # [B, S, E], [B, S]
        return self.layer(x, src_key_padding_mask=padding)


def build_encoder_layer(
    dtype, pass_, *, b: int, s: int, e: int, hidden: int, heads: int, padded: bool = False
) -> Problem:
    plain = nn.TransformerEncoderLayer(e, heads, hidden, dropout=0.0, batch_first=True)
    ours = bmk.nn.TransformerEncoderLayer(e, heads, hidden, dropout=0.0, batch_first=True)
    ours.load_state_dict(plain.state_dict())
    padding = torch.arange(s) >= torch.linspace(s // 2, s, b).long()[:, None]
    inputs = (torch.randn(b, s, e), *([padding] if padded else []))
    flops = 2.0 * b * s * (4 * e * e + 2 * e * hidden + 2 * s * e)
    problem = build_layer(dtype, Padded(plain), Padded(ours), inputs, flops)
    problem.compile = ["eager"]
    return problem


class First(nn.Module):
    """A layer's result, or the first of several: what ours gives beside it, the plain layer does not."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Tensor:
        out = self.layer(*inputs)
        return out if isinstance(out, Tensor) else out[0]


def decide_norm_relu(norm: nn.BatchNorm2d) -> None:
    """As decide_relu, behind a batch norm."""
    with torch.no_grad():
        norm.bias.fill_(4.0)[::2] = -4.0


def build_layer(dtype, plain: nn.Module, ours: nn.Module, inputs: tuple[Tensor, ...], flops: float) -> Problem:
    """A part of a network, with gradients for its input and its parameters."""
    inputs = tuple(t.to(dtype).requires_grad_() if t.is_floating_point() else t for t in inputs)
    return Problem(
        ours=Contestant("ours", First(ours).to(dtype), inputs),
        stock=[Contestant("eager", First(plain).to(dtype), inputs)],
        flops=flops,
    )


def build_resnet(dtype, pass_, *, b: int, size: int) -> Problem:
    plain = plain_models.PlainResNet((2, 2, 2, 2), (64, 128, 256, 512), False, False, 1000)
    problem = build(
        dtype,
        pass_,
        plain=plain,
        ours=bigmodel_models.resnet18(),
        x=torch.randn(b, 3, size, size),
        flops=2 * 1.814e9 * b * (size / 224) ** 2,
    )
    problem.whole = True
    problem.compile = ["channels_last"]  # eager+compile is slower, and each takes half a minute to compile
    return problem


def build_bert(dtype, pass_, *, b: int, s: int, e: int, heads: int) -> Problem:
    plain, ours = (
        layer(*sizes)
        for layer, sizes in (
            (plain_models.PlainBERTLayer, (e, heads, 4 * e)),
            (bigmodel_models.bert.BERTLayer, (e, heads, 4 * e, 0.0)),
        )
    )
    ours.load_state_dict(plain.state_dict())
    for layer in (plain, ours):  # every score of a query moves by the same with it: its gradient is 0 but for rounding
        layer.attention["self"]["key"].bias.requires_grad_(False)
    padding = torch.arange(s) < torch.linspace(s // 2, s, b).long()[:, None]
    inputs = (torch.randn(b, s, e), padding[:, None, None])
    return build_layer(dtype, plain, ours, inputs, 2.0 * b * s * (12 * e * e + 2 * s * e))


def build_gpt(dtype, pass_, *, b: int, s: int, e: int, heads: int) -> Problem:
    plain, ours = plain_models.PlainGPTBlock(e, heads), bigmodel_models.gpt.GPTBlock(e, heads, 0.0)
    ours.load_state_dict(plain.state_dict())
    return build_layer(dtype, plain, ours, (torch.randn(b, s, e),), 2.0 * b * s * (12 * e * e + s * e))


class Step(nn.Module):
    """One token more, behind those that the caches hold."""

    def __init__(self, block: nn.Module, *where) -> None:
        super().__init__()
        self.block, self.where = block, where

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self.block.step(x, keys, values, *self.where)


def build_gpt_step(dtype, pass_, *, b: int, past: int, e: int, heads: int) -> Problem:
    plain, ours = plain_models.PlainGPTBlock(e, heads), bigmodel_models.gpt.GPTBlock(e, heads, 0.0)
    ours.load_state_dict(plain.state_dict())
    caches = (torch.randn(b, heads, past + 1, e // heads).to(dtype) for _ in range(2))
    inputs = (torch.randn(b, 1, e).to(dtype), *caches)
    return Problem(
        ours=Contestant("ours", Step(ours, torch.full((b,), past)).to(dtype), inputs),
        stock=[Contestant("eager", Step(plain, past).to(dtype), inputs)],
        flops=2.0 * b * (12 * e * e + 2 * past * e),
        compile=["eager"],
    )


def build_deepspeech(dtype, pass_, *, b: int, t: int, h: int, layers: int) -> Problem:
    classes, frequencies, channels = 29, 161, 32
    plain = plain_models.PlainDeepSpeech(classes, frequencies, h, layers)
    for norm in plain.conv_norms:
        decide_norm_relu(norm)
    ours = bigmodel_models.DeepSpeech(classes, frequencies, h, layers)
    ours.load_state_dict(plain.state_dict())
    lengths = torch.linspace(t, t // 2, b).long()
    frames, bands = int(((lengths - 1) // 2 + 1).sum()), (81, 41)
    products = 41 * 11 * channels * bands[0] + 21 * 11 * channels * channels * bands[1]
    rnn = sum(2 * 4 * h * ((channels * bands[1] if i == 0 else h) + h) for i in range(layers))
    problem = build_layer(
        dtype, plain, ours, (torch.randn(b, t, frequencies), lengths), 2.0 * frames * (products + rnn + h * classes)
    )
    problem.whole = True
    problem.compile = []  # dynamo takes no packed sequence
    return problem


BOTH = ("fp32", "bf16")
CASES = [
    Case("cnn", "textbook B64 28x28", partial(build_cnn, b=64), quick=True),
    Case("cnn", "plain + optimize() B64 28x28", partial(build_cnn, b=64, optimize=True)),
    Case("rnn", "textbook B64 T28 I28 H128 L2", partial(build_rnn, b=64, t=28, i=28, h=128, layers=2)),
    Case(
        "transformer",
        "B64 S28 E128 F256 L2 H4",
        partial(build_transformer, b=64, s=28, i=28, e=128, hidden=256, layers=2, heads=4),
    ),
    Case(
        "transformer",
        "encoder layer B1 S16 E128 F256 H4",
        partial(build_encoder_layer, b=1, s=16, e=128, hidden=256, heads=4),
        (FWD,),
        BOTH,
    ),
    Case(
        "transformer",
        "encoder layer B8 S128 E256 F1024 H8 padded",
        partial(build_encoder_layer, b=8, s=128, e=256, hidden=1024, heads=8, padded=True),
        (FWD,),
    ),
    Case("resnet", "ResNet-18 B1 224x224", partial(build_resnet, b=1, size=224), passes=(FWD,)),
    Case("bert", "base layer B2 S128 padded", partial(build_bert, b=2, s=128, e=768, heads=12)),
    Case("gpt", "small block B1 S256", partial(build_gpt, b=1, s=256, e=768, heads=12)),
    Case(
        "gpt", "small block step B1 after 1024", partial(build_gpt_step, b=1, past=1024, e=768, heads=12), (FWD,), BOTH
    ),
    Case(
        "gpt", "small block step B8 after 1024", partial(build_gpt_step, b=8, past=1024, e=768, heads=12), (FWD,), BOTH
    ),
    Case("deepspeech", "B2 T200 F161 H256 L2", partial(build_deepspeech, b=2, t=200, h=256, layers=2)),
]
