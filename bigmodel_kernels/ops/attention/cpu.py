"""The C++ kernels of csrc/cpu/attention_*.h."""

from __future__ import annotations

import torch

from bigmodel_kernels import _cpu


def supports(q, k, v, attn_mask, *rest) -> str | None:
    return _cpu.reason(q, "q")


def fwd(*args):
    return torch.ops.bigmodel_native.attention_fwd(*args[:12])  # lse comes always, and every result is deterministic


def bwd(grad_out, grad_lse, out, lse, mask_grad, *args):
    return torch.ops.bigmodel_native.attention_bwd(grad_out, grad_lse, out, lse, mask_grad, *args[:12])
