"""Softmax cross-entropy from logits, against torch.nn's."""

from functools import partial

import torch
from torch import nn

import bigmodel_kernels as bmk
from benchmarks.cases import Case, Problem
from benchmarks.contestant import TRAIN, Contestant

FLOPS_PER_ELEMENT = 12  # the exponential, the maximum and the sum


class _Ours(nn.Module):
    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("target", target)

    def forward(self, logits):
        return bmk.cross_entropy(logits, self.target)


class _Stock(_Ours):
    def forward(self, logits):
        return nn.functional.cross_entropy(logits, self.target)


def build(dtype, pass_, *, rows, classes) -> Problem:
    target = torch.randint(0, classes, (rows,))
    logits = (3 * torch.randn(rows, classes)).to(dtype).requires_grad_(pass_ == TRAIN)
    return Problem(
        ours=Contestant("ours", _Ours(target), (logits,)),
        stock=[Contestant("eager", _Stock(target), (logits,))],
        flops=float(FLOPS_PER_ELEMENT * rows * classes),
        backward=1.0,
    )


CASES = [Case("cross_entropy", "256 rows x 32000 classes", partial(build, rows=256, classes=32000), quick=True)]
