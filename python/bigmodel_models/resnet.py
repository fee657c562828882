"""Residual networks. He et al.: Deep Residual Learning for Image Recognition (2015)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bigmodel_kernels import nn as bnn
from bigmodel_kernels.nn.fused import conv_block


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut; in eval mode each is one call with its norm, the sum and the ReLU."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = bnn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = bnn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _projection(in_channels, channels * self.expansion, stride)

    def forward(
        self,
        x: Tensor,  # [B, in_channels, H, W]
    ) -> Tensor:  # [B, channels, H / stride, W / stride]
        y = conv_block(self.conv1, x, self.bn1, activation="relu")
        return conv_block(self.conv2, y, self.bn2, residual=_shortcut(self, x), activation="relu")


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut. The stride is in the 3x3, as in torchvision (in the paper it is in the
    first 1x1, which reads a quarter of its input only)."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = bnn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = bnn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = bnn.Conv2d(channels, channels * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels * self.expansion)
        self.downsample = _projection(in_channels, channels * self.expansion, stride)

    def forward(
        self,
        x: Tensor,  # [B, in_channels, H, W]
    ) -> Tensor:  # [B, 4 * channels, H / stride, W / stride]
        y = conv_block(self.conv1, x, self.bn1, activation="relu")
        y = conv_block(self.conv2, y, self.bn2, activation="relu")
        return conv_block(self.conv3, y, self.bn3, residual=_shortcut(self, x), activation="relu")


class ResNet(nn.Module):
    """Stem, stages of residual blocks that halve the image and double the channels, the mean over the image, a classifier.

    The state_dict is that of torchvision.models.resnet18 and so on. `resnet18`, `resnet34`, `resnet50` and `resnet20` (the
    paper's network for small images) build the usual ones.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        layers: blocks of each stage.
        num_classes: how many classes.
        in_channels: channels of the image.
        widths: channels of each stage, a quarter of what a bottleneck gives.
        small_images: a stem of one 3x3 convolution, instead of 7x7 with stride 2 and a max-pool.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        *,
        in_channels: int = 3,
        widths: Sequence[int] = (64, 128, 256, 512),
        small_images: bool = False,
    ) -> None:
        super().__init__()
        if not 0 < len(layers) <= len(widths):
            raise ValueError(f"layers: expected 1 to {len(widths)} stages, as many as widths has, got {list(layers)}")
        stem = {"kernel_size": 3, "padding": 1} if small_images else {"kernel_size": 7, "stride": 2, "padding": 3}
        self.conv1 = bnn.Conv2d(in_channels, widths[0], bias=False, **stem)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.pool = None if small_images else ("max", 3, 2, 1)
        self.stages = len(layers)
        channels = widths[0]
        for i, (count, width) in enumerate(zip(layers, widths)):
            blocks = []
            for j in range(count):
                blocks.append(block(channels, width, 2 if i > 0 and j == 0 else 1))
                channels = width * block.expansion
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.fc = bnn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(
        self,
        x: Tensor,  # [B, in_channels, H, W]
    ) -> Tensor:  # [B, num_classes], logits
        x = conv_block(self.conv1, x, self.bn1, activation="relu", pool=self.pool)
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))


def resnet18(num_classes: int = 1000, **options) -> ResNet:
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, **options)


def resnet34(num_classes: int = 1000, **options) -> ResNet:
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes, **options)


def resnet50(num_classes: int = 1000, **options) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, **options)


def resnet20(num_classes: int = 10, **options) -> ResNet:
    """Section 4.2 of the paper: three stages of 16, 32 and 64 channels for 32x32 images (projections where they change)."""
    return ResNet(BasicBlock, (3, 3, 3), num_classes, widths=(16, 32, 64), small_images=True, **options)


def _projection(in_channels: int, channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == channels:
        return None
    return nn.Sequential(bnn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))


def _shortcut(block: BasicBlock | Bottleneck, x: Tensor) -> Tensor:
    return x if block.downsample is None else conv_block(block.downsample[0], x, block.downsample[1])
