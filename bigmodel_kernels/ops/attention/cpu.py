"""The C++ kernels of csrc/cpu/attention_*.h."""

from __future__ import annotations

import torch

from bigmodel_kernels import _cpu
from bigmodel_kernels._library import needs_grad, run_backend


def supports(q, k, v, attn_mask, *rest) -> str | None:
    return _cpu.reason(q, "q")


def plan(*args):
    """`fwd` without masks for such arguments as a function of its six tensors; None where a backward follows."""
    if needs_grad(*args[:3]):
        return None
    options = args[6:]
    return lambda *tensors: run_backend("attention", "cpu", "fwd", (*tensors, *options))[0]


def fwd(*args):  # lse comes always, and every result is deterministic
    return torch.ops.bigmodel_native.attention_fwd(*args[:12], False)[:2]


def train(*args):
    """As fwd; where a row's keys are few also its probabilities, for bwd."""
    return torch.ops.bigmodel_native.attention_fwd(*args[:12], True)


def bwd(grad_out, grad_lse, out, lse, mask_grad, *args, kept=None):
    return torch.ops.bigmodel_native.attention_bwd(grad_out, grad_lse, out, lse, mask_grad, *args[:12], kept)
