"""The C++ kernels of csrc/cpu/attention_*.h."""

from __future__ import annotations

import torch

from bigmodel_kernels import _cpu, _extension
from bigmodel_kernels._library import needs_grad


def supports(q, k, v, attn_mask, *rest) -> str | None:
    return _cpu.reason(q, "q")


def plan(*args):
    """`fwd` without masks for such arguments as a function of its six tensors; None where a backward follows."""
    if needs_grad(*args[:3]):
        return None
    options = args[6:]

    def run(*tensors):
        try:
            return fwd(*tensors, *options)[0]
        except RuntimeError as error:
            if (lack := _extension.lack_of_memory(error, "attention", tensors)) is None:
                raise
            raise lack from error

    return run


def fwd(*args):  # lse comes always, and every result is deterministic
    return torch.ops.bigmodel_native.attention_fwd(*args[:12], False)[:2]


def train(*args):
    """As fwd; where a row's keys are few also its probabilities, for bwd."""
    return torch.ops.bigmodel_native.attention_fwd(*args[:12], True)


def bwd(grad_out, grad_lse, out, lse, mask_grad, *args, kept=None):
    return torch.ops.bigmodel_native.attention_bwd(grad_out, grad_lse, out, lse, mask_grad, *args[:12], kept)
