"""bmk.cross_entropy: softmax cross-entropy from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from bigmodel_kernels._arguments import integer, number
from bigmodel_kernels._library import Op, autocast_enabled
from bigmodel_kernels._plans import Plans
from bigmodel_kernels.ops.cross_entropy import reference

REDUCTIONS = ("mean", "sum", "none")


def cross_entropy(
    logits: Tensor,  # [N, C] or [C]
    target: Tensor,  # [N] or [], int64
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """-log softmax(logits)[target], as torch.nn.functional.cross_entropy computes it for class indices.

    The probabilities are never held in memory: the forward keeps two numbers per row, the backward writes the gradient itself.

    Args:
        logits: of any strides.
        target: the class of each row, 0 .. C - 1, or ignore_index. IndexError for anything else; the Triton kernels,
            which cannot raise, give NaN for the loss of that row.
        ignore_index: rows with this target count for nothing.
        label_smoothing: the part of the target that is spread over all classes evenly, 0 .. 1 (Szegedy et al. 2016).
        reduction: "mean" over the rows that count, "sum", or "none".
        backend: "auto", "cpu", "torch" or "triton".

    Returns:
        The loss: [], or [N] for "none"; NaN for the mean of no rows, as in torch.

    Raises:
        RuntimeError: sizes, devices or dtypes that do not go together, or the backend asked for cannot take the call.
        TypeError: an argument of the wrong type.
        ValueError: label_smoothing, reduction or backend out of range.
    """
    key, plan = _PLANS.look_up(backend, (logits, target), (ignore_index, label_smoothing, reduction))
    if plan is not None:
        return plan(logits, target)
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": reduction}
    args = prepare(logits, target, **options)
    loss, *_ = OP(*args, backend=backend)
    if key is not None and logits.dim() == 2:
        _PLANS.remember(key, args, save=False)
    return loss.reshape(target.shape if reduction == "none" else ())


def prepare(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple:
    """Validates a call of `cross_entropy`; returns the arguments of the op."""
    for name, t in (("logits", logits), ("target", target)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    ignore_index, label_smoothing = integer("ignore_index", ignore_index), number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    if not logits.is_floating_point():
        raise RuntimeError(f"logits must have a floating dtype, got {logits.dtype}")
    if logits.dim() not in (1, 2) or logits.shape[-1] == 0:
        raise RuntimeError(f"logits must have shape [N, C] or [C] with classes, got {list(logits.shape)}")
    if target.dtype != torch.int64 or target.device != logits.device:
        raise RuntimeError(
            f"target must be class indices, torch.int64 on {logits.device}, got {target.dtype} on {target.device}"
        )
    if target.shape != logits.shape[:-1]:
        raise RuntimeError(f"target must have shape {list(logits.shape[:-1])}, got {list(target.shape)}")
    if not logits.is_cpu and autocast_enabled(logits.device.type):  # to float32, as torch's own
        logits = logits.float()
    if logits.dim() == 1:
        logits, target = logits[None], target[None]
    return logits, target, ignore_index, label_smoothing, reduction


def _fake_fwd(logits, target, ignore_index, label_smoothing, reduction):
    rows = logits.shape[:1]
    parts = logits.new_empty(2, *rows, dtype=reference.arithmetic_dtype(logits))
    return logits.new_empty(rows if reduction == "none" else 1), parts


def _fake_bwd(d_loss, parts, logits, *rest):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _backward(op, args, outputs, grads, needs, backend):
    return op.bwd(grads[0], outputs[1], *args, backend), None, None, None, None


def prefer(logits, *rest) -> tuple[str, ...]:
    """By the table "Normalisation and cross-entropy on the CPU" in docs/decisions.md; on a GPU PyTorch's
    own until the kernels have been timed there."""
    least = {torch.float32: 1 << 20, torch.bfloat16: 1 << 22}.get(logits.dtype)
    return ("cpu", "torch") if least and logits.numel() >= least else ("torch", "cpu")


_ARGS = "Tensor logits, Tensor target, int ignore_index, float label_smoothing, str reduction"
OP = Op(
    "cross_entropy",
    f"({_ARGS}) -> (Tensor loss, Tensor parts)",
    f"(Tensor d_loss, Tensor parts, {_ARGS}) -> Tensor",
    fake_fwd=_fake_fwd,
    fake_bwd=_fake_bwd,
    prefer=prefer,
    backward=_backward,
    differentiable=reference.fwd,
    results=1,
    reads_results=lambda *args: False,
)
_PLANS = Plans(OP)
cross_entropy.op, cross_entropy.prepare = OP, prepare
