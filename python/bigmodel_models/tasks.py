"""The models that can be trained, each with its tuned defaults, and the tasks on images and numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import data
from .autoencoder import Autoencoder, ConvAutoencoder
from .cnn import CNN
from .data import DataSet
from .figures import save_pictures
from .gan import GAN
from .gpt import GPT
from .inception import SmallInception
from .mlp import BigModel
from .resnet import BasicBlock, ResNet, resnet20
from .rnn import RNN
from .sequences import NextCharacter, NextSample
from .task import Optimizers, Task, predict
from .transformer import Transformer
from .vgg import vgg_small
from .wavenet import WaveNet


@dataclass(frozen=True)
class Classification(Task):
    """Cross-entropy on standardised images; judged by test accuracy."""

    # Some epochs of rising rate: as good in the end as ten steps, and one rounding does not grow past 1e-4 of the loss within the
    # first 50 steps, so that the curves of two backends can be compared.
    warmup_steps: int = 100
    as_rows: bool = field(default=False, kw_only=True)  # an image as a sequence of its 28 rows
    metric_label: str = field(default="test accuracy", kw_only=True)

    def inputs(self, images: Tensor, dataset: DataSet) -> Tensor:
        images = dataset.standardised(images)
        return images.squeeze(1) if self.as_rows else images

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    def evaluate(self, model: nn.Module, x: Tensor, y: Tensor) -> float:
        return (predict(model, x).argmax(dim=1) == y).double().mean().item()


@dataclass(frozen=True)
class Regression(Task):
    """Mean squared error on a synthetic function of 1000 inputs; judged by R2."""

    data_names: tuple[str, ...] = ("synthetic",)
    metric_label: str = field(default="test R²", kw_only=True)

    def load(self, name: str, data_dir: str) -> DataSet:
        return data.synthetic_regression()

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(model(x), y)

    def evaluate(self, model: nn.Module, x: Tensor, y: Tensor) -> float:
        return explained(predict(model, x), y)


@dataclass(frozen=True)
class Reconstruction(Task):
    """Mean squared error between an image and what the autoencoder makes of it; judged by the variance explained."""

    metric_label: str = field(default="test variance explained", kw_only=True)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(model(x), x)

    def evaluate(self, model: nn.Module, x: Tensor, y: Tensor) -> float:
        return explained(predict(model, x), x)

    def samples(self, model: nn.Module, x: Tensor, stem: Path, head: str) -> Path:
        shown = x[:10]
        rows = torch.stack([shown[:, 0], predict(model, shown)[:, 0]])
        return save_pictures(stem, f"{head}: test images above, their reconstructions below", rows)


@dataclass(frozen=True)
class Adversarial(Task):
    """The two losses of a GAN in turn; judged by the Frechet distance to the test images, 0 being alike."""

    metric_label: str = field(default="Fréchet distance to test images", kw_only=True)
    lower_is_better: bool = field(default=True, kw_only=True)

    def inputs(self, images: Tensor, dataset: DataSet) -> Tensor:
        return images * 2.0 - 1.0

    def optimizers(self, model: nn.Module, lr: float) -> Optimizers:
        betas = (0.5, 0.999)  # DCGAN's
        return {
            "generator": torch.optim.Adam(model.generator.parameters(), lr=lr, betas=betas, fused=True),
            "discriminator": torch.optim.Adam(model.discriminator.parameters(), lr=lr, betas=betas, fused=True),
        }

    def step(self, model: nn.Module, optimizers: Optimizers, x: Tensor, y: Tensor) -> dict[str, float]:
        optimizers["discriminator"].zero_grad(set_to_none=True)
        discriminator_loss = model.discriminator_loss(x, model.sample_noise(len(x)))
        discriminator_loss.backward()
        optimizers["discriminator"].step()

        model.discriminator.requires_grad_(False)  # its weight gradients would be thrown away
        optimizers["generator"].zero_grad(set_to_none=True)
        generator_loss = model.generator_loss(model.sample_noise(len(x)))
        generator_loss.backward()
        optimizers["generator"].step()
        model.discriminator.requires_grad_(True)
        return {"generator loss": generator_loss.item(), "discriminator loss": discriminator_loss.item()}

    def evaluate(self, model: nn.Module, x: Tensor, y: Tensor) -> float:
        return frechet_distance(predict(model, self._noise(model, 1000, x)), x)

    def probe(self, model: nn.Module, x: Tensor) -> Tensor:
        return model.discriminator(model(model.sample_noise(len(x))))

    def samples(self, model: nn.Module, x: Tensor, stem: Path, head: str) -> Path:
        fakes = predict(model, self._noise(model, 40, x))
        images = ((fakes + 1.0) / 2.0).view(4, 10, data.IMAGE_SIZE, data.IMAGE_SIZE)
        return save_pictures(stem, f"{head}: generated images", images)

    @staticmethod
    def _noise(model: nn.Module, count: int, like: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)  # the same noise at every test, so that tests compare
        return torch.randn(count, model.latent_dim, generator=generator).to(like.device)


def explained(prediction: Tensor, target: Tensor) -> float:
    """1 - (squared error) / (variance of the target): 1 is perfect, 0 is no better than the mean."""
    error = (prediction.double() - target.double()).square().sum()
    spread = (target.double() - target.double().mean(dim=0)).square().sum()
    return (1.0 - error / spread).item()


def frechet_distance(
    images: Tensor,  # [N, 1, H, W]
    real: Tensor,  # [M, 1, H, W]
    components: int = 20,
) -> float:
    """Frechet distance of two Gaussians fitted to the leading principal components of ``real``, over its variance.

    The formula of the FID (Heusel et al. 2017), on principal components instead of an Inception network's features.
    """
    a, b = images.flatten(1).double(), real.flatten(1).double()
    center = b.mean(dim=0)
    covariance = torch.cov(b.T)
    _, vectors = torch.linalg.eigh(covariance)
    basis = vectors[:, -components:]
    a, b = (a - center) @ basis, (b - center) @ basis
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    root_trace = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    distance = (a.mean(dim=0) - b.mean(dim=0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root_trace
    return (distance / cov_b.trace()).item()


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Classification(
            "cnn",
            "two convolutions with ReLU and max-pooling, two linear layers",
            {"default": CNN},
            epochs=12,
            batch_size=64,
            lr=1e-3,
            lr_decay=0.9,
            weight_decay=0.01,
            max_shift=2,
        ),
        Classification(
            "rnn",
            "LSTM of two layers over the rows of an image",
            {"default": lambda: RNN(data.IMAGE_SIZE, 128, 2, data.NUM_CLASSES)},
            epochs=12,
            batch_size=64,
            lr=2e-3,
            lr_decay=0.9,
            weight_decay=0.01,
            max_shift=1,
            as_rows=True,
        ),
        Classification(
            "transformer",
            "encoder of two layers over the rows of an image",
            {
                "default": lambda: Transformer(
                    data.IMAGE_SIZE,
                    64,
                    128,
                    2,
                    4,
                    data.NUM_CLASSES,
                    input_kind="vectors",
                    positions="learned",
                    max_length=data.IMAGE_SIZE,
                    dropout=0.0,  # so little data is held in check by moving the images and by weight decay
                )
            },
            epochs=20,
            batch_size=64,
            lr=2e-3,
            lr_decay=0.95,
            weight_decay=0.05,
            max_shift=1,
            as_rows=True,
        ),
        Classification(
            "resnet",
            "residual blocks: resnet20 of the paper's section 4.2, or 8 layers",
            {
                "resnet20": lambda: resnet20(in_channels=1),
                "resnet8": lambda: ResNet(
                    BasicBlock, (1, 1, 1), data.NUM_CLASSES, widths=(16, 32, 64), small_images=True, in_channels=1
                ),
            },
            epochs=8,
            batch_size=64,
            lr=2e-3,
            lr_decay=0.8,
            weight_decay=0.05,
            max_shift=2,
        ),
        Classification(
            "vgg",
            "3x3 convolutions and max-pools, for small images, with batch norm or without",
            {"norm": vgg_small, "plain": lambda: vgg_small(batch_norm=False)},
            epochs=6,
            batch_size=64,
            lr=1e-3,
            lr_decay=0.8,
            weight_decay=0.05,
            max_shift=2,
        ),
        Classification(
            "inception",
            "four modules of GoogLeNet's proportions",
            {"default": SmallInception},
            epochs=8,
            batch_size=64,
            lr=2e-3,
            lr_decay=0.8,
            weight_decay=0.05,
            max_shift=2,
        ),
        NextCharacter(
            "gpt",
            "the next character of text, by a small GPT",
            {
                "default": lambda: GPT(data.CHARACTERS, 128, 3, 4, max_length=data.TEXT_LENGTH, dropout=0.0),
                "tiny": lambda: GPT(data.CHARACTERS, 64, 2, 4, max_length=data.TEXT_LENGTH, dropout=0.0),
            },
            epochs=4,
            batch_size=32,
            lr=2e-3,
            lr_decay=0.7,
            weight_decay=0.01,
            warmup_steps=50,
        ),
        NextSample(
            "wavenet",
            "the next sample of audio, by eight gated layers",
            {"default": lambda: WaveNet(num_stacks=1), "tiny": lambda: WaveNet(32, 16, 16, 4, 1)},
            epochs=10,
            batch_size=8,
            lr=4e-3,
            lr_decay=0.85,
        ),
        Reconstruction(
            "autoencoder",
            "image to 32 numbers and back",
            {"conv": ConvAutoencoder, "dense": Autoencoder},
            epochs=30,
            batch_size=64,
            lr=4e-3,
            lr_decay=0.97,
        ),
        Adversarial(
            "gan",
            "generator against discriminator",
            {"conv": lambda: GAN("conv"), "dense": lambda: GAN("dense")},
            epochs=25,
            batch_size=64,
            lr=1e-3,
        ),
        Regression(
            "mlp",
            "1000-2000-1000-1 (wide) or 1000-500-100-1 (narrow), with or without ReLU",
            {
                "wide": BigModel,
                "wide-linear": lambda: BigModel(relu=False),
                "narrow": lambda: BigModel(BigModel.NARROW),
                "narrow-linear": lambda: BigModel(BigModel.NARROW, relu=False),
            },
            epochs=8,
            batch_size=64,
            lr=3e-4,
            lr_decay=0.8,
        ),
    )
}
