"""Linear layers with the activation that follows them, against torch.nn's."""

import copy
from functools import partial

import torch
from torch import nn

import bigmodel_kernels as bmk
from benchmarks.cases import Case, Problem
from benchmarks.contestant import FWD, TRAIN, Contestant


def build(dtype, pass_, *, rows, inputs, outputs, activation=None) -> Problem:
    layers = [nn.Linear(inputs, outputs)] + ([activation()] if activation else [])
    stock = nn.Sequential(*layers).to(dtype)
    ours = nn.Sequential(copy.deepcopy(stock))  # what optimize() is given is a part of a model
    bmk.optimize(ours)
    x = torch.randn(rows, inputs).to(dtype).requires_grad_(pass_ == TRAIN)
    eager = Contestant("eager", stock, (x,))
    return Problem(ours=Contestant("ours", ours[0], (x,)), stock=[eager], flops=2.0 * rows * inputs * outputs)


CASES = [
    Case(
        "linear",
        "512 x 768-3072 + GELU",
        partial(build, rows=512, inputs=768, outputs=3072, activation=nn.GELU),
        quick=True,
    ),
    Case("linear", "2048 x 512-1536", partial(build, rows=2048, inputs=512, outputs=1536)),
    Case("linear", "1 x 4096-4096", partial(build, rows=1, inputs=4096, outputs=4096), (FWD,), ("fp32", "bf16")),
    Case("linear", "8 x 4096-4096", partial(build, rows=8, inputs=4096, outputs=4096), (FWD,), ("fp32", "bf16")),
    Case("linear", "64 x 3136-128 + ReLU", partial(build, rows=64, inputs=3136, outputs=128, activation=nn.ReLU)),
]
