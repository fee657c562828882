"""PyTorch's own cross-entropy. `fwd` and `bwd` are for compiled graphs, whose backend is chosen only when they run."""

from __future__ import annotations

import torch.nn.functional as F

from bigmodel_kernels.ops.cross_entropy.reference import bwd as bwd
from bigmodel_kernels.ops.cross_entropy.reference import fwd as fwd


def supports(*args) -> str | None:
    return None


def call(logits, target, ignore_index, label_smoothing, reduction):
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": reduction}
    return F.cross_entropy(logits, target, **options), None


def plan(logits, target, *options):
    """`call` for arguments of these shapes as a function of the two tensors."""
    return lambda logits, target: call(logits, target, *options)[0]
