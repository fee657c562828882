"""GoogLeNet. Szegedy et al.: Going Deeper with Convolutions (2014), with the batch norm of Ioffe & Szegedy (2015)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigmodel_kernels import nn as bnn
from bigmodel_kernels.nn.fused import conv_block, linear_block

AUXILIARY_WEIGHT = 0.3  # of the loss of each auxiliary classifier, section 5 of the paper


class BasicConv2d(nn.Module):
    """Convolution, batch norm and ReLU: one call in eval mode."""

    def __init__(self, in_channels: int, out_channels: int, **options) -> None:
        super().__init__()
        self.conv = bnn.Conv2d(in_channels, out_channels, bias=False, **options)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(
        self,
        x: Tensor,  # [B, in_channels, H, W]
    ) -> Tensor:  # [B, out_channels, H', W']
        return conv_block(self.conv, x, self.bn, activation="relu")


class Inception(nn.Module):
    """Four branches side by side: 1x1; 1x1 and 3x3; 1x1 and 5x5; max-pool and 1x1. Their channels are joined.

    Args:
        in_channels: channels of the input.
        ch1x1: of the first branch.
        ch3x3: (reduced, output) of the second.
        ch5x5: (reduced, output) of the third.
        pool_proj: of the fourth.
        third_kernel: kernel of the third branch.
    """

    def __init__(
        self,
        in_channels: int,
        ch1x1: int,
        ch3x3: tuple[int, int],
        ch5x5: tuple[int, int],
        pool_proj: int,
        third_kernel: int,
    ) -> None:
        super().__init__()
        self.branch1 = BasicConv2d(in_channels, ch1x1, kernel_size=1)
        self.branch2 = nn.Sequential(
            BasicConv2d(in_channels, ch3x3[0], kernel_size=1), BasicConv2d(*ch3x3, kernel_size=3, padding=1)
        )
        self.branch3 = nn.Sequential(
            BasicConv2d(in_channels, ch5x5[0], kernel_size=1),
            BasicConv2d(*ch5x5, kernel_size=third_kernel, padding=third_kernel // 2),
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1), BasicConv2d(in_channels, pool_proj, kernel_size=1)
        )

    def forward(
        self,
        x: Tensor,  # [B, in_channels, H, W]
    ) -> Tensor:  # [B, ch1x1 + ch3x3[1] + ch5x5[1] + pool_proj, H, W]
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class InceptionAux(nn.Module):
    """A classifier on features of the middle, for training only."""

    def __init__(self, in_channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.conv = BasicConv2d(in_channels, 128, kernel_size=1)
        self.fc1 = bnn.Linear(2048, 1024)
        self.fc2 = bnn.Linear(1024, num_classes)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,  # [B, in_channels, H, W]
    ) -> Tensor:  # [B, num_classes], logits
        x = self.conv(F.adaptive_avg_pool2d(x, 4))
        return self.fc2(self.dropout(linear_block(self.fc1, torch.flatten(x, 1), "relu")))


class GoogLeNetOutput(NamedTuple):
    """Logits [B, num_classes] of the network and of its two auxiliary classifiers, the one nearer to the input first."""

    logits: Tensor
    aux1: Tensor
    aux2: Tensor


# Layers and their arguments, table 1 of the paper: ch1x1, ch3x3, ch5x5, pool_proj; a max-pool of size 3 or 2 in between.
_MODULES = {
    "inception3a": (192, 64, (96, 128), (16, 32), 32),
    "inception3b": (256, 128, (128, 192), (32, 96), 64),
    "maxpool3": 3,
    "inception4a": (480, 192, (96, 208), (16, 48), 64),
    "inception4b": (512, 160, (112, 224), (24, 64), 64),
    "inception4c": (512, 128, (128, 256), (24, 64), 64),
    "inception4d": (512, 112, (144, 288), (32, 64), 64),
    "inception4e": (528, 256, (160, 320), (32, 128), 128),
    "maxpool4": 2,
    "inception5a": (832, 256, (160, 320), (32, 128), 128),
    "inception5b": (832, 384, (192, 384), (48, 128), 128),
}


class GoogLeNet(nn.Module):
    """Inception v1 with batch norm; the state_dict is that of torchvision.models.googlenet.

    Args:
        num_classes: how many classes.
        in_channels: channels of the image.
        aux_logits: with the auxiliary classifiers behind 4a and 4d, which `loss` trains as well.
        third_kernel: kernel of each module's third branch: 5 in the paper; 3 in torchvision's weights.
        dropout: before the last layer; `dropout_aux` in the auxiliary classifiers.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        in_channels: int = 3,
        aux_logits: bool = True,
        third_kernel: int = 5,
        dropout: float = 0.2,
        dropout_aux: float = 0.7,
    ) -> None:
        super().__init__()
        if third_kernel not in (3, 5):
            raise ValueError(f"third_kernel: expected 5 (the paper's) or 3 (torchvision's), got {third_kernel}")
        self.conv1 = BasicConv2d(in_channels, 64, kernel_size=7, stride=2, padding=3)
        self.conv2 = BasicConv2d(64, 64, kernel_size=1)
        self.conv3 = BasicConv2d(64, 192, kernel_size=3, padding=1)
        for name, sizes in _MODULES.items():
            module = _pool(sizes) if isinstance(sizes, int) else Inception(*sizes, third_kernel=third_kernel)
            setattr(self, name, module)
        self.aux1 = InceptionAux(512, num_classes, dropout_aux) if aux_logits else None
        self.aux2 = InceptionAux(528, num_classes, dropout_aux) if aux_logits else None
        self.dropout = nn.Dropout(dropout)
        self.fc = bnn.Linear(1024, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.01, a=-2, b=2)

    def forward(
        self,
        x: Tensor,  # [B, in_channels, H, W]
    ) -> Tensor | GoogLeNetOutput:  # logits; in training those of the auxiliary classifiers as well
        x = _halve(self.conv1(x))
        x = _halve(self.conv3(self.conv2(x)))
        middle = {}
        for name in _MODULES:
            x = getattr(self, name)(x)
            if self.training and self.aux1 is not None and name in ("inception4a", "inception4d"):
                middle[name] = x
        logits = self.fc(self.dropout(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)))
        if not middle:
            return logits
        return GoogLeNetOutput(logits, self.aux1(middle["inception4a"]), self.aux2(middle["inception4d"]))

    def loss(
        self,
        x: Tensor,  # [B, in_channels, H, W]
        labels: Tensor,  # [B] int64
    ) -> Tensor:  # []
        """The cross-entropy, in training with 0.3 of that of each auxiliary classifier."""
        output = self(x)
        if isinstance(output, Tensor):
            return F.cross_entropy(output, labels)
        extra = F.cross_entropy(output.aux1, labels) + F.cross_entropy(output.aux2, labels)
        return F.cross_entropy(output.logits, labels) + AUXILIARY_WEIGHT * extra


class SmallInception(nn.Module):
    """Four inception modules of the paper's proportions for 28x28 images."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.stem = BasicConv2d(in_channels, 32, kernel_size=3, padding=1)
        self.inception2a = Inception(32, 16, (16, 24), (4, 12), 12, third_kernel=5)
        self.inception2b = Inception(64, 16, (24, 32), (4, 8), 8, third_kernel=5)
        self.inception3a = Inception(64, 24, (24, 48), (8, 16), 8, third_kernel=5)
        self.inception3b = Inception(96, 32, (32, 64), (8, 16), 16, third_kernel=5)
        self.fc = bnn.Linear(128, num_classes)

    def forward(
        self,
        x: Tensor,  # [B, in_channels, 28, 28]
    ) -> Tensor:  # [B, num_classes], logits
        x = _halve(self.stem(x))  # [B, 32, 14, 14]
        x = _halve(self.inception2b(self.inception2a(x)))  # [B, 64, 7, 7]
        x = self.inception3b(self.inception3a(x))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def _pool(size: int) -> nn.MaxPool2d:
    return nn.MaxPool2d(size, stride=2, ceil_mode=True)


def _halve(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2, ceil_mode=True)
