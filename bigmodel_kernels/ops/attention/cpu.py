"""The C++ kernels of csrc/cpu/attention_*.h."""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def supports(q, k, v, attn_mask, *rest) -> str | None:
    if not q.is_cpu:
        return f"q is on {q.device}, not on the CPU"
    if q.dtype not in DTYPES:
        return f"q is {q.dtype}; the kernels take float32, float64 and bfloat16"
    return None


def fwd(*args):
    return torch.ops.bigmodel_native.attention_fwd(*args[:12])  # lse comes always, and every result is deterministic


def bwd(grad_out, grad_lse, out, lse, mask_grad, *args):
    return torch.ops.bigmodel_native.attention_bwd(grad_out, grad_lse, out, lse, mask_grad, *args[:12])
