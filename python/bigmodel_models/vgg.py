"""VGG. Simonyan & Zisserman: Very Deep Convolutional Networks for Large-Scale Image Recognition (2014)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigmodel_kernels import nn as bnn
from bigmodel_kernels.nn.fused import conv_block, linear_block

POOL = "pool"
# Channels of the 3x3 convolutions, and where the image is halved: configurations A and D of the paper's table 1.
LAYERS_11 = (64, POOL, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL)
LAYERS_16 = (
    64, 64, POOL, 128, 128, POOL, 256, 256, 256, POOL, 512, 512, 512, POOL, 512, 512, 512, POOL,
)  # fmt: skip


class VGG(nn.Module):
    """3x3 convolutions with ReLU, each with the norm before and the max-pool behind it in one call, and three linear layers.

    The state_dict is that of torchvision.models.vgg11, vgg16_bn and so on. `vgg11` and `vgg16` build those two; `vgg_small` one
    for 28x28 images.

    Args:
        layers: output channels of each convolution, and "pool" where a 2x2 max-pool stands.
        num_classes: how many classes.
        in_channels: channels of the image.
        batch_norm: a batch norm behind each convolution (not in the paper; torchvision's vgg11_bn).
        grid: the features are averaged to grid x grid before the linear layers.
        hidden_size: units of the two hidden linear layers.
        dropout: behind each of those.
    """

    def __init__(
        self,
        layers: Sequence[int | str],
        num_classes: int = 1000,
        *,
        in_channels: int = 3,
        batch_norm: bool = False,
        grid: int = 7,
        hidden_size: int = 4096,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if not layers or layers[0] == POOL:
            raise ValueError(f"layers: expected channels first, got {list(layers)}")
        modules: list[nn.Module] = []
        channels = in_channels
        for entry in layers:
            if entry == POOL:
                modules.append(nn.MaxPool2d(2))
                continue
            modules.append(bnn.Conv2d(channels, entry, 3, padding=1))
            modules += [nn.BatchNorm2d(entry)] if batch_norm else []
            modules.append(nn.ReLU())
            channels = entry
        self.features = nn.Sequential(*modules)
        self.grid = grid
        self.classifier = nn.Sequential(
            bnn.Linear(channels * grid * grid, hidden_size),
            nn.ReLU(),
            nn.Dropout(dropout),
            bnn.Linear(hidden_size, hidden_size),
            nn.ReLU(),
            nn.Dropout(dropout),
            bnn.Linear(hidden_size, num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(
        self,
        x: Tensor,  # [B, in_channels, H, W]
    ) -> Tensor:  # [B, num_classes], logits
        for conv, norm, pool in self._blocks():
            x = conv_block(conv, x, norm, activation="relu", pool=("max", 2) if pool else None)
        x = torch.flatten(F.adaptive_avg_pool2d(x, self.grid), 1)
        first, _, drop, second, _, _, last = self.classifier
        return last(drop(linear_block(second, drop(linear_block(first, x, "relu")), "relu")))

    def _blocks(self) -> Iterator[tuple[nn.Module, nn.Module | None, bool]]:
        """Each convolution with its norm, and whether a max-pool follows."""
        modules = list(self.features)
        for i, module in enumerate(modules):
            if isinstance(module, nn.Conv2d):
                norm = modules[i + 1] if isinstance(modules[i + 1], nn.BatchNorm2d) else None
                behind = i + (2 if norm is None else 3)
                yield module, norm, behind < len(modules) and isinstance(modules[behind], nn.MaxPool2d)


def vgg11(num_classes: int = 1000, **options) -> VGG:
    return VGG(LAYERS_11, num_classes, **options)


def vgg16(num_classes: int = 1000, **options) -> VGG:
    return VGG(LAYERS_16, num_classes, **options)


def vgg_small(num_classes: int = 10, *, in_channels: int = 1, batch_norm: bool = True) -> VGG:
    """Six convolutions of 16 to 64 channels for 28x28 images."""
    layers = (16, 16, POOL, 32, 32, POOL, 64, 64, POOL)
    return VGG(
        layers, num_classes, in_channels=in_channels, batch_norm=batch_norm, grid=3, hidden_size=128, dropout=0.2
    )
