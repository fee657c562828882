"""bmk.linear: a linear layer with bias, activation and residual in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels import _cpu
from bigmodel_kernels._library import Op, autocast, needs_grad
from bigmodel_kernels._plans import Plans
from bigmodel_kernels.ops.conv.op import check_like, parse_activation
from bigmodel_kernels.ops.linear import reference, torch_op

ACTIVATIONS = ("relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu")


def linear(
    x: Tensor,  # [.., I]
    weight: Tensor,  # [O, I]
    bias: Tensor | None = None,  # [O]
    *,
    activation: str | tuple[str, float] | None = None,
    residual: Tensor | None = None,  # [.., O]
    backend: str = "auto",
) -> Tensor:  # [.., O]
    """activation(x weight^T + bias) + residual.

    Args:
        x, weight, residual: of any strides.
        activation: None, "relu", "gelu" (exact), "silu", "tanh", "sigmoid", "leaky_relu" (slope 0.01) or ("leaky_relu", slope).
        residual: added last.
        backend: "auto", "cpu", "triton" or "torch".

    Returns:
        [.., O], contiguous.

    Raises:
        RuntimeError: sizes, devices or dtypes that do not go together, or the backend asked for cannot take the call.
        TypeError: an argument of the wrong type.
        ValueError: unknown activation or backend.
    """
    tensors = (x, weight, bias, residual)
    key, plan = _PLANS.look_up(backend, tensors, (activation,))
    if plan is not None:
        return plan(*tensors)
    args = prepare(x, weight, bias, activation=activation, residual=residual)
    y = OP(*args, backend=backend)[0]
    if key is not None:
        _PLANS.remember(key, args, save=args[-1])
    return y


def prepare(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | tuple[str, float] | None = None,
    residual: Tensor | None = None,
) -> tuple:
    """Validates a call of `linear`; returns the arguments of the op."""
    for name, t in (("x", x), ("weight", weight)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    save = needs_grad(x, weight, bias, residual)
    kind, slope = parse_activation(activation)
    if kind == "tanh_sigmoid":
        raise ValueError(f"activation must be None or one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    x, weight, bias, residual = autocast(x, weight, bias, residual)
    if not x.is_floating_point():
        raise RuntimeError(f"x must have a floating dtype, got {x.dtype}")
    if weight.dim() != 2:
        raise RuntimeError(f"weight must have 2 dimensions, got shape {list(weight.shape)}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise RuntimeError(f"x must have a last dimension of {weight.shape[1]}, got shape {list(x.shape)}")
    check_like("weight", weight, x)
    if bias is not None:
        _check("bias", bias, x, weight.shape[:1])
    if residual is not None:
        _check("residual", residual, x, (*x.shape[:-1], weight.shape[0]))
    return x, weight, bias, residual, kind, slope, save


def _check(name: str, t: Any, x: Tensor, shape: tuple) -> None:
    if isinstance(t, Tensor) and tuple(t.shape) != tuple(shape):
        raise RuntimeError(f"{name} must have shape {list(shape)}, got {list(t.shape)}")
    check_like(name, t, x)


def _fake_fwd(x, weight, bias, residual, activation, slope, save):
    shape = (*x.shape[:-1], weight.shape[0])
    known = shape if save and reference.saves_known(activation, residual) else (0,)
    return x.new_empty(shape), x.new_empty(known)


def _fake_bwd(dy, y, known, needs, x, weight, *rest):
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return tuple(x.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs))


def _reads_y(x, weight, bias, residual, activation, *rest) -> bool:
    return activation != "none" and not reference.saves_known(activation, residual)


def _backward(op, args, outputs, grads, needs, backend):
    y, known = outputs
    dy, wanted = grads[0], [int(need) for need in needs[:3]]
    found = op.bwd(dy, dy if y is None else y, known, wanted, *args, backend)
    return *(g if need else None for g, need in zip(found, wanted)), dy if needs[3] else None, None, None, None


def _few_are_ours(rows: int, weight: Tensor) -> bool:
    """Whether csrc/cpu/linear_few_kernel.h, which reads the weights at the speed of memory, was measured ahead: on Zen 4."""
    outputs, inputs = weight.shape
    if rows > 16 or inputs < 256 or outputs < 64 or not _cpu.mkl_on_amd() or _cpu.slow_products():
        return False
    across, along = weight.stride(0) == 1, weight.stride(1) == 1
    if weight.dtype is torch.bfloat16:
        return (across or along) and weight.numel() >= 1 << 16 and _cpu.dot_products()
    return weight.dtype is torch.float32 and (across or along) and weight.numel() >= 1 << (18 if along else 20)


def prefer(x, weight, *rest) -> tuple[str, ...]:
    """By the tables "Linear layers" in docs/decisions.md: ours where PyTorch's product goes to MKL on an AMD processor, from so
    many multiplications on. Fewer than 16 outputs fill a quarter of a tile, and PyTorch's is faster."""
    outputs, inputs = weight.shape
    rows, save = x.numel() // max(inputs, 1), rest[-1]
    work = rows * weight.numel()
    few = not save and 4 <= rows <= 96
    if not save and _few_are_ours(rows, weight):
        ours = True
    elif outputs < 16 or x.dtype not in (torch.float32, torch.float64):
        ours = False
    elif _cpu.slow_products():
        ours = (few or rows >= 16) and work >= (1 << 20 if few else 1 << 23)
    elif few:
        ours = x.dtype is torch.float32 and outputs >= 128 and weight.numel() >= 1 << 18 and _cpu.mkl_on_amd()
    else:
        columns = (outputs, inputs) if save else (outputs,)  # of the products: in strips of 64
        ours = (
            x.dtype is torch.float32
            and work >= 1 << 25
            and all(n % 64 == 0 or n >= 512 for n in columns)
            and _cpu.mkl_on_amd()
        )
    return ("cpu", "torch") if ours else ("torch", "cpu")


_ARGS = "Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation, float slope, bool save"
OP = Op(
    "linear",
    f"({_ARGS}) -> (Tensor y, Tensor known)",
    f"(Tensor dy, Tensor y, Tensor known, int[] needs, {_ARGS}) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    fake_fwd=_fake_fwd,
    fake_bwd=_fake_bwd,
    prefer=prefer,
    backward=_backward,
    differentiable=lambda *args: torch_op.call(*args)[0],
    results=1,
    reads_results=_reads_y,
)
_PLANS = Plans(OP)
linear.op, linear.prepare = OP, prepare
