"""The pictures of a training run."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from .errors import require

GAP = 2  # pixels around each image of a grid


def format_metric(value: float, label: str) -> str:
    """The metric as a person writes it: shares in percent."""
    return f"{value:.1%}" if _is_share(label) else f"{value:.3f}"


def _is_share(label: str) -> bool:
    return "accuracy" in label or "explained" in label


def _pyplot():
    require("matplotlib", "the loss curve").use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def save_curves(
    path: str | Path,
    title: str,
    losses: dict[str, list[float]],
    metrics: list[float],
    metric_label: str,
    lower_is_better: bool,
) -> None:
    """Training loss by step on the left, the test metric by epoch on the right."""
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title)
    for index, (label, values) in enumerate(losses.items()):
        color = f"C{index}"
        left.plot(range(1, len(values) + 1), values, color=color, alpha=0.3, linewidth=0.8, label=f"{label}, each step")
        per_epoch = len(values) // max(len(metrics), 1)
        if per_epoch > 1:
            means = [
                sum(values[start : start + per_epoch]) / per_epoch
                for start in range(0, len(values) - per_epoch + 1, per_epoch)
            ]
            middles = [per_epoch * (position + 0.5) for position in range(len(means))]
            left.plot(middles, means, color=color, linewidth=2, label=f"{label}, mean of an epoch")
    left.set(title="training", xlabel="step", ylabel="loss")
    if all(value > 0 for values in losses.values() for value in values):
        left.set_yscale("log")
    left.legend(frameon=False)

    epochs = range(1, len(metrics) + 1)
    right.plot(epochs, metrics, color="C2", marker="o", markersize=4, linewidth=2)
    last = (len(metrics), metrics[-1])
    text = format_metric(metrics[-1], metric_label)
    right.annotate(text, last, textcoords="offset points", xytext=(0, 8), ha="right")
    better = "lower is better" if lower_is_better else "higher is better"
    right.set(title=f"{metric_label} ({better})", xlabel="epoch", ylabel=metric_label)
    if _is_share(metric_label):
        right.yaxis.set_major_formatter(importlib.import_module("matplotlib.ticker").PercentFormatter(1.0))
    right.xaxis.get_major_locator().set_params(integer=True)
    right.margins(y=0.15)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def save_pictures(
    stem: Path,
    title: str,
    images: Tensor,  # [rows, columns, H, W] in [0, 1]
) -> Path:
    """A grid of images on white, with a gap between them, as <stem>.png."""
    plt = _pyplot()
    path = stem.with_suffix(".png")
    images = F.pad(images, (GAP,) * 4)
    rows, columns, height, width = images.shape
    grid = images.clamp(0, 1).cpu().permute(0, 2, 1, 3).reshape(rows * height, columns * width).numpy()
    figure, axis = plt.subplots(figsize=(columns * 0.8, rows * 0.8 + 0.4), layout="constrained")
    axis.imshow(grid, cmap="gray_r", vmin=0, vmax=1)
    axis.set_title(title)
    axis.axis("off")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
