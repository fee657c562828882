"""Autoencoders of 28x28 images, dense and convolutional."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bigmodel_kernels import nn as bnn
from bigmodel_kernels.nn.fused import conv_block

PIXELS = 28 * 28


class Autoencoder(nn.Module):
    """Dense: 784-128-64-code and back, a sigmoid at the end. Train with the mean squared error on pixels in [0, 1].

    Args:
        code_size: units of the code.
    """

    def __init__(self, code_size: int = 32) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            bnn.Linear(PIXELS, 128), nn.ReLU(), bnn.Linear(128, 64), nn.ReLU(), bnn.Linear(64, code_size)
        )
        self.decoder = nn.Sequential(
            bnn.Linear(code_size, 64), nn.ReLU(), bnn.Linear(64, 128), nn.ReLU(), bnn.Linear(128, PIXELS), nn.Sigmoid()
        )

    def encode(
        self,
        x: Tensor,  # [B, 1, 28, 28] in [0, 1]
    ) -> Tensor:  # [B, code_size]
        return self.encoder(x.flatten(1))

    def decode(
        self,
        code: Tensor,  # [B, code_size]
    ) -> Tensor:  # [B, 1, 28, 28] in (0, 1)
        return self.decoder(code).view(-1, 1, 28, 28)

    def forward(
        self,
        x: Tensor,  # [B, 1, 28, 28] in [0, 1]
    ) -> Tensor:  # [B, 1, 28, 28] in (0, 1)
        return self.decode(self.encode(x))


class ConvAutoencoder(nn.Module):
    """Convolutional: 28x28 -> 14x14x16 -> 7x7x32 -> code, and back through transposed convolutions.

    Args:
        code_size: units of the code.
    """

    def __init__(self, code_size: int = 32) -> None:
        super().__init__()
        self.conv1 = bnn.Conv2d(1, 16, kernel_size=3, stride=2, padding=1)
        self.conv2 = bnn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1)
        self.fc_encode = bnn.Linear(32 * 7 * 7, code_size)
        self.fc_decode = bnn.Linear(code_size, 32 * 7 * 7)
        self.deconv1 = bnn.ConvTranspose2d(32, 16, kernel_size=4, stride=2, padding=1)
        self.deconv2 = bnn.ConvTranspose2d(16, 1, kernel_size=4, stride=2, padding=1)

    def encode(
        self,
        x: Tensor,  # [B, 1, 28, 28] in [0, 1]
    ) -> Tensor:  # [B, code_size]
        x = conv_block(self.conv1, x, activation="relu")  # [B, 16, 14, 14]
        x = conv_block(self.conv2, x, activation="relu")  # [B, 32, 7, 7]
        return self.fc_encode(x.flatten(1))

    def decode(
        self,
        code: Tensor,  # [B, code_size]
    ) -> Tensor:  # [B, 1, 28, 28] in (0, 1)
        x = torch.relu(self.fc_decode(code)).view(-1, 32, 7, 7)
        x = conv_block(self.deconv1, x, activation="relu")  # [B, 16, 14, 14]
        return conv_block(self.deconv2, x, activation="sigmoid")

    def forward(
        self,
        x: Tensor,  # [B, 1, 28, 28] in [0, 1]
    ) -> Tensor:  # [B, 1, 28, 28] in (0, 1)
        return self.decode(self.encode(x))
