"""The launchers of the Triton kernels of triton_rows.py."""

from __future__ import annotations

import torch

from bigmodel_kernels import _triton
from bigmodel_kernels.ops.cross_entropy import reference
from bigmodel_kernels.ops.cross_entropy.triton_rows import backward_kernel, blocks, forward_kernel

MOST_PROGRAMS = 2**31 - 1


def _blocks(kernel: str, logits) -> dict[str, int]:
    return blocks(logits.device.index, kernel, logits.element_size(), logits.shape[1])


def supports(logits, target, *rest) -> str | None:
    if (why := _triton.reason(logits)) is not None:
        return why
    rows, classes = logits.shape
    if rows * -(-classes // _blocks("backward", logits)["BLOCK"]) > MOST_PROGRAMS:
        return f"the kernels take fewer logits than {rows} x {classes}"
    return None


def fwd(logits, target, ignore_index, label_smoothing, reduction):
    rows, classes = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    parts = torch.empty(2, rows, dtype=torch.float32, device=logits.device)
    _triton.launch(
        forward_kernel, rows, logits, target.contiguous(), losses, parts,
        classes, *logits.stride(), ignore_index, label_smoothing, SMOOTH=label_smoothing > 0, **_blocks("forward", logits),
    )  # fmt: skip
    loss = losses
    if reduction != "none":
        loss = reference.reduce(losses, target != ignore_index, reduction)
    return loss.to(logits.dtype), parts


def bwd(d_loss, parts, logits, target, ignore_index, label_smoothing, reduction):
    rows, classes = logits.shape
    d_rows = reference.row_gradients(d_loss.float(), target != ignore_index, reduction)
    d_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    sizes = _blocks("backward", logits)
    _triton.launch(
        backward_kernel, rows * -(-classes // sizes["BLOCK"]),
        logits, target.contiguous(), parts, d_rows.contiguous(), d_logits,
        rows, classes, *logits.stride(), ignore_index, label_smoothing, **sizes,
    )  # fmt: skip
    return d_logits
