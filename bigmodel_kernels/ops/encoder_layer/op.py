"""bmk.encoder_layer: a whole layer of a Transformer's encoder in one call."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from bigmodel_kernels import _cpu, _registry
from bigmodel_kernels._arguments import flag, integer, number
from bigmodel_kernels._library import ForwardOp, are_plain_eager, autocast_enabled, in_forward_mode, needs_grad
from bigmodel_kernels.ops.attention.op import check_mask
from bigmodel_kernels.ops.encoder_layer import cpu, reference, torch_op

ACTIVATIONS = tuple(reference.ACTIVATIONS)
PARAMETERS = (
    "in_proj_weight", "in_proj_bias", "out_proj_weight", "out_proj_bias", "linear1_weight", "linear1_bias", "linear2_weight",
    "linear2_bias", "norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias",
)  # fmt: skip


def encoder_layer(
    x: Tensor,  # [N, S, E]
    in_proj_weight: Tensor,  # [3 E, E]: of queries, keys and values
    in_proj_bias: Tensor | None,  # [3 E]
    out_proj_weight: Tensor,  # [E, E]
    out_proj_bias: Tensor | None,  # [E]
    linear1_weight: Tensor,  # [F, E]
    linear1_bias: Tensor | None,  # [F]
    linear2_weight: Tensor,  # [E, F]
    linear2_bias: Tensor | None,  # [E]
    norm1_weight: Tensor | None = None,  # [E]
    norm1_bias: Tensor | None = None,  # [E]
    norm2_weight: Tensor | None = None,  # [E]
    norm2_bias: Tensor | None = None,  # [E]
    *,
    num_heads: int,
    attn_mask: Tensor | None = None,  # broadcasts to [N, H, S, S]
    is_causal: bool = False,
    activation: str = "relu",
    norm_first: bool = False,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:  # [N, S, E]
    """What torch.nn.TransformerEncoderLayer computes in inference (Vaswani et al. 2017), in one call.

    With attended(t) = out_proj(attention of the heads of in_proj(t)) and fed(t) = linear2(activation(linear1(t))):
    y = norm2(h + fed(h)), h = norm1(x + attended(x)); with norm_first y = h + fed(norm2(h)), h = x + attended(norm1(x)).

    Args:
        x and the weights: of one dtype, of any strides. A bias that is None is 0, a norm's weight 1.
        num_heads: H, which divides E.
        attn_mask: bool, where True attends, or floating, added to the scores. A query that may attend to nothing attends with 0.
        is_causal: a query attends to no later key.
        activation: "relu", "gelu" (exact), "gelu_tanh" (its formula with tanh, as GPT-2 has it) or "silu".
        eps: added to the variances.
        backend: "auto", "cpu", "triton" (its kernels one after the other) or "torch". Where a gradient is recorded, PyTorch's ops
            run it.

    Returns:
        [N, S, E], contiguous.

    Raises:
        RuntimeError: sizes, devices or dtypes that do not go together, or the backend asked for cannot take the call.
        TypeError: an argument of the wrong type.
        ValueError: num_heads, activation, eps or backend out of range.
    """
    tensors = (
        x, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, linear1_weight, linear1_bias, linear2_weight,
        linear2_bias, norm1_weight, norm1_bias, norm2_weight, norm2_bias, attn_mask,
    )  # fmt: skip
    plain = are_plain(num_heads, activation, norm_first, eps) and type(is_causal) is bool
    if plain and _goes_to_the_kernel(tensors, backend):
        # The kernel checks all else: to check it here too takes as long as a short sequence.
        with contextlib.suppress(RuntimeError, TypeError):
            return cpu.native()(*tensors, is_causal, num_heads, activation, norm_first, eps)
    args = prepare(
        *tensors[:-1], num_heads=num_heads, attn_mask=attn_mask, is_causal=is_causal, activation=activation,
        norm_first=norm_first, eps=eps,
    )  # fmt: skip
    if needs_grad(*tensors) or in_forward_mode() or torch._C._are_functorch_transforms_active():
        if _registry.wanted(backend) not in ("auto", "torch"):
            raise RuntimeError(f"encoder_layer: backend {backend!r} has no gradient; call it under torch.no_grad()")
        return torch_op.call(*args)
    if autocast_enabled(x.device.type):  # which casts within the layer
        return torch_op.fwd(*args)
    return OP(*args, backend=backend)


def are_plain(num_heads: int, activation: str, norm_first: bool, eps: float) -> bool:
    """Whether these options need no word before the kernel's own checks."""
    kinds = type(num_heads) is int and type(activation) is str and type(norm_first) is bool and type(eps) is float
    return kinds and activation in reference.ACTIVATIONS and eps >= 0


