"""How a signal [N, C, T] lies in memory: as PyTorch makes it, or with its channels innermost, as [N, T, C]."""

from __future__ import annotations

import torch
from torch import Tensor


def is_innermost(x: Tensor) -> bool:
    """Whether the channels of x [N, C, T] are adjacent in memory, and its steps are not."""
    return x.shape[1] > 1 and x.shape[2] > 1 and x.stride(1) == 1 and x.stride(2) != 1


def empty(like: Tensor, channels: int) -> Tensor:
    """An uninitialised signal of so many channels in the layout of `like`."""
    batch, _, length = like.shape
    if is_innermost(like):
        return torch.empty(batch, length, channels, dtype=like.dtype, device=like.device).transpose(1, 2)
    return torch.empty(batch, channels, length, dtype=like.dtype, device=like.device)


def like(t: Tensor, x: Tensor) -> Tensor:
    """t in the layout of x."""
    return t.transpose(1, 2).contiguous().transpose(1, 2) if is_innermost(x) else t.contiguous()


def gates_shape(x: Tensor, weight: Tensor, save: bool) -> tuple[int, int, int]:
    """Of what the forward keeps for the backward: in bfloat16 on the CPU whole vectors of tanh and sigmoid, else nothing."""
    batch, _, length = x.shape
    kept = save and x.is_cpu and x.dtype == torch.bfloat16
    return batch if kept else 0, length, 2 * (-(-weight.shape[0] // 32) * 16)


def no_gates(x: Tensor, weight: Tensor, save: bool) -> Tensor:
    """The output of a backend whose backward computes them again."""
    return x.new_zeros(gates_shape(x, weight, save), dtype=torch.float16)
