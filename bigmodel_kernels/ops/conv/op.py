"""bmk.conv: what it takes, what it gives, which backend runs it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels._arguments import flag, integer, number
from bigmodel_kernels._library import Op, autocast, needs_grad
from bigmodel_kernels._plans import Plans
from bigmodel_kernels.ops.conv import reference, torch_op
from bigmodel_kernels.ops.conv.order import order

ACTIVATIONS = ("relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu", "tanh_sigmoid")
POOLS = ("max", "avg")


def conv(
    x: Tensor,  # [N, Cin, L] or [N, Cin, H, W]; any strides; N may be left out
    weight: Tensor,  # [Cout, Cin / groups, K] or [.., KH, KW]; transposed: [Cin, Cout / groups, ..]
    bias: Tensor | None = None,  # [Cout]
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
    scale: Tensor | None = None,  # [Cout]
    shift: Tensor | None = None,  # [Cout]
    residual: Tensor | None = None,  # [N, Cout, ..] as the convolution's own output
    activation: str | tuple[str, float] | None = None,
    pool: tuple | None = None,
    backend: str = "auto",
) -> Tensor:  # [N, Cout, ..], pooled; Cout / 2 channels after "tanh_sigmoid"
    """pool(activation(scale * (convolution + bias) + shift + residual)), in one pass where a kernel has it.

    Args:
        x: input; its rank with that of `weight` says whether there are one or two spatial axes.
        stride, padding, dilation, groups, output_padding: as in torch.nn.functional.conv2d and conv_transpose2d. `padding` may
            be "valid", "same" (stride 1), or, for one axis, "causal": dilation * (K - 1) zeros before the first element only.
        transposed: the transposed convolution.
        scale, shift: a folded normalisation, per output channel.
        residual: added before the activation.
        activation: None, "relu", "gelu" (exact), "silu", "tanh", "sigmoid", "leaky_relu" (slope 0.01), ("leaky_relu", slope), or
            "tanh_sigmoid", the gate of WaveNet: tanh(first half of the channels) * sigmoid(second half).
        pool: None, ("max" | "avg", size), (.., size, stride) or ("max", size, stride, padding); the stride is the size and the
            padding 0 by default.
        backend: "auto", "cpu", "cuda", "torch" or "triton".

    Returns:
        The result, in the memory format that PyTorch's own convolution would give it.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: unknown activation, pool, padding or backend.
        RuntimeError: sizes, dtypes or devices that do not go together, or the backend asked for cannot take the call.
    """
    tensors = (x, weight, bias, scale, shift, residual)
    options = (stride, padding, dilation, groups, transposed, output_padding, activation, pool)
    key, plan = _PLANS.look_up(backend, tensors, options)
    if plan is not None:
        return plan(*tensors)
    args = prepare(
        x, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups, transposed=transposed,
        output_padding=output_padding, scale=scale, shift=shift, residual=residual, activation=activation, pool=pool,
    )  # fmt: skip
    out = OP(*args, backend=backend)[0]
    if key is not None and x.dim() == weight.dim():
        _PLANS.remember(key, args, save=args[-1])
    return out if x.dim() == weight.dim() else out.squeeze(0)


def prepare(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | tuple[str, float] | None = None,
    pool: tuple | None = None,
) -> tuple:
    """Validates a call of `conv`; returns the arguments of the op."""
    for name, t in (("x", x), ("weight", weight)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    save = needs_grad(x, weight, bias, scale, shift, residual)
    unbatched = x.dim() == weight.dim() - 1
    if unbatched:
        x = x.unsqueeze(0)
    x, weight, bias, scale, shift, residual = autocast(x, weight, bias, scale, shift, residual)
    transposed = flag("transposed", transposed)
    call = (x.shape, weight.shape, stride, padding, dilation, groups, transposed, output_padding, activation, pool)
    options, channels, full = _looked_up_geometry(*call)
    check_like("weight", weight, x)
    for name, t in (("bias", bias), ("scale", scale), ("shift", shift)):
        if t is not None:
            check_like(name, t, x)
            if t.dim() != 1 or t.shape[0] != channels:
                raise RuntimeError(f"{name} must have shape {[channels]}, got {list(t.shape)}")
    if residual is not None:
        check_like("residual", residual, x)
        if unbatched and residual.dim() == x.dim() - 1:
            residual = residual.unsqueeze(0)
        expected = [x.shape[0], channels, *full]
        if residual.dim() != x.dim() or any(a != b for a, b in zip(residual.shape, expected)):
            raise RuntimeError(f"residual must have shape {expected}, got {list(residual.shape)}")
    return x, weight, bias, scale, shift, residual, *options, save


def check_positive(name: str, value: Any) -> None:
    if integer(name, value) < 1:
        raise ValueError(f"{name} must be positive, got {value}")


def check_like(name: str, t: Any, x: Tensor) -> None:
    """Raises unless t is a tensor of the dtype and on the device of x."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dtype != x.dtype or t.device != x.device:
        raise RuntimeError(f"{name} must be {x.dtype} on {x.device} as x is, got {t.dtype} on {t.device}")


