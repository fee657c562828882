"""bmk.gated_conv: WaveNet's layer in one pass over time."""

from __future__ import annotations

import torch
from torch import Tensor

from bigmodel_kernels._library import Op, autocast, needs_grad
from bigmodel_kernels.ops.conv.op import check_positive
from bigmodel_kernels.ops.gated_conv import layout, torch_op

NAMES = ("x", "weight", "bias", "out_weight", "out_bias", "skip_weight", "skip_bias", "skip")


def gated_conv(
    x: Tensor,  # [N, C, T]
    weight: Tensor,  # [2 D, C, K]
    bias: Tensor | None = None,  # [2 D]
    out_weight: Tensor | None = None,  # [C, D, 1]
    out_bias: Tensor | None = None,  # [C]
    skip_weight: Tensor | None = None,  # [S, D, 1]
    skip_bias: Tensor | None = None,  # [S]
    *,
    skip: Tensor | None = None,  # [N, S, T]
    dilation: int = 1,
    backend: str = "auto",
) -> tuple[Tensor | None, Tensor | None]:  # [N, C, T], [N, S, T]
    """The gated causal layer of WaveNet (van den Oord et al., 2016, arXiv 1609.03499).

    With a = tanh(first half of the channels of z) * sigmoid(second half), z = the causal dilated convolution of x + bias, it
    gives out = x + out_weight a + out_bias, the next layer's input, and skip + skip_weight a + skip_bias, the running sum of
    all layers' skip outputs.

    Args:
        x: zeros stand before its first step. Fastest with the channels innermost in memory ([N, T, C].transpose(1, 2));
            the results then are so too.
        weight: as of torch.nn.Conv1d, the rows of the filter (tanh) first, then those of the gate (sigmoid).
        out_weight, skip_weight: as of torch.nn.Conv1d with one tap; one of the two may be left out.
        skip: the sum so far; zeros by default.
        dilation: steps between the taps.
        backend: "auto", "cpu", "torch" or "triton".

    Returns:
        (out, skip), None for the one whose weight is left out.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: both weights of the outputs left out, or a dilation that is not positive.
        RuntimeError: sizes, dtypes or devices that do not go together, or the backend asked for cannot take the call.
    """
    args = prepare(
        x, weight, bias, out_weight, out_bias, skip_weight, skip_bias, skip=skip, dilation=dilation
    )  # fmt: skip
    out, total, *_ = OP(*args, backend=backend)
    return None if out_weight is None else out, None if skip_weight is None else total


def prepare(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out_weight: Tensor | None = None,
    out_bias: Tensor | None = None,
    skip_weight: Tensor | None = None,
    skip_bias: Tensor | None = None,
    *,
    skip: Tensor | None = None,
    dilation: int = 1,
) -> tuple:
    """Validates a call of `gated_conv`; returns the arguments of the op."""
    tensors = x, weight, bias, out_weight, out_bias, skip_weight, skip_bias, skip
    for name, t in zip(NAMES, tensors):
        if not isinstance(t, Tensor) and (t is not None or name in ("x", "weight")):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    check_positive("dilation", dilation)
    if out_weight is None and skip_weight is None:
        raise ValueError("out_weight and skip_weight must not both be left out: nothing would be computed")
    for name, t, weight_name, w in (
        ("out_bias", out_bias, "out_weight", out_weight), ("skip_bias", skip_bias, "skip_weight", skip_weight),
        ("skip", skip, "skip_weight", skip_weight),
    ):  # fmt: skip
        if t is not None and w is None:
            raise ValueError(f"{name} needs {weight_name}, which is left out")
    if x.dim() != 3:
        raise RuntimeError(f"x must have shape [N, C, T], got {list(x.shape)}")
    batch, channels, length = x.shape
    if weight.dim() != 3 or weight.shape[0] % 2 or weight.shape[1] != channels or 0 in weight.shape:
        raise RuntimeError(f"weight must have shape [2 D, {channels}, K], got {list(weight.shape)}")
    rows, _, kernel = weight.shape
    gates = rows // 2
    skips = 0 if skip_weight is None or skip_weight.dim() == 0 else skip_weight.shape[0]
    shapes = (
        (batch, channels, length), (rows, channels, kernel), (rows,), (channels, gates, 1), (channels,),
        (skips, gates, 1), (skips,), (batch, skips, length),
    )  # fmt: skip
    x, *others = args = autocast(*tensors)
    dtype, device = x.dtype, x.device
    for name, t, shape in zip(NAMES[1:], others, shapes[1:]):
        if t is None:
            continue
        if t.shape != shape:
            raise RuntimeError(f"{name} must have shape {list(shape)}, got {list(t.shape)}")
        if t.dtype != dtype or t.device != device:
            raise RuntimeError(f"{name} must be {dtype} on {device} as x is, got {t.dtype} on {t.device}")
    return *args, dilation, needs_grad(*tensors)


def _fake_fwd(x, weight, bias, out_weight, out_bias, skip_weight, skip_bias, skip, dilation, save):
    return (
        x.new_empty(0) if out_weight is None else layout.empty(x, x.shape[1]),
        x.new_empty(0) if skip_weight is None else layout.empty(x, skip_weight.shape[0]),
        x.new_empty(layout.gates_shape(x, weight, save), dtype=torch.float16),
    )


def _fake_bwd(d_out, d_skip, gates, need_x, need_weights, x, *rest):
    weights = (t if need_weights else None for t in rest[:6])
    return (
        layout.empty(x, x.shape[1]) if need_x else x.new_empty(0),
        *(x.new_empty(0) if t is None else x.new_empty(t.shape) for t in weights),
    )


def _backward(op, args, outputs, grads, needs, backend):
    gradients = (None,) * 7
    need_weights = any(needs[1:7])
    if needs[0] or need_weights:
        gradients = op.bwd(*grads, outputs[2], needs[0], need_weights, *args, backend)
    return (*(g if need else None for g, need in zip(gradients, needs)), grads[1] if needs[7] else None, None, None)


def prefer(x, *rest) -> tuple[str, ...]:
    """The kernels on a CPU; on a GPU PyTorch's own until they have been timed there."""
    return ("cpu", "torch") if x.is_cpu else ("torch",)


_ARGS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? out_weight, Tensor? out_bias, Tensor? skip_weight, Tensor? skip_bias, "
    "Tensor? skip, int dilation, bool save"
)
OP = Op(
    "gated_conv",
    f"({_ARGS}) -> (Tensor out, Tensor skip_out, Tensor gates)",
    f"(Tensor? d_out, Tensor? d_skip, Tensor gates, bool need_x, bool need_weights, {_ARGS}) -> "
    "(Tensor d_x, Tensor d_weight, Tensor d_bias, Tensor d_out_weight, Tensor d_out_bias, Tensor d_skip_weight, "
    "Tensor d_skip_bias)",
    fake_fwd=_fake_fwd,
    fake_bwd=_fake_bwd,
    prefer=prefer,
    backward=_backward,
    differentiable=torch_op.call,
    results=2,
    reads_results=lambda *args: False,
)
gated_conv.op, gated_conv.prepare = OP, prepare
