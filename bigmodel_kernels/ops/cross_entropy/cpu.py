"""The C++ kernels of csrc/cpu/cross_entropy*.h."""

from __future__ import annotations

import re

import torch

from bigmodel_kernels import _cpu
from bigmodel_kernels._rows import rows_of


def supports(logits, *rest) -> str | None:
    return _cpu.reason(logits, "logits")


def fwd(logits, target, *options):
    try:
        return torch.ops.bigmodel_native.cross_entropy_fwd(rows_of(logits), target.contiguous(), *options)
    except RuntimeError as error:
        wrong = re.search(r"Target -?\d+ is out of bounds\.", str(error))
        if wrong is None:
            raise
        raise IndexError(wrong[0]) from None  # as PyTorch's own op


def plan(*args):
    """None: what goes here takes long enough not to need one."""
    return None


def bwd(d_loss, parts, logits, target, *options):
    return torch.ops.bigmodel_native.cross_entropy_bwd(
        d_loss.contiguous(), parts, rows_of(logits), target.contiguous(), *options
    )