def _geometry(
    x_shape, weight_shape, stride, padding, dilation, groups, transposed, output_padding, activation, pool
) -> tuple[tuple, int, list[int]]:  # fmt: skip
    """The op's arguments after the tensors but the last, the channels and the spatial sizes of the convolution's own output."""
    axes = len(weight_shape) - 2
    if axes not in (1, 2):
        raise RuntimeError(f"weight must have 3 or 4 dimensions, got shape {list(weight_shape)}")
    if len(x_shape) != axes + 2:
        raise RuntimeError(
            f"x must have {axes + 2} dimensions (or {axes + 1}, unbatched) for a weight of {axes + 2}, got shape {list(x_shape)}"
        )
    name, slope = parse_activation(activation)
    strides = _list("stride", stride, axes, 1)
    dilations = _list("dilation", dilation, axes, 1)
    extra = _list("output_padding", output_padding, axes, 0)
    kernel = list(weight_shape[2:])
    pads = _padding(padding, kernel, strides, dilations, transposed)
    channels = _check_channels(x_shape, weight_shape, groups, transposed)
    if transposed:
        for e, s, d in zip(extra, strides, dilations):
            if e >= max(s, d):
                raise RuntimeError(f"output_padding must be smaller than stride or dilation, got {output_padding}")
    elif any(extra):
        raise ValueError(f"output_padding is for transposed=True, got {output_padding}")
    full = output_size(x_shape[2:], kernel, strides, pads, dilations, transposed, extra)
    if any(size <= 0 for size in full):
        raise RuntimeError(
            f"x of size {list(x_shape[2:])} gives an empty output {full} for a kernel of {kernel} with stride={strides}, "
            f"padding={padding}, dilation={dilations}"
        )
    if name == "tanh_sigmoid" and channels % 2:
        raise ValueError(f"activation 'tanh_sigmoid' needs an even number of output channels, got {channels}")
    kind, size, step, rim = _pool(pool, axes)
    if any(n + 2 * p < k for n, k, p in zip(full, size, rim)):
        raise RuntimeError(f"pool must fit the output {full}, got a window of {size}")
    options = (
        tuple(strides), tuple(pads), tuple(dilations), groups, bool(transposed), tuple(extra), name,
        kind, tuple(size), tuple(step), tuple(rim), slope,
    )  # fmt: skip
    return options, channels, full


# A model calls with the same few sizes again and again, and checking them costs as much as a small convolution.
_known_geometry = functools.lru_cache(maxsize=4096, typed=True)(_geometry)


def _looked_up_geometry(*call) -> tuple[tuple, int, list[int]]:
    try:
        return _geometry(*call) if torch.compiler.is_compiling() else _known_geometry(*call)
    except TypeError:  # symbolic sizes and lists have no hash; anything else that is wrong comes again
        return _geometry(*call)


def convolved_shape(x: Tensor, weight: Tensor, stride, padding, dilation, groups) -> list[int]:
    """The shape of the convolution's own output."""
    _, channels, full = _looked_up_geometry(
        x.shape, weight.shape, stride, padding, dilation, groups, False, 0, None, None
    )
    return [x.shape[0], channels, *full]


