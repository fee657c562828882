"""The textbook's models beside plain PyTorch twins: (ours, the twin, inputs) by name."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

import bigmodel_models as models


class TwinCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.fc1 = nn.Linear(64 * 7 * 7, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.view(-1, 64 * 7 * 7))))


class TwinRNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(28, 24, 2, batch_first=True)
        self.fc = nn.Linear(24, 10)

    def forward(self, x):
        return self.fc(self.lstm(x)[0][:, -1])


class TwinTransformer(nn.Module):
    def __init__(self, tokens, norm_first):
        super().__init__()
        self.embedding = nn.Embedding(11, 16) if tokens else nn.Linear(12, 16)
        self.positions = nn.ParameterDict({"weight": torch.zeros(9, 16)})
        layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True, norm_first=norm_first)
        norm = nn.LayerNorm(16) if norm_first else None
        self.encoder = nn.TransformerEncoder(layer, 3, norm, enable_nested_tensor=False)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.embedding(x)
        return self.fc(self.encoder(x + self.positions["weight"][: x.shape[1]]).mean(dim=1))


class TwinSeq2Seq(nn.Module):
    def __init__(self):
        super().__init__()
        self.source_embedding = nn.Embedding(11, 16)
        self.target_embedding = nn.Embedding(13, 16)
        self.transformer = nn.Transformer(16, 4, 2, 2, 32, 0.0, batch_first=True)
        self.fc = nn.Linear(16, 13)

    def forward(self, source, target):
        position = torch.arange(9, dtype=torch.float64)[:, None]
        angle = position / 10000.0 ** (torch.arange(0, 16, 2, dtype=torch.float64) / 16)
        table = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).float()  # the model keeps it in fp32
        source = self.source_embedding(source) + table[: source.shape[1]]
        target = self.target_embedding(target) + table[: target.shape[1]]
        later = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).triu(1)
        return self.fc(self.transformer(source, target, tgt_mask=later))


class TwinConvAutoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.fc_encode = nn.Linear(32 * 7 * 7, 32)
        self.fc_decode = nn.Linear(32, 32 * 7 * 7)
        self.deconv1 = nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1)
        self.deconv2 = nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1)

    def forward(self, x):
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = F.relu(self.fc_decode(self.fc_encode(x.flatten(1)))).view(-1, 32, 7, 7)
        return torch.sigmoid(self.deconv2(F.relu(self.deconv1(x))))


class TwinGenerator(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 64 * 7 * 7, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.deconv1 = nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.deconv2 = nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1)

    def forward(self, z):
        x = F.relu(self.bn1(self.fc(z).view(-1, 64, 7, 7)))
        return torch.tanh(self.deconv2(F.relu(self.bn2(self.deconv1(x)))))


class TwinDiscriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 4, stride=2, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 4, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(64)
        self.fc = nn.Linear(64 * 7 * 7, 1)

    def forward(self, x):
        x = F.leaky_relu(self.conv1(x), 0.2)
        return self.fc(F.leaky_relu(self.bn(self.conv2(x)), 0.2).flatten(1)).squeeze(1)


class TwinMLP(nn.Module):
    def __init__(self, widths, relu):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = (nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.relu = relu

    def forward(self, x):
        act = F.relu if self.relu else nn.Identity()
        return self.fc3(act(self.fc2(act(self.fc1(x)))))


def image(batch=3):
    return torch.rand(batch, 1, 28, 28)


def transformer(kind, norm_first):
    size = 11 if kind == "tokens" else 12
    options = {"input_kind": kind, "positions": "learned", "max_length": 9, "dropout": 0.0, "norm_first": norm_first}
    return models.Transformer(size, 16, 32, 3, 4, 5, **options)


def tokens(length=7, vocabulary=11):
    return torch.randint(vocabulary, (3, length))


CASES = {
    "cnn": (models.CNN, TwinCNN, lambda: (image(),)),
    "rnn": (lambda: models.RNN(28, 24, 2, 10), TwinRNN, lambda: (torch.randn(3, 28, 28),)),
    "transformer-tokens": (
        lambda: transformer("tokens", False),
        lambda: TwinTransformer(True, False),
        lambda: (tokens(),),
    ),
    "transformer-vectors": (
        lambda: transformer("vectors", True),
        lambda: TwinTransformer(False, True),
        lambda: (torch.randn(3, 8, 12),),
    ),
    "seq2seq": (
        lambda: models.Seq2SeqTransformer(11, 13, 16, 32, 2, 4, dropout=0.0),
        TwinSeq2Seq,
        lambda: (tokens(7), tokens(9, 13)),
    ),
    "autoencoder-conv": (models.ConvAutoencoder, TwinConvAutoencoder, lambda: (image(),)),
    "generator": (models.ConvGenerator, TwinGenerator, lambda: (torch.randn(4, 64),)),
    "discriminator": (models.ConvDiscriminator, TwinDiscriminator, lambda: (image(4),)),
    "mlp-wide": (
        models.BigModel,
        lambda: TwinMLP((1000, 2000, 1000, 1), True),
        lambda: (torch.randn(3, 1000),),
    ),
    "mlp-narrow-linear": (
        lambda: models.BigModel(models.BigModel.NARROW, relu=False),
        lambda: TwinMLP((1000, 500, 100, 1), False),
        lambda: (torch.randn(3, 1000),),
    ),
}
