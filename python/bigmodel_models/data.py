"""The data the models train on: real handwritten digits that ship in a package, MNIST, text that ships with Python, and
synthetic images, numbers and tones.

Images are kept as [N, 1, 28, 28] in [0, 1]; what a model needs (standardised, in [-1, 1], as rows) is derived later.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import TrainingError, require

IMAGE_SIZE = 28
NUM_CLASSES = 10
CHARACTERS = 128  # ASCII
TEXT_LENGTH = 128  # characters of one sample
SAMPLE_RATE = 8000  # of audio, in Hz
SPLIT_SEED = 0  # the split is part of the data, not of a run: every seed is tested on the same images


@dataclass(frozen=True)
class DataSet:
    """Inputs and targets, split into a training and a test part that share no sample."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def standardised(self, x: Tensor) -> Tensor:
        """``x`` with the mean and the standard deviation of the training inputs removed."""
        mean, std = self.train_x.mean(), self.train_x.std()
        return (x - mean) / std


def load(name: str, data_dir: str | Path = "data") -> DataSet:
    """The image data set ``digits``, ``mnist`` or ``synthetic``."""
    if name == "digits":
        return digits()
    if name == "mnist":
        return mnist(data_dir)
    if name == "synthetic":
        return synthetic_images()
    raise TrainingError(f"data: expected one of digits, mnist, synthetic, got {name!r}")


def digits() -> DataSet:
    """1,797 handwritten digits of scikit-learn, 8x8 resized to 28x28; a quarter of each class is the test part."""
    bunch = require("sklearn.datasets", "--data digits").load_digits()
    split = require("sklearn.model_selection", "--data digits").train_test_split
    small = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16.0  # ink is counted 0..16
    images = F.interpolate(small, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    train, test = split(range(len(labels)), test_size=0.25, random_state=SPLIT_SEED, stratify=labels.tolist())
    return DataSet("digits", images[train], labels[train], images[test], labels[test])


def mnist(data_dir: str | Path) -> DataSet:
    """MNIST through torchvision, from files that are already there: nothing is downloaded."""
    try:
        from torchvision.datasets import MNIST
    except ImportError as error:
        raise TrainingError(
            "--data mnist needs torchvision: pip install torchvision, or use --data digits, which needs no files"
        ) from error
    parts = []
    for train in (True, False):
        try:
            part = MNIST(str(data_dir), train=train, download=False)
        except RuntimeError as error:
            raise TrainingError(
                f"--data mnist: no MNIST files under {str(data_dir)!r}. Fetch them once with\n"
                f'  python -c "from torchvision.datasets import MNIST; MNIST({str(data_dir)!r}, download=True)"\n'
                "or name their folder with --data-dir, or use --data digits, which needs no files"
            ) from error
        parts += [part.data[:, None].float() / 255.0, part.targets.to(torch.int64)]
    return DataSet("mnist", *parts)


def synthetic_images(train_size: int = 1280, test_size: int = 320) -> DataSet:
    """Ten smooth random patterns, each image one of them moved by up to two pixels and covered with noise."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    coarse = torch.rand(NUM_CLASSES, 1, 5, 5, generator=generator)
    patterns = F.interpolate(coarse, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=False)
    labels = torch.arange(train_size + test_size) % NUM_CLASSES
    images = random_shift(patterns.clamp(0, 1)[labels], 2, generator)
    images = (images + 0.2 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    return DataSet("synthetic", images[:train_size], labels[:train_size], images[train_size:], labels[train_size:])


def synthetic_regression(features: int = 1000, train_size: int = 2048, test_size: int = 512) -> DataSet:
    """``features`` noisy mixtures of 16 hidden causes, and a smooth nonlinear function of the causes as the target."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    causes = 16
    hidden = torch.randn(train_size + test_size, causes, generator=generator)
    mixing = torch.randn(causes, features, generator=generator) / math.sqrt(causes)
    x = hidden @ mixing + 0.1 * torch.randn(len(hidden), features, generator=generator)
    # mostly linear, so that the model without ReLU learns something, and bent, so that the one with ReLU learns more
    y = hidden[:, :8].sum(dim=1, keepdim=True) + 2.0 * hidden[:, 8:12].abs().sum(dim=1, keepdim=True)
    y = (y - y[:train_size].mean()) / y[:train_size].std()
    return DataSet("synthetic", x[:train_size], y[:train_size], x[train_size:], y[train_size:])


def text() -> DataSet:
    """The text of Python's help on its own language, as ASCII codes, in samples of 128 characters and the one after each; the
    last tenth is the test part. It differs a little from one version of Python to the next."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:  # some systems ship Python without its help
        raise TrainingError(
            "--data topics needs pydoc_data, a part of Python's standard library; on Debian: apt-get install python3"
        ) from error
    encoded = "\n".join(topics.values()).encode("ascii", "replace")
    codes = torch.tensor(list(encoded), dtype=torch.uint8).long()
    count = (len(codes) - 1) // TEXT_LENGTH
    x, y = (codes[shift : shift + count * TEXT_LENGTH].view(count, TEXT_LENGTH) for shift in (0, 1))
    held = count // 10
    return DataSet("topics", x[:-held], y[:-held], x[-held:], y[-held:])


def as_text(
    codes: Tensor,  # [T] int64
) -> str:
    """The text that these ASCII codes are of."""
    return bytes(codes.tolist()).decode("ascii")


def tones(train_size: int = 256, test_size: int = 32, length: int = 1024) -> DataSet:
    """Notes of five harmonics that fade, two to a sample, with a little noise: audio in [-1, 1], and the sample after each."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    count, time = train_size + test_size, torch.arange(length + 1) / SAMPLE_RATE
    pitch = 110.0 * 2 ** (torch.randint(0, 25, (count, 2, 1, 1), generator=generator) / 12)  # two octaves of semitones
    harmonic = torch.arange(1, 6)[:, None]
    phase = torch.rand(count, 2, 5, 1, generator=generator)
    fade = torch.exp(-8.0 * harmonic * time)
    notes = (fade / harmonic * torch.sin(2 * math.pi * (harmonic * pitch * time + phase))).sum(dim=(1, 2))
    audio = 0.3 * notes + 0.002 * torch.randn(count, length + 1, generator=generator)
    x, y = audio[:, :-1].clamp(-1, 1), audio[:, 1:].clamp(-1, 1)
    return DataSet("tones", x[:train_size], y[:train_size], x[train_size:], y[train_size:])


def random_shift(
    images: Tensor,  # [N, 1, H, W]
    max_shift: int,
    generator: torch.Generator,
) -> Tensor:  # [N, 1, H, W]
    """Each image moved by its own -max_shift..max_shift pixels in both directions, black where nothing moved in."""
    count, _, height, width = images.shape
    padded = F.pad(images[:, 0], (max_shift,) * 4)
    shift = torch.randint(0, 2 * max_shift + 1, (2, count), generator=generator)
    rows = shift[0][:, None] + torch.arange(height)  # [N, H]
    columns = shift[1][:, None] + torch.arange(width)  # [N, W]
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]][:, None]
