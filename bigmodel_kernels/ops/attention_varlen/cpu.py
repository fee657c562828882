"""The C++ kernels of csrc/cpu/attention_*.h, with the tasks of all sequences shared out together."""

from __future__ import annotations

import torch

from bigmodel_kernels import _cpu


def supports(q, *rest) -> str | None:
    return _cpu.reason(q, "q")


def _native(q, k, v, cu_seqlens_q, cu_seqlens_k, *rest) -> tuple:
    """The arguments of the native ops; every result is deterministic, and lse comes always."""
    return q, k, v, cu_seqlens_q.long().contiguous(), cu_seqlens_k.long().contiguous(), *rest[:-3]


def fwd(*args):
    outputs = torch.ops.bigmodel_native.attention_varlen_fwd(*_native(*args), args[-1])
    return outputs[:2] if outputs[2] is None else outputs


def bwd(grad_out, grad_lse, out, lse, kept, *args):
    return torch.ops.bigmodel_native.attention_varlen_bwd(grad_out, grad_lse, out, lse, kept, *_native(*args))
