"""The textbook's convolutional network for 28x28 images."""

from __future__ import annotations

from torch import Tensor, nn

from bigmodel_kernels import nn as bnn
from bigmodel_kernels.nn.fused import conv_block, linear_block


class CNN(nn.Module):
    """Two blocks of 3x3 convolution, ReLU and 2x2 max-pooling (32 and 64 channels), then 128 units, then the classes.

    Returns logits: train with ``cross_entropy``. Where the textbook passes two-class outputs to a binary cross-entropy,
    the loss here is the categorical one that its targets mean.

    Args:
        num_classes: how many classes.
        in_channels: channels of the image.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.conv1 = bnn.Conv2d(in_channels, 32, kernel_size=3, padding=1)
        self.conv2 = bnn.Conv2d(32, 64, kernel_size=3, padding=1)
        self.fc1 = bnn.Linear(64 * 7 * 7, 128)
        self.fc2 = bnn.Linear(128, num_classes)

    def forward(
        self,
        x: Tensor,  # [B, in_channels, 28, 28]
    ) -> Tensor:  # [B, num_classes], logits
        if x.dim() != 4 or x.shape[-2:] != (28, 28):
            raise ValueError(f"x: expected images of shape [B, C, 28, 28], got {list(x.shape)}")
        x = conv_block(self.conv1, x, activation="relu", pool=("max", 2))  # [B, 32, 14, 14]
        x = conv_block(self.conv2, x, activation="relu", pool=("max", 2))  # [B, 64, 7, 7]
        x = x.flatten(1)  # any memory format
        return self.fc2(linear_block(self.fc1, x, "relu"))
