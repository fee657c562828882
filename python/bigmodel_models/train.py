"""Training of the models: `train` for programs and tests; the command line lies in ``__main__.py``.

A run is a function of its settings and seed: data order, augmentation, noise and learning rate of an epoch depend on
the seed and the number of the epoch alone, so that a resumed run goes on as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

import bigmodel_kernels as bmk

from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from .data import DataSet, random_shift
from .errors import TrainingError, require
from .figures import format_metric, save_curves
from .tasks import TASKS, Task

METRIC = "metric"  # the series of the history that holds the test metric of each epoch


@dataclass(frozen=True)
class Settings:
    """What decides the numbers of a run; kept in its checkpoint."""

    name: str
    variant: str
    data: str
    batch_size: int
    lr: float
    seed: int


@dataclass
class TrainResult:
    """What a run came to."""

    settings: Settings
    kernels: dict[str, str]  # the backend that each op of the model got
    metric_label: str
    metric: float  # the test metric after the last epoch
    lower_is_better: bool
    losses: list[float]  # of each step (a GAN: the generator's)
    metrics: list[float]  # the test metric after each epoch
    series: dict[str, list[float]]  # every loss of each step, by name
    epochs: int
    seconds: float  # of this run's steps and tests; not of loading data or drawing pictures
    model: nn.Module = field(repr=False)
    files: dict[str, str] = field(default_factory=dict)

    def summary(self) -> dict[str, object]:
        """The result as JSON can hold it, without the model."""
        values = {key: value for key, value in vars(self).items() if key not in ("model", "settings")}
        return asdict(self.settings) | values | {"torch": torch.__version__, "threads": torch.get_num_threads()}


def train(
    name: str,
    *,
    variant: str | None = None,
    data: str | None = None,
    data_dir: str | Path = "data",
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    backend: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    max_steps: int | None = None,
    on_step: Callable[[int, int, dict[str, float], list[float]], None] | None = None,
) -> TrainResult:
    """Trains one of the models and tests it after each epoch.

    Args:
        name: one of `bigmodel_models.tasks.TASKS`, such as ``cnn`` or ``gpt``.
        variant: a form of the model (``python -m bigmodel_models list`` shows them); the first by default.
        data: ``digits``, ``mnist``, ``synthetic``, ``topics`` (text) or ``tones`` (audio), of those that the model can use; its
            first by default.
        data_dir: folder of the MNIST files.
        epochs: passes over the training data in all, those before a resume included.
        batch_size, lr: the model's tuned values by default.
        seed: of weights, order, augmentation and noise; 0 by default.
        backend: a name for `bigmodel_kernels.use_backend`; None leaves what the caller or the environment chose.
        device: where to train, such as ``cpu`` or ``cuda``.
        threads: CPU threads for this run.
        out: folder for the checkpoint (after each epoch), the curves, samples of what the model makes and ``metrics.json``;
            None writes nothing.
        resume: a checkpoint; its model, variant, data, batch size, learning rate and seed are taken from it.
        max_steps: stop after so many steps of this call, mid-epoch if need be; such an epoch leaves no checkpoint.
        on_step: called after each step with (steps done, steps in all, losses, metrics so far).

    Raises:
        TrainingError: a setting is wrong or something is missing; the message names the remedy.
    """
    task = TASKS.get(name)
    if task is None:
        raise TrainingError(f"model: expected one of {', '.join(TASKS)}, got {name!r}")
    for label, value in (
        ("epochs", epochs),
        ("batch_size", batch_size),
        ("threads", threads),
        ("max_steps", max_steps),
    ):
        if value is not None and value < 1:
            raise TrainingError(f"{label}: expected at least 1, got {value}")
    if lr is not None and not (math.isfinite(lr) and lr > 0):
        raise TrainingError(f"lr: expected a positive number, got {lr}")
    given = {"variant": variant, "data": data, "batch_size": batch_size, "lr": lr, "seed": seed}
    checkpoint = None if resume is None else load_checkpoint(resume)
    settings = _fresh_settings(task, given) if checkpoint is None else _resumed_settings(task, given, checkpoint)
    epochs = task.epochs if epochs is None else epochs
    if checkpoint is not None and checkpoint.epoch >= epochs:
        raise TrainingError(
            f"epochs: the checkpoint holds {checkpoint.epoch} already; pass --epochs above that, got {epochs}"
        )
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        raise TrainingError("device 'cuda' is not usable in this PyTorch: use --device cpu, or install a CUDA build")
    dataset = task.load(settings.data, str(data_dir))
    if settings.batch_size > len(dataset.train_x):
        raise TrainingError(
            f"batch_size: {settings.batch_size} is above the {len(dataset.train_x)} training samples of {dataset.name}"
        )
    folder = None if out is None else Path(out)
    if folder is not None:
        require("safetensors.torch", "--out")  # now, not after the training
        require("matplotlib", "--out")
        folder.mkdir(parents=True, exist_ok=True)
    old_threads = torch.get_num_threads()
    with torch.random.fork_rng(), _backend(backend):
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            run = _Run(task, settings, dataset, device, checkpoint)
            kernels = run.probe(backend)
            result = run.train(epochs, kernels, folder, max_steps, on_step)
            if folder is not None:
                _write_report(task, run, result, folder)
        finally:
            torch.set_num_threads(old_threads)
    return result


def _backend(name: str | None) -> contextlib.AbstractContextManager:
    if name is None:
        return contextlib.nullcontext()
    known = {"auto": "ok"} | bmk.backends()
    if name not in known:
        raise TrainingError(f"backend: expected one of {', '.join(known)}, got {name!r}")
    if known[name] != "ok":
        raise TrainingError(f"backend: {name!r} cannot run here: {known[name]}; 'auto' takes the fastest one that can")
    return bmk.use_backend(name)


def _fresh_settings(task: Task, given: dict[str, object]) -> Settings:
    defaults = {
        "variant": task.variants[0],
        "data": task.data_names[0],
        "batch_size": task.batch_size,
        "lr": task.lr,
        "seed": 0,
    }
    values = {key: defaults[key] if value is None else value for key, value in given.items()}
    if values["variant"] not in task.variants:
        raise TrainingError(f"variant: {task.name} has {', '.join(task.variants)}; got {values['variant']!r}")
    if values["data"] not in task.data_names:
        raise TrainingError(f"data: {task.name} trains on {' or '.join(task.data_names)}, got {values['data']!r}")
    return Settings(task.name, **values)


def _resumed_settings(task: Task, given: dict[str, object], checkpoint: Checkpoint) -> Settings:
    settings = Settings(**checkpoint.settings)
    if settings.name != task.name:
        raise TrainingError(f"the checkpoint holds a {settings.name}: run 'train {settings.name}' to resume it")
    for key, value in given.items():
        kept = getattr(settings, key)
        if value is not None and value != kept:
            option = "--" + key.replace("_", "-")
            raise TrainingError(
                f"{option}: the checkpoint was trained with {kept}, got {value}; leave {option} out, or start anew "
                "without --resume"
            )
    return settings


class _Run:
    """Model, optimizers and history of one run."""

    def __init__(
        self, task: Task, settings: Settings, dataset: DataSet, device: str, checkpoint: Checkpoint | None
    ) -> None:
        self.task, self.settings, self.dataset, self.device = task, settings, dataset, device
        torch.manual_seed(settings.seed)
        self.model = task.builders[settings.variant]().to(device)
        self.optimizers = task.optimizers(self.model, settings.lr)
        self.history: dict[str, list[float]] = {METRIC: []}
        self.first_epoch = 0
        self.test_x = task.inputs(dataset.test_x, dataset).to(device)
        self.test_y = dataset.test_y.to(device)
        if checkpoint is not None:
            self.model.load_state_dict(checkpoint.model)
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(checkpoint.optimizers[name])
            self.history = checkpoint.history
            self.first_epoch = checkpoint.epoch

    def probe(self, backend: str | None) -> dict[str, str]:
        """The backend that each op of the model gets on a batch of this run."""
        batch = self.task.inputs(self.dataset.train_x[: self.settings.batch_size], self.dataset).to(self.device)
        self.model.eval()  # batch statistics stay as they are
        try:
            explanation = bmk.explain(lambda: self.task.probe(self.model, batch))
        except RuntimeError as error:
            if backend in (None, "auto", "torch"):
                raise
            raise TrainingError(f"{error}\nbackend 'auto' takes the fastest one that can") from error
        return {call.op: call.backend for call in explanation.calls}

    def train(
        self,
        epochs: int,
        kernels: dict[str, str],
        folder: Path | None,
        max_steps: int | None,
        on_step: Callable[[int, int, dict[str, float], list[float]], None] | None,
    ) -> TrainResult:
        steps_per_epoch = len(self.dataset.train_x) // self.settings.batch_size
        total = (epochs - self.first_epoch) * steps_per_epoch
        total = total if max_steps is None else min(total, max_steps)
        done = 0
        files: dict[str, str] = {}
        start = time.perf_counter()
        for epoch in range(self.first_epoch, epochs):
            for index, (x, y) in enumerate(self._batches(epoch, steps_per_epoch)):
                self._set_lr(epoch, epoch * steps_per_epoch + index)
                losses = self.task.step(self.model, self.optimizers, x, y)
                self._record(losses, epoch)
                done += 1
                if on_step is not None:
                    on_step(done, total, losses, self.history[METRIC])
                if done == total:
                    break
            self.model.eval()
            self.history[METRIC].append(self.task.evaluate(self.model, self.test_x, self.test_y))
            complete = index + 1 == steps_per_epoch
            if folder is not None and complete:
                files["checkpoint"] = str(folder / "checkpoint.safetensors")
                save_checkpoint(files["checkpoint"], self._checkpoint(epoch + 1))
            if done == total:
                break
        seconds = time.perf_counter() - start
        series = {key: values for key, values in self.history.items() if key != METRIC}
        return TrainResult(
            settings=self.settings,
            kernels=kernels,
            metric_label=self.task.metric_label,
            metric=self.history[METRIC][-1],
            lower_is_better=self.task.lower_is_better,
            losses=next(iter(series.values())),
            metrics=self.history[METRIC],
            series=series,
            epochs=epoch + 1,
            seconds=seconds,
            model=self.model,
            files=files,
        )

    def _batches(self, epoch: int, steps: int):
        """The batches of one epoch; what is random in it, dropout and noise included, begins from (seed, epoch)."""
        torch.manual_seed(self.settings.seed * 1_000_003 + epoch + 1)
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch + 1)
        order = torch.randperm(len(self.dataset.train_x), generator=generator)
        images = self.dataset.train_x
        if self.task.max_shift:
            images = random_shift(images, self.task.max_shift, generator)
        x = self.task.inputs(images, self.dataset)
        self.model.train()
        for batch in order.split(self.settings.batch_size)[:steps]:
            yield x[batch].to(self.device), self.dataset.train_y[batch].to(self.device)

    def _set_lr(self, epoch: int, step: int) -> None:
        lr = self.settings.lr * self.task.lr_decay**epoch * min(1.0, (step + 1) / self.task.warmup_steps)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr

    def _record(self, losses: dict[str, float], epoch: int) -> None:
        for label, value in losses.items():
            if not math.isfinite(value):
                step = len(self.history.get(label, [])) + 1
                raise TrainingError(
                    f"{label} became {value} at step {step} (epoch {epoch + 1}): try a lower --lr than "
                    f"{self.settings.lr:g}"
                )
            self.history.setdefault(label, []).append(value)

    def _checkpoint(self, epoch: int) -> Checkpoint:
        states = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        return Checkpoint(self.model.state_dict(), states, self.history, asdict(self.settings), epoch)


def _write_report(task: Task, run: _Run, result: TrainResult, folder: Path) -> None:
    settings = result.settings
    variant = "" if len(task.variants) == 1 else f" ({settings.variant})"
    head = f"{settings.name}{variant} on {settings.data}"
    result.files["curves"] = str(folder / "loss.png")
    save_curves(
        result.files["curves"],
        f"{head}: {result.metric_label} {format_metric(result.metric, result.metric_label)} after {result.epochs} epochs",
        result.series,
        result.metrics,
        result.metric_label,
        result.lower_is_better,
    )
    samples = task.samples(run.model, run.test_x, folder / "samples", head)
    if samples is not None:
        result.files["samples"] = str(samples)
    result.files["metrics"] = str(folder / "metrics.json")
    Path(result.files["metrics"]).write_text(json.dumps(result.summary(), indent=2) + "\n")
