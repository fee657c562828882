"""The cases: what is computed, at which size, and by whom. One file per op, named after it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.contestant import FWD, PASSES, Contestant

OPS = ("attention", "conv", "lstm")
MODELS = ("mlp", "cnn", "rnn", "transformer", "autoencoder", "gan")


@dataclass(frozen=True)
class Problem:
    """One case made concrete: `stock[0]` is what a user writes first, and the formula that float64 is run on."""

    ours: Contestant
    stock: list[Contestant]
    flops: float  # of the forward pass
    backward: float = 2.0  # flops of the backward pass over those of the forward pass
    weight_bytes: int = 0  # filled in by nothing but the contestants: see traffic()
    steps: int = 0  # time steps of a recurrence: the error caps grow with their square root
"""


"""
