"""Softmax cross-entropy as its formula reads, and its gradient written out.

    m = max z        l = log sum exp(z - m)        loss = l + (1 - s) (m - z[target]) + s (m - mean z)
    dz = (exp(z - m - l) - (1 - s) [target] - s / C) dloss
with smoothing s over C classes (Szegedy et al. 2016), for rows whose target is not ignore_index; "mean" divides by their number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bigmodel_kernels.ops.attention.reference import arithmetic_dtype


def fwd(
    logits: Tensor,  # [N, C]
    target: Tensor,  # [N]
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """The loss, [1] or [N] for "none", and m, l of every row, [2, N]."""
    z = logits.to(arithmetic_dtype(logits))
    largest = z.detach().amax(1)
    log_sum = (z - largest[:, None]).exp().sum(1).log()
    counts = target != ignore_index
    chosen = z.gather(1, torch.where(counts, target, 0)[:, None])[:, 0]
    losses = log_sum + (1 - label_smoothing) * (largest - chosen)
    if label_smoothing > 0:
        losses = losses + label_smoothing * (largest - z.mean(1))
    return reduce(torch.where(counts, losses, 0), counts, reduction).to(logits.dtype), torch.stack([largest, log_sum])


def reduce(losses: Tensor, counts: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    loss = losses.sum(0, keepdim=True)
    return loss / counts.sum() if reduction == "mean" else loss


def row_gradients(d_loss: Tensor, counts: Tensor, reduction: str) -> Tensor:
    """dloss of every row, [N]; 0 where the target is ignored."""
    if reduction == "mean":
        d_loss = d_loss / counts.sum()
    return torch.where(counts, d_loss, 0)


def bwd(
    d_loss: Tensor,
    parts: Tensor,  # [2, N]
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    counts = target != ignore_index
    d_row = row_gradients(d_loss.to(parts.dtype), counts, reduction)[:, None]
    dz = torch.exp(logits.to(parts.dtype) - parts[0, :, None] - parts[1, :, None]) - label_smoothing / logits.shape[1]
    at = torch.where(counts, target, 0)[:, None]
    dz = dz.scatter_add(1, at, torch.full_like(dz, label_smoothing - 1))
    return torch.where(counts[:, None], dz * d_row, 0).to(logits.dtype)
