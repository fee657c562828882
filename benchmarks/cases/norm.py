"""RMS normalisation of rows, against torch.nn's."""

import copy
from functools import partial

import torch
from torch import nn

import bigmodel_kernels as bmk
from benchmarks.cases import Case, Problem
from benchmarks.contestant import TRAIN, Contestant

FLOPS_PER_ELEMENT = 6  # two sums, and what is made of each element


def build(dtype, pass_, *, rows, columns) -> Problem:
    stock = nn.RMSNorm(columns, eps=1e-5).to(dtype)
    ours = copy.deepcopy(stock)
    bmk.optimize(ours)
    x = torch.randn(rows, columns).to(dtype).requires_grad_(pass_ == TRAIN)
    return Problem(
        ours=Contestant("ours", ours, (x,)),
        stock=[Contestant("eager", stock, (x,))],
        flops=float(FLOPS_PER_ELEMENT * rows * columns),
    )


CASES = [
    Case(
        "norm",
        "RMSNorm 2048 x 1024",
        partial(build, rows=2048, columns=1024),
        dtypes=("fp32", "bf16"),
        quick=True,
    ),
]
