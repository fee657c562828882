"""Generative adversarial networks on 28x28 images, dense and convolutional.

Goodfellow et al.: Generative Adversarial Nets (2014); Radford, Metz, Chintala: DCGAN (2015).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigmodel_kernels import nn as bnn
from bigmodel_kernels.nn.fused import conv_block

PIXELS = 28 * 28
LEAK = 0.2  # slope of the leaky ReLU in the discriminators, as in DCGAN


class Generator(nn.Module):
    """Dense: noise -> 256 -> 512 -> an image in (-1, 1)."""

    def __init__(self, latent_dim: int = 64) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.fc1 = bnn.Linear(latent_dim, 256)
        self.fc2 = bnn.Linear(256, 512)
        self.fc3 = bnn.Linear(512, PIXELS)

    def forward(
        self,
        z: Tensor,  # [B, latent_dim]
    ) -> Tensor:  # [B, 1, 28, 28] in (-1, 1)
        x = F.leaky_relu(self.fc1(z), LEAK)
        x = F.leaky_relu(self.fc2(x), LEAK)
        return torch.tanh(self.fc3(x)).view(-1, 1, 28, 28)


class Discriminator(nn.Module):
    """Dense: an image -> 512 -> 256 -> the logit of "real"."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = bnn.Linear(PIXELS, 512)
        self.fc2 = bnn.Linear(512, 256)
        self.fc3 = bnn.Linear(256, 1)

    def forward(
        self,
        x: Tensor,  # [B, 1, 28, 28] in [-1, 1]
    ) -> Tensor:  # [B], logits
        x = F.leaky_relu(self.fc1(x.flatten(1)), LEAK)
        x = F.leaky_relu(self.fc2(x), LEAK)
        return self.fc3(x).squeeze(1)


class ConvGenerator(nn.Module):
    """Convolutional: noise -> 7x7x64 -> 14x14x32 -> an image in (-1, 1), batch-normalised on the way."""

    def __init__(self, latent_dim: int = 64) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.fc = bnn.Linear(latent_dim, 64 * 7 * 7, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.deconv1 = bnn.ConvTranspose2d(64, 32, kernel_size=4, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.deconv2 = bnn.ConvTranspose2d(32, 1, kernel_size=4, stride=2, padding=1)
        self.apply(_dcgan_init)

    def forward(
        self,
        z: Tensor,  # [B, latent_dim]
    ) -> Tensor:  # [B, 1, 28, 28] in (-1, 1)
        x = self.fc(z).view(-1, 64, 7, 7)
        x = torch.relu(self.bn1(x))
        x = torch.relu(self.bn2(self.deconv1(x)))  # [B, 32, 14, 14]
        return conv_block(self.deconv2, x, activation="tanh")


class ConvDiscriminator(nn.Module):
    """Convolutional: an image -> 14x14x32 -> 7x7x64 -> the logit of "real"."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = bnn.Conv2d(1, 32, kernel_size=4, stride=2, padding=1)
        self.conv2 = bnn.Conv2d(32, 64, kernel_size=4, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(64)
        self.fc = bnn.Linear(64 * 7 * 7, 1)
        self.apply(_dcgan_init)

    def forward(
        self,
        x: Tensor,  # [B, 1, 28, 28] in [-1, 1]
    ) -> Tensor:  # [B], logits
        x = F.leaky_relu(self.conv1(x), LEAK)  # [B, 32, 14, 14]
        x = F.leaky_relu(self.bn(self.conv2(x)), LEAK)  # [B, 64, 7, 7]
        return self.fc(x.flatten(1)).squeeze(1)


class GAN(nn.Module):
    """A generator and a discriminator with the loss of each.

    The losses are binary cross-entropies on one logit per image. (A listing that gives the discriminator two outputs
    and a binary cross-entropy mixes two losses up.) The generator's is the non-saturating one: it raises the
    discriminator's belief in the fakes.

    Args:
        kind: ``"dense"`` or ``"conv"``.
        latent_dim: size of the noise vector.
    """

    KINDS = ("dense", "conv")

    def __init__(self, kind: str = "dense", latent_dim: int = 64) -> None:
        super().__init__()
        if kind not in self.KINDS:
            raise ValueError(f"kind: expected one of {self.KINDS}, got {kind!r}")
        self.latent_dim = latent_dim
        self.generator = Generator(latent_dim) if kind == "dense" else ConvGenerator(latent_dim)
        self.discriminator = Discriminator() if kind == "dense" else ConvDiscriminator()

    def forward(
        self,
        z: Tensor,  # [B, latent_dim]
    ) -> Tensor:  # [B, 1, 28, 28] in (-1, 1)
        return self.generator(z)

    def sample_noise(self, count: int) -> Tensor:  # [count, latent_dim]
        """Standard normal noise from torch's default generator, on the model's device."""
        return torch.randn(count, self.latent_dim, device=next(self.parameters()).device)

    def discriminator_loss(
        self,
        real: Tensor,  # [B, 1, 28, 28] in [-1, 1]
        z: Tensor,  # [B, latent_dim]
    ) -> Tensor:  # scalar
        """How badly real and fake are told apart; no gradient reaches the generator."""
        with torch.no_grad():
            fake = self.generator(z)
        real_logits, fake_logits = self.discriminator(real), self.discriminator(fake)
        return F.binary_cross_entropy_with_logits(
            real_logits, torch.ones_like(real_logits)
        ) + F.binary_cross_entropy_with_logits(fake_logits, torch.zeros_like(fake_logits))

    def generator_loss(
        self,
        z: Tensor,  # [B, latent_dim]
    ) -> Tensor:  # scalar
        """How little the discriminator believes the fakes. Step only the generator's parameters with its gradient."""
        logits = self.discriminator(self.generator(z))
        return F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))


def _dcgan_init(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, bnn.Conv2d, bnn.ConvTranspose2d)):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
