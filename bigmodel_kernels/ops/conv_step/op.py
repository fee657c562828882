"""bmk.conv_step: one time step of a causal convolution that streams, WaveNet's layer included."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from bigmodel_kernels import _registry
from bigmodel_kernels._library import ForwardOp, in_forward_mode, is_plain_eager, needs_grad
from bigmodel_kernels.ops.conv.op import ACTIVATIONS, check_positive, parse_activation
from bigmodel_kernels.ops.conv_step import cpu, torch_op

PLAIN_ACTIVATIONS = (None, *(name for name in ACTIVATIONS if name != "leaky_relu"))  # those without a slope


class ConvState(NamedTuple):
    """What a causal convolution remembers between two steps of N sequences: a ring of its last L = dilation * (K - 1) inputs.

    A step writes into the state it is given and returns it: the state of before is used up. To go on from one state twice,
    `clone` it first.
    """

    ring: Tensor  # [N, L, C]: the input of step t is in slot t mod L
    position: Tensor  # [1] int64: how many steps there have been

    @classmethod
    def start(cls, batch_size: int, channels: int, kernel_size: int, dilation: int, like: Tensor) -> ConvState:
        """Before the first step: zeros of the dtype and device of `like`."""
        ring = torch.zeros(batch_size, dilation * (kernel_size - 1), channels, dtype=like.dtype, device=like.device)
        return cls(ring, torch.zeros(1, dtype=torch.int64, device=like.device))

    def clone(self) -> ConvState:
        return ConvState(self.ring.clone(), self.position.clone())


def conv_step(
    x_t: Tensor,  # [N, C]
    state: ConvState,
    weight: Tensor,  # [rows, C / groups, K]
    bias: Tensor | None = None,  # [rows]
    out_weight: Tensor | None = None,  # [C, D, 1]
    out_bias: Tensor | None = None,  # [C]
    skip_weight: Tensor | None = None,  # [S, D, 1]
    skip_bias: Tensor | None = None,  # [S]
    *,
    skip: Tensor | None = None,  # [N, S]
    dilation: int = 1,
    groups: int = 1,
    activation: str | tuple[str, float] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None, ConvState]:
    """The column of one time step of a causal convolution, in one call: a = activation(convolution + bias), then
    y = a, or with out_weight y = x_t + out_weight a + out_bias, and with skip_weight skip + skip_weight a + skip_bias.

    With activation "tanh_sigmoid" and the weights of `gated_conv` these are the columns that `gated_conv` gives.

    Args:
        state: of the steps before, from `ConvState.start` or the last step; written into and returned. While a gradient is
            recorded, it is left as it was and the state returned is a new one, through which gradients flow back in time.
        weight: as of torch.nn.Conv1d; D is its number of rows, half of it with "tanh_sigmoid".
        activation: as in `bigmodel_kernels.conv`.
        backend: "auto", "cpu", "cuda", "triton" or "torch".

    Returns:
        (y [N, D], or [N, C] with out_weight; the sum [N, S] or None; the next state)

    Raises:
        TypeError, ValueError, RuntimeError: arguments of the wrong type, value, size, dtype or device.
    """

    if (
        activation in PLAIN_ACTIVATIONS
        and type(state) is ConvState
        and _goes_to_the_kernel(x_t, state, weight, backend)
    ):
        # The kernel checks all of its arguments before it writes: to check them here too would take as long as the step.
        with contextlib.suppress(RuntimeError, TypeError):
            y, total = cpu.native()(
                x_t, *state, weight, bias, out_weight, out_bias, skip_weight, skip_bias, skip, dilation, groups,
                activation or "none", 0.0,
            )  # fmt: skip
            return y, None if skip_weight is None else total, state
    args = prepare(
        x_t, state, weight, bias, out_weight, out_bias, skip_weight, skip_bias, skip=skip, dilation=dilation,
        groups=groups, activation=activation,
    )  # fmt: skip
    if needs_grad(*args) or in_forward_mode():
        if backend not in ("auto", "torch"):
            raise RuntimeError(f"conv_step: backend {backend!r} has no gradient; call it under torch.no_grad()")
        y, total, *state = torch_op.call(*args)
        state = ConvState(*state)
    else:
        y, total = OP(*args, backend=backend)
    return y, None if skip_weight is None else total, state


def _goes_to_the_kernel(x_t: Tensor, state: ConvState, weight: Tensor, backend: str) -> bool:
    """Whether this is an eager call without gradients that gets the backend "cpu"."""
    if torch.is_grad_enabled() or not is_plain_eager(range(4), (x_t, *state, weight)) or not x_t.is_cpu:
        return False
    if _registry.wanted(backend) not in ("auto", "cpu") or cpu.supports(x_t, *state) is not None:
        return False
    return _registry.select(OP.name, backend, prefer, (x_t, *state, weight)) == "cpu"


def prepare(
    x_t: Tensor,
    state: ConvState,
    weight: Tensor,
    bias: Tensor | None = None,
    out_weight: Tensor | None = None,
    out_bias: Tensor | None = None,
    skip_weight: Tensor | None = None,
    skip_bias: Tensor | None = None,
    *,
    skip: Tensor | None = None,
    dilation: int = 1,
    groups: int = 1,
    activation: str | tuple[str, float] | None = None,
) -> tuple:
    """Validates a call of `conv_step`; returns the arguments of the op."""
    if not isinstance(x_t, Tensor) or not isinstance(weight, Tensor):
        raise TypeError(f"x_t and weight must be tensors, got {type(x_t).__name__} and {type(weight).__name__}")
    if not isinstance(state, tuple) or len(state) != 2:
        raise TypeError(f"state must be a ConvState, got {type(state).__name__}")
    name, slope = ("none", 0.0) if activation is None else parse_activation(activation)
    ring, position = state
    for argument, t in (
        ("state", ring), ("state", position), ("bias", bias), ("out_weight", out_weight), ("out_bias", out_bias),
        ("skip_weight", skip_weight), ("skip_bias", skip_bias), ("skip", skip),
    ):  # fmt: skip
        if not isinstance(t, Tensor) and (t is not None or argument == "state"):
            raise TypeError(f"{argument} must be a tensor, got {type(t).__name__}")
    check_positive("dilation", dilation)
    check_positive("groups", groups)
    if weight.dim() != 3 or 0 in weight.shape:
        raise RuntimeError(f"weight must have shape [rows, C / groups, K], got {list(weight.shape)}")
    rows, of_group, kernel = weight.shape
    batch, channels = x_t.shape if x_t.dim() == 2 else (0, -1)
    if channels != of_group * groups:
        raise RuntimeError(f"x_t must have shape [N, {of_group * groups}], got {list(x_t.shape)}")
    if ring.shape != (batch, dilation * (kernel - 1), channels) or position.shape != (1,):
        expected = [batch, dilation * (kernel - 1), channels]
        raise RuntimeError(f"state must have a ring of shape {expected}, got {list(ring.shape)}")
    gated = name == "tanh_sigmoid"
    if rows % (2 * groups if gated else groups):
        raise RuntimeError(f"weight must have a multiple of {2 * groups if gated else groups} rows, got {rows}")
    values = rows // 2 if gated else rows
    skips = 0 if skip_weight is None or skip_weight.dim() == 0 else skip_weight.shape[0]
    for argument, t, shape in (
        ("state", ring, ring.shape), ("weight", weight, weight.shape), ("bias", bias, (rows,)),
        ("out_weight", out_weight, (channels, values, 1)), ("out_bias", out_bias, (channels,)),
        ("skip_weight", skip_weight, (skips, values, 1)), ("skip_bias", skip_bias, (skips,)), ("skip", skip, (batch, skips)),
    ):  # fmt: skip
        if t is not None:
            if t.shape != shape:
                raise RuntimeError(f"{argument} must have shape {list(shape)}, got {list(t.shape)}")
            if t.dtype != x_t.dtype or t.device != x_t.device:
                raise RuntimeError(
                    f"{argument} must be {x_t.dtype} on {x_t.device} as x_t is, got {t.dtype} on {t.device}"
                )
    return (
        x_t, ring, position, weight, bias, out_weight, out_bias, skip_weight, skip_bias, skip, dilation, groups, name,
        slope,
    )  # fmt: skip


def _fake(
    x_t, ring, position, weight, bias, out_weight, out_bias, skip_weight, skip_bias, skip, dilation, groups, activation,
    slope,
):  # fmt: skip
    values = weight.shape[0] // 2 if activation == "tanh_sigmoid" else weight.shape[0]
    y = x_t.new_empty(x_t.shape[0], values if out_weight is None else x_t.shape[1])
    return y, x_t.new_empty(0) if skip_weight is None else x_t.new_empty(x_t.shape[0], skip_weight.shape[0])


def prefer(x_t, *rest) -> tuple[str, ...]:
    return ("cpu", "torch")


OP = ForwardOp(
    "conv_step",
    "(Tensor x_t, Tensor(a!) ring, Tensor(b!) position, Tensor weight, Tensor? bias, Tensor? out_weight, Tensor? out_bias, "
    "Tensor? skip_weight, Tensor? skip_bias, Tensor? skip, int dilation, int groups, str activation, float slope) -> "
    "(Tensor y, Tensor skip_out)",
    fake=_fake,
    prefer=prefer,
)
conv_step.op, conv_step.prepare = OP, prepare
