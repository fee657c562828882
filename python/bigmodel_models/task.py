"""What the training loop needs to know of any model: how it is built, fed, stepped and judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from . import data
from .data import DataSet

IMAGE_DATA = ("digits", "mnist", "synthetic")
Optimizers = dict[str, torch.optim.Optimizer]


@dataclass(frozen=True)
class Task:
    """One trainable model. The subclasses say what a step and a test are; the instances hold the tuned settings."""

    name: str
    summary: str
    builders: dict[str, Callable[[], nn.Module]]  # by variant; the first is the default
    epochs: int
    batch_size: int
    lr: float
    warmup_steps: int = 10  # of a learning rate that rises to lr
    lr_decay: float = 1.0  # the learning rate is multiplied by this after each epoch
    weight_decay: float = 0.0
    max_shift: int = 0  # augmentation: training images move by up to so many pixels
    data_names: tuple[str, ...] = IMAGE_DATA
    metric_label: str = field(default="", kw_only=True)
    lower_is_better: bool = field(default=False, kw_only=True)

    @property
    def variants(self) -> tuple[str, ...]:
        return tuple(self.builders)

    def load(self, name: str, data_dir: str) -> DataSet:
        return data.load(name, data_dir)

    def inputs(self, images: Tensor, dataset: DataSet) -> Tensor:
        """What the model is fed, from what the data set holds."""
        return images

    def optimizers(self, model: nn.Module, lr: float) -> Optimizers:
        return {"model": torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=self.weight_decay, fused=True)}

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    def step(self, model: nn.Module, optimizers: Optimizers, x: Tensor, y: Tensor) -> dict[str, float]:
        """One update on a batch; the losses before it, the one that matters most first."""
        optimizer = optimizers["model"]
        optimizer.zero_grad(set_to_none=True)
        loss = self.loss(model, x, y)
        loss.backward()
        optimizer.step()
        return {"loss": loss.item()}

    def evaluate(self, model: nn.Module, x: Tensor, y: Tensor) -> float:
        """The metric on test inputs ``x`` and targets ``y``."""
        raise NotImplementedError

    def probe(self, model: nn.Module, x: Tensor) -> Tensor:
        """One pass through every part of the model, to see which backend each op gets."""
        return model(x)

    def samples(self, model: nn.Module, x: Tensor, stem: Path, head: str) -> Path | None:
        """Writes a file named `stem` and a suffix that shows what the model makes, for those that make something."""
        return None


def predict(model: nn.Module, x: Tensor, batch_size: int = 512) -> Tensor:
    """The model's output on all of ``x``, without gradient, batch by batch."""
    with torch.no_grad():
        return torch.cat([model(part) for part in x.split(batch_size)])
