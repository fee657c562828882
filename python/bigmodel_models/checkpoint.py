"""A training run in one safetensors file: weights, optimizer state, history and settings; no pickled code.

Keys: ``model.<state_dict key>``, ``optimizer.<name>.<parameter index>.<state>``, ``history.<series>``. Settings and
optimizer groups are JSON in the file's metadata.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import TrainingError, require

FORMAT = "bigmodel_models-1"


@dataclass
class Checkpoint:
    """All that a run needs to go on. ``model`` is a state_dict that the plain PyTorch twin also loads."""

    model: dict[str, Tensor]
    optimizers: dict[str, dict]  # name -> state_dict of a torch.optim.Optimizer
    history: dict[str, list[float]]
    settings: dict[str, object]
    epoch: int  # epochs completed


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Writes ``path`` so that an interruption leaves either the old file or the new one."""
    # Copies: a safetensors file holds no tensor under two names, as tied weights are.
    plain = {"memory_format": torch.contiguous_format}
    tensors = {f"model.{key}": value.detach().cpu().clone(**plain) for key, value in checkpoint.model.items()}
    groups = {}
    for name, state in checkpoint.optimizers.items():
        groups[name] = state["param_groups"]
        for index, entries in state["state"].items():
            for key, value in entries.items():
                tensors[f"optimizer.{name}.{index}.{key}"] = value.detach().cpu().contiguous()
    for series, values in checkpoint.history.items():
        tensors[f"history.{series}"] = torch.tensor(values, dtype=torch.float64)
    metadata = {
        "format": FORMAT,
        "epoch": str(checkpoint.epoch),
        "settings": json.dumps(checkpoint.settings),
        "optimizer_groups": json.dumps(groups),
    }
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    require("safetensors.torch", "a checkpoint").save_file(tensors, str(partial), metadata=metadata)
    os.replace(partial, path)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads what `save_checkpoint` wrote."""
    path = Path(path)
    if not path.is_file():
        raise TrainingError(
            f"checkpoint {str(path)!r} does not exist: pass the checkpoint.safetensors of an earlier run"
        )
    safetensors = require("safetensors", "a checkpoint")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            keys = file.keys()
            tensors = {key: file.get_tensor(key) for key in keys}
    except safetensors.SafetensorError as error:
        raise TrainingError(f"checkpoint {str(path)!r} is not a safetensors file or is cut off: {error}") from error
    if metadata.get("format") != FORMAT:
        raise TrainingError(
            f"checkpoint {str(path)!r} was not written by this training command "
            f"(format {metadata.get('format')!r}, expected {FORMAT!r})"
        )
    optimizers = {
        name: {"state": {}, "param_groups": groups} for name, groups in json.loads(metadata["optimizer_groups"]).items()
    }
    model, history = {}, {}
    for key, value in tensors.items():
        kind, rest = key.split(".", 1)
        if kind == "model":
            model[rest] = value
        elif kind == "history":
            history[rest] = value.tolist()
        else:
            name, index, entry = rest.split(".")
            optimizers[name]["state"].setdefault(int(index), {})[entry] = value
    return Checkpoint(model, optimizers, history, json.loads(metadata["settings"]), int(metadata["epoch"]))