def _goes_to_the_kernel(tensors: tuple, backend: str) -> bool:
    """Whether this is an eager call without gradients that gets the backend "cpu"."""
    if torch.is_grad_enabled() or torch._C._is_any_autocast_enabled() or in_forward_mode():
        return False
    if not are_plain_eager(tensors) or _registry.wanted(backend) not in ("auto", "cpu"):
        return False
    x, linear1_weight = tensors[0], tensors[5]
    if x is None or not x.is_cpu or x.dtype not in _cpu.DTYPES or x.dim() != 3 or not x.is_contiguous():
        return False
    if linear1_weight is None or linear1_weight.dim() != 2:
        return False
    return _registry.select(OP.name, backend, prefer, tensors) == "cpu"


def prepare(
    x: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor | None,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    linear1_weight: Tensor,
    linear1_bias: Tensor | None,
    linear2_weight: Tensor,
    linear2_bias: Tensor | None,
    norm1_weight: Tensor | None = None,
    norm1_bias: Tensor | None = None,
    norm2_weight: Tensor | None = None,
    norm2_bias: Tensor | None = None,
    *,
    num_heads: int,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    activation: str = "relu",
    norm_first: bool = False,
    eps: float = 1e-5,
) -> tuple:
    """Validates a call of `encoder_layer`; returns the arguments of the op."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dim() != 3 or x.shape[2] == 0:
        raise RuntimeError(f"x must have shape [N, S, E] with E > 0, got {list(x.shape)}")
    (batch, length, width), num_heads = x.shape, integer("num_heads", num_heads)
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads must divide the last dimension of x, {width}, got {num_heads}")
    weights = (
        in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, linear1_weight, linear1_bias, linear2_weight, linear2_bias,
        norm1_weight, norm1_bias, norm2_weight, norm2_bias,
    )  # fmt: skip
    activation, norm_first, eps = check_layer(x, weights, 3 * width, width, activation, norm_first, eps)
    if attn_mask is not None:
        attn_mask = check_mask(attn_mask, x, (batch, num_heads, length, length))
    return x, *weights, attn_mask, flag("is_causal", is_causal), num_heads, activation, norm_first, eps


def check_layer(
    x: Tensor,  # [.., E]
    weights: Sequence[Tensor | None],
    packed: int,
    inner: int,
    activation: str,
    norm_first: bool,
    eps: float,
) -> tuple[str, bool, float]:
    """Checks the parameters of a layer, from in_proj_weight to norm2_bias, whose in_proj gives `packed` values and whose heads
    give `inner`; returns the options."""
    if not x.is_floating_point():
        raise RuntimeError(f"x must have a floating dtype, got {x.dtype}")
    linear1_weight, width = weights[4], x.shape[-1]
    if not isinstance(linear1_weight, Tensor):
        raise TypeError(f"linear1_weight must be a tensor, got {type(linear1_weight).__name__}")
    if linear1_weight.dim() != 2:
        raise RuntimeError(f"linear1_weight must have 2 dimensions, got shape {list(linear1_weight.shape)}")
    hidden = linear1_weight.shape[0]
    sizes = (packed, width), (width, inner), (hidden, width), (width, hidden)
    shapes = [shape for matrix in sizes for shape in (matrix, matrix[:1])] + [(width,)] * 4
    for name, t, shape in zip(PARAMETERS, weights, shapes):
        if t is None and len(shape) == 1:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if t.shape != shape:
            raise RuntimeError(f"{name} must have shape {list(shape)}, got {list(t.shape)}")
        if t.dtype != x.dtype or t.device != x.device:
            raise RuntimeError(f"{name} must be {x.dtype} on {x.device} as x is, got {t.dtype} on {t.device}")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    eps = number("eps", eps)
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    return activation, flag("norm_first", norm_first), eps


def is_faster(x: Tensor, hidden: int) -> bool:
    """Whether the CPU's kernels are, with that many values between the two linear layers, by the table "Transformer layers" in
    docs/decisions.md: in bfloat16 their products have no instructions of their own."""
    if not _cpu.mkl_on_amd():
        return False
    batch, length, width = x.shape
    products = batch * length * width * (4 * width + 2 * hidden)
    return x.dtype is not torch.bfloat16 or width <= 64 or products <= 1 << 25


def prefer(x, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, linear1_weight, *rest) -> tuple[str, ...]:
    return ("cpu", "torch") if is_faster(x, linear1_weight.shape[0]) else ("torch", "cpu")


OP = ForwardOp(
    "encoder_layer",
    "(Tensor x, Tensor in_proj_weight, Tensor? in_proj_bias, Tensor out_proj_weight, Tensor? out_proj_bias, "
    "Tensor linear1_weight, Tensor? linear1_bias, Tensor linear2_weight, Tensor? linear2_bias, Tensor? norm1_weight, "
    "Tensor? norm1_bias, Tensor? norm2_weight, Tensor? norm2_bias, Tensor? attn_mask, bool is_causal, int num_heads, "
    "str activation, bool norm_first, float eps) -> Tensor",
    fake=lambda x, *rest: x.new_empty(x.shape),
    prefer=prefer,
)
encoder_layer.op, encoder_layer.prepare = OP, prepare