def parse_activation(activation: Any) -> tuple[str, float]:
    """(name or "none", slope of the leaky ReLU) of what the `activation` of `conv` may be."""
    name, slope = activation, reference.LEAKY_SLOPE
    if isinstance(activation, (tuple, list)) and len(activation) == 2 and activation[0] == "leaky_relu":
        name, slope = activation
        if not isinstance(slope, (int, float)) or not number("activation", slope) >= 0:
            raise ValueError(f"activation 'leaky_relu' needs a slope that is not negative, got {slope!r}")
    if name is not None and name not in ACTIVATIONS:
        raise ValueError(f"activation must be None or one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    return name or "none", float(slope)


def _list(name: str, value: Any, axes: int, least: int) -> list[int]:
    """`value` for every spatial axis."""
    values = [value] if isinstance(value, (int, torch.SymInt)) else value
    if not isinstance(values, (tuple, list, torch.Size)) or not all(isinstance(v, (int, torch.SymInt)) for v in values):
        raise TypeError(f"{name} must be an int or a sequence of ints, got {value!r}")
    values = list(values) * (axes if len(values) == 1 else 1)
    if len(values) != axes:
        raise RuntimeError(f"{name} must have {axes} entries, got {value!r}")
    if any(integer(name, v) < least for v in values):
        raise RuntimeError(f"{name} must be {'positive' if least else 'non-negative'}, got {value!r}")
    return values


def _padding(padding: Any, kernel: list[int], stride: list[int], dilation: list[int], transposed: bool) -> list[int]:
    """(before, after) for every spatial axis, in one list."""
    if not isinstance(padding, str):
        return [p for p in _list("padding", padding, len(kernel), 0) for _ in range(2)]
    if padding not in ("valid", "same", "causal"):
        raise ValueError(f"padding must be an int, a sequence of ints, 'valid', 'same' or 'causal'; got {padding!r}")
    if transposed and padding != "valid":
        raise ValueError(f"padding={padding!r} is not for transposed=True")
    reach = [d * (k - 1) for d, k in zip(dilation, kernel)]
    if padding == "valid":
        return [0, 0] * len(kernel)
    if padding == "causal":
        if len(kernel) != 1:
            raise ValueError("padding='causal' needs one spatial axis, got two")
        return [reach[0], 0]
    if any(s != 1 for s in stride):
        raise RuntimeError(f"padding='same' needs stride 1, got {stride}")
    return [p for r in reach for p in (r // 2, r - r // 2)]


def _check_channels(x_shape: Sequence[int], weight_shape: Sequence[int], groups: Any, transposed: bool) -> int:
    """The number of output channels."""
    if integer("groups", groups) <= 0:
        raise RuntimeError(f"groups must be positive, got {groups}")
    if any(k == 0 for k in weight_shape[2:]):
        raise RuntimeError(f"weight must have a kernel that is not empty, got shape {list(weight_shape)}")
    if weight_shape[0] % groups:
        raise RuntimeError(
            f"weight must have a multiple of groups={groups} in its first dimension, got {weight_shape[0]}"
        )
    expected = weight_shape[0] if transposed else weight_shape[1] * groups
    if x_shape[1] != expected:
        raise RuntimeError(
            f"x must have {expected} channels for a weight of shape {list(weight_shape)} with groups={groups}, "
            f"got {x_shape[1]} (x has shape {list(x_shape)})"
        )
    return weight_shape[1] * groups if transposed else weight_shape[0]


def _pool(pool: Any, axes: int) -> tuple[str, list[int], list[int], list[int]]:
    """Kind, size, stride and padding, the last three per axis."""
    if pool is None:
        return "none", [], [], []
    if not isinstance(pool, (tuple, list)) or len(pool) not in (2, 3, 4):
        raise TypeError(f"pool must be None, (kind, size), (kind, size, stride) or (.., padding), got {pool!r}")
    kind, value, stride, padding = *pool, *(None, 0)[len(pool) - 2 :]
    if kind not in POOLS:
        raise ValueError(f"pool must be one of {', '.join(POOLS)}; got {kind!r}")
    size = _list("pool size", value, axes, 1)
    rim = _list("pool padding", padding, axes, 0)
    if any(2 * p > k for p, k in zip(rim, size)) or (kind == "avg" and any(rim)):
        raise RuntimeError(f"pool padding is for a max-pool, and at most half of its window {size}, got {padding!r}")
    return kind, size, size if stride is None else _list("pool stride", stride, axes, 1), rim


def output_size(sizes, kernel, stride, padding, dilation, transposed, output_padding) -> list[int]:
    """Spatial sizes of the convolution's own output; `padding` holds (before, after) per axis."""
    out = []
    for i, (n, k, s, d, e) in enumerate(zip(sizes, kernel, stride, dilation, output_padding)):
        reach, pads = d * (k - 1), padding[2 * i] + padding[2 * i + 1]
        if transposed:
            out.append((n - 1) * s - pads + reach + e + 1)
        else:
            out.append((n + pads - reach - 1) // s + 1)
    return out


def is_channels_last(t: Tensor) -> bool:
    """Whether torch sees [N, C, H, W] as channels_last: strides that do not decrease in the order C, W, H, N."""
    return are_channels_last(t.shape, t.stride())


def are_channels_last(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    if len(sizes) != 4:
        return False
    (n, c, h, w), (step_n, step_c, step_h, step_w) = sizes, strides
    if not (n and c and h and w and step_n and step_c and step_h and step_w):
        return False
    return step_w >= c * step_c and step_h >= w * step_w and step_n >= h * step_h and step_c != h * step_h


def gives_channels_last(x: Tensor, weight: Tensor) -> bool:
    """PyTorch's rule for the memory format of a convolution's output."""
    return is_channels_last(x) or (is_channels_last(weight) and x.numel() > 0)


def saves_pre(activation: str, pool: str) -> bool:
    """Whether the derivative of the activation needs the values before it: the others are known from the output, unless an
    average pool hides it."""
    return activation != "none" and (activation in ("gelu", "silu", "tanh_sigmoid") or pool == "avg")


def shapes(x, weight, *options) -> tuple[list[int], list[int], list[int]]:
    """Shapes of the convolution's own output, of the result, and of what the activation's derivative may need."""
    return shapes_from(x.shape, weight.shape, *options)


def shapes_from(
    x_shape, weight_shape, stride, padding, dilation, groups, transposed, output_padding, activation, pool, pool_size,
    pool_stride, pool_padding,
):  # fmt: skip
    channels = weight_shape[1] * groups if transposed else weight_shape[0]
    full = output_size(x_shape[2:], weight_shape[2:], stride, padding, dilation, transposed, output_padding)
    pooled = full
    if pool != "none":
        pooled = [
            (n + 2 * p - k) // s + 1 for n, k, s, p in zip(full, pool_size, pool_stride, pool_padding, strict=True)
        ]
    kept = channels // 2 if activation == "tanh_sigmoid" else channels
    pre = pooled if pool == "max" else full
    return [x_shape[0], channels, *full], [x_shape[0], kept, *pooled], [x_shape[0], channels, *pre]


def channels_innermost(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An empty [N, C, ..] whose channels are adjacent in memory."""
    return like.new_empty([shape[0], *shape[2:], shape[1]], dtype=dtype or like.dtype).movedim(-1, 1)


def _fake_fwd(x, weight, bias, scale, shift, residual, *options):
    *geometry, _, save = options
    activation, pool = geometry[6], geometry[7]
    _, out, pre = shapes(x, weight, *geometry)
    return (
        channels_innermost(x, out) if gives_channels_last(x, weight) else x.new_empty(out),
        channels_innermost(x, out, torch.uint8) if save and pool == "max" else x.new_empty(0, dtype=torch.uint8),
        channels_innermost(x, pre) if save and saves_pre(activation, pool) else x.new_empty(0),
    )


def _fake_bwd(grad, out, index, pre, needs, x, weight, bias, scale, shift, residual, *options):
    channels = weight.shape[1] * options[3] if options[4] else weight.shape[0]
    full, _, _ = shapes(x, weight, *options[:-2])
    like_x = channels_innermost(x, x.shape) if is_channels_last(x) else x.new_empty(x.shape)
    return (
        like_x if needs[0] else x.new_empty(0),
        x.new_empty(weight.shape if needs[1] else 0),
        *(x.new_empty(channels if need else 0) for need in needs[2:5]),
        channels_innermost(x, full) if needs[5] else x.new_empty(0),
    )


def _reads_out(*args) -> bool:
    """Whether the backward reads the result: for a derivative known from it, unless the max-pool's index tells it too."""
    activation, pool = args[12], args[13]
    return activation in ("leaky_relu", "tanh", "sigmoid") or (activation == "relu" and pool != "max")


def _backward(op, args, outputs, grads, needs, backend):
    wanted = [int(need) for need in needs[:6]]
    out, index, pre = outputs
    found = op.bwd(grads[0], grads[0] if out is None else out, index, pre, wanted, *args, backend)
    return *(g if need else None for g, need in zip(found, wanted)), *[None] * 13


def prefer(
    x, weight, bias, scale, shift, residual, stride, padding, dilation, groups, transposed, output_padding, activation,
    pool, pool_size, pool_stride, pool_padding, slope, save,
) -> tuple[str, ...]:  # fmt: skip
    """By the tables "Convolution on the CPU" in docs/decisions_conv.md: where the kernels were measured faster, they run."""
    layer = (x.shape, weight.shape, tuple(stride), tuple(dilation), groups, transposed)
    return order(x.dtype, is_channels_last(x), *layer, save, activation != "none")


_ARGS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? residual, int[] stride, int[] padding, "
    "int[] dilation, int groups, bool transposed, int[] output_padding, str activation, str pool, int[] pool_size, "
    "int[] pool_stride, int[] pool_padding, float slope, bool save"
)
OP = Op(
    "conv",
    f"({_ARGS}) -> (Tensor out, Tensor index, Tensor pre)",
    f"(Tensor grad, Tensor out, Tensor index, Tensor pre, int[] needs, {_ARGS}) -> "
    "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dscale, Tensor dshift, Tensor dresidual)",
    fake_fwd=_fake_fwd,
    fake_bwd=_fake_bwd,
    prefer=prefer,
    backward=_backward,
    differentiable=lambda *args: torch_op.call(*args)[0],
    results=1,
    reads_results=_reads_out,
)
_PLANS = Plans(OP)
conv.op, conv.prepare = OP, prepare
