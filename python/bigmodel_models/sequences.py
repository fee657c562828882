"""Tasks of sequences: the next character of a text, the next sample of audio."""

from __future__ import annotations

import math
import wave
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import bigmodel_kernels as bmk

from . import data
from .data import DataSet
from .task import Task
from .wavenet import mu_law_decode, mu_law_encode


@dataclass(frozen=True)
class NextToken(Task):
    """Cross-entropy of the token after each; judged by the bits that a token of the test part costs."""

    lower_is_better: bool = field(default=True, kw_only=True)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return bmk.cross_entropy(model(x).flatten(0, 1), y.flatten())

    def evaluate(self, model: nn.Module, x: Tensor, y: Tensor) -> float:
        with torch.no_grad():
            parts = zip(x.split(self.batch_size), y.split(self.batch_size))
            total = sum(self.loss(model, a, b).item() * len(a) for a, b in parts)
        return total / len(x) / math.log(2)


@dataclass(frozen=True)
class NextCharacter(NextToken):
    """On the text of Python's own help, by a model with `generate`."""

    data_names: tuple[str, ...] = ("topics",)
    metric_label: str = field(default="test bits per character", kw_only=True)

    def load(self, name: str, data_dir: str) -> DataSet:
        return data.text()

    def samples(self, model: nn.Module, x: Tensor, stem: Path, head: str) -> Path:
        """Three beginnings of the test part and how the model goes on."""
        start = x[: 3 * len(x) // 4 : max(1, len(x) // 4), : data.TEXT_LENGTH // 4][:3]
        generator = torch.Generator(x.device).manual_seed(0)
        more = data.TEXT_LENGTH - start.shape[1]
        drawn = model.generate(start, more, temperature=0.7, generator=generator)
        path = stem.with_suffix(".txt")
        pieces = [f"{data.as_text(a)}[model:]{data.as_text(b)}" for a, b in zip(start, drawn)]
        path.write_text(f"{head}; [model:] is where the model goes on\n\n" + "\n\n---\n\n".join(pieces) + "\n")
        return path


@dataclass(frozen=True)
class NextSample(NextToken):
    """On synthetic tones, as codes of as many levels as the model has, by a model with `generate`."""

    data_names: tuple[str, ...] = ("tones",)
    metric_label: str = field(default="test bits per sample", kw_only=True)

    def load(self, name: str, data_dir: str) -> DataSet:
        return data.tones()

    def inputs(self, audio: Tensor, dataset: DataSet) -> Tensor:
        return audio

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        levels = model.embedding.num_embeddings
        return super().loss(model, mu_law_encode(x, levels), mu_law_encode(y, levels))

    def probe(self, model: nn.Module, x: Tensor) -> Tensor:
        return model(mu_law_encode(x, model.embedding.num_embeddings))

    def samples(self, model: nn.Module, x: Tensor, stem: Path, head: str) -> Path:
        """Half a second that the model makes after a beginning of the test part, as 16-bit audio."""
        levels = model.embedding.num_embeddings
        generator = torch.Generator(x.device).manual_seed(0)
        codes = model.generate(data.SAMPLE_RATE // 2, mu_law_encode(x[:1, :256], levels), generator=generator)
        path = stem.with_suffix(".wav")
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(data.SAMPLE_RATE)
            file.writeframes((mu_law_decode(codes[0].cpu(), levels) * 32767).short().numpy().tobytes())
        return path
