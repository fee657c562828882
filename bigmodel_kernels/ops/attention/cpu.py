"""The C++ kernels of csrc/cpu/attention_*.h."""

from __future__ import annotations

import torch

from bigmodel_kernels import _cpu


def supports(q, k, v, attn_mask, *rest) -> str | None:
    return _cpu.reason(q, "q")


def fwd(*args):
    return torch.ops.bigmodel_native.attention_fwd(*args[:12], False)[
        :2
    ]  # lse comes always, and every result is deterministic


def train(*args):
    """As fwd; where a row's keys are few also its probabilities, for bwd."""
    return torch.ops.bigmodel_native.attention_fwd(*args[:12], True)


def bwd(grad_out, grad_lse, out, lse, mask_grad, *args, kept=None):
    return torch.ops.bigmodel_native.attention_bwd(grad_out, grad_lse, out, lse, mask_grad, *args[:12], kept)
