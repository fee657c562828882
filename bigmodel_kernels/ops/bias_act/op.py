"""bmk.bias_act: bias, activation, dropout and residual after a linear layer, in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from bigmodel_kernels import _registry
from bigmodel_kernels._arguments import number
from bigmodel_kernels._library import Op, autocast
from bigmodel_kernels.ops.bias_act import reference

ACTIVATIONS = ("relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu")


def bias_act(
    x: Tensor,  # [.., C]
    bias: Tensor | None = None,  # [C]
    *,
    activation: str | None = None,
    dropout_p: float = 0.0,
    residual: Tensor | None = None,  # [.., C]
    backend: str = "auto",
) -> Tensor:
    """dropout(activation(x + bias)) + residual.

    Args:
        x: of any strides, as residual.
        bias: per element of the last dimension.
        activation: None, "relu", "gelu" (exact), "silu", "tanh", "sigmoid" or "leaky_relu" (slope 0.01).
        dropout_p: probability of dropping an element; the others are divided by 1 - dropout_p. Draws one seed from torch's
            generator; the backward draws the same elements again instead of keeping them.
        residual: added last.
        backend: "auto", "torch" or "triton".

    Returns:
        [.., C], contiguous.

    Raises:
        RuntimeError: sizes, devices or dtypes that do not go together, or the backend asked for cannot take the call.
        TypeError: an argument of the wrong type.
        ValueError: activation, dropout_p or backend out of range.
    """
    args = prepare(x, bias, activation=activation, dropout_p=dropout_p, residual=residual)
    if dropout_p > 0 and (
        torch.compiler.is_compiling() or _registry.select(OP.name, backend, prefer, args) != "torch"
    ):  # PyTorch's own op draws its own numbers
        seed = torch.randint(0, 2**62, (1,), dtype=torch.int64, device=x.device)
        args = (*args[:3], seed, *args[4:])
    return OP(*args, backend=backend)


def prepare(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    dropout_p: float = 0.0,
    residual: Tensor | None = None,
) -> tuple:
    """Validates a call of `bias_act`; returns the arguments of the op."""
    for name, t in {"x": x, "bias": bias, "residual": residual}.items():
        if not isinstance(t, Tensor) and (t is not None or name == "x"):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    dropout_p = number("dropout_p", dropout_p)
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be a probability in [0, 1], got {dropout_p}")
    if not x.is_floating_point():
        raise RuntimeError(f"x must have a floating dtype, got {x.dtype}")
    if x.dim() == 0:
        raise RuntimeError("x must have at least one dimension, got none")
    if not x.is_cpu:  # on the CPU torch's own pointwise ops return what they were given
        x, bias, residual = autocast(x, bias, residual)
    for name, t, shape in (("bias", bias, x.shape[-1:]), ("residual", residual, x.shape)):
        if t is not None and t.shape != shape:
            raise RuntimeError(f"{name} must have shape {list(shape)}, got {list(t.shape)}")
        if t is not None and (t.dtype != x.dtype or t.device != x.device):
            raise RuntimeError(f"{name} must be {x.dtype} on {x.device} as x is, got {t.dtype} on {t.device}")
    return x, bias, residual, None, activation or "none", dropout_p


def _fake_fwd(x, *rest):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_bwd(dy, need_bias, x, bias, *rest):
    return _fake_fwd(x), x.new_empty(x.shape[-1] if need_bias else 0)


def _backward(op, args, outputs, grads, needs, backend):
    d_x = d_bias = None
    if needs[0] or needs[1]:
        d_x, d_bias = op.bwd(grads[0], needs[1], *args, backend)
    return d_x if needs[0] else None, d_bias if needs[1] else None, grads[0] if needs[2] else None, None, None, None


def prefer(*args) -> tuple[str, ...]:
    """PyTorch's own until the kernels have been timed on a GPU."""
    return ("torch",)


_ARGS = "Tensor x, Tensor? bias, Tensor? residual, Tensor? seed, str activation, float dropout_p"
OP = Op(
    "bias_act",
    f"({_ARGS}) -> Tensor",
    f"(Tensor dy, bool need_bias, {_ARGS}) -> (Tensor d_x, Tensor d_bias)",
    fake_fwd=_fake_fwd,
    fake_bwd=_fake_bwd,
    prefer=prefer,
    backward=_backward,
    differentiable=reference.fwd,
    results=1,
    reads_results=lambda *args: False,
)
bias_act.op, bias_act.prepare = OP, prepare
