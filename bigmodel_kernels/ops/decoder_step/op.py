"""bmk.decoder_step: one token more through a whole layer of a Transformer's decoder, in one call."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from bigmodel_kernels import _cpu, _registry
from bigmodel_kernels._arguments import integer
from bigmodel_kernels._library import ForwardOp, are_plain_eager, in_forward_mode, needs_grad
from bigmodel_kernels.ops.decoder_step import cpu
from bigmodel_kernels.ops.encoder_layer.op import are_plain, check_layer

_FEW_ROWS = 16  # which the linear layers' kernel reads the weights once for


def decoder_step(
    x: Tensor,  # [N, E]
    k_cache: Tensor,  # [N, Hkv, capacity, D]
    v_cache: Tensor,  # [N, Hkv, capacity, D]
    lengths: Tensor,  # [N] int64
    in_proj_weight: Tensor,  # [(H + 2 Hkv) D, E]: of queries, keys and values
    in_proj_bias: Tensor | None,  # [(H + 2 Hkv) D]
    out_proj_weight: Tensor,  # [E, H D]
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
    activation: str = "gelu_tanh",
    norm_first: bool = True,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:  # [N, E]
    """The last column of a causal `encoder_layer`, from the keys and values of the columns before it: a step of generating text.

    The token's own key and value are written into the caches at `lengths`, which stay as they are: all layers share them.

    Args:
        x and the weights: of one dtype, in which it is computed, autocast or not; of any strides, such as GPT-2's [in, out],
            transposed. A bias that is None is 0, a norm's weight 1.
        k_cache, v_cache: of the dtype of x; written into.
        lengths: how many positions of its sequence the caches hold, less than their capacity.
        num_heads: H, a multiple of Hkv.
        activation, norm_first, eps: as of `encoder_layer`; the defaults are GPT-2's.
        backend: "auto", "cpu", "triton" (its kernels one after the other) or "torch".

    Raises:
        RuntimeError: sizes, devices or dtypes that do not go together, a gradient is recorded, a cache is full, or the backend
            asked for cannot take the call. Nothing is written then.
        TypeError: an argument of the wrong type.
        ValueError: num_heads, activation, eps or backend out of range.
    """
    tensors = (
        x, k_cache, v_cache, lengths, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, linear1_weight, linear1_bias,
        linear2_weight, linear2_bias, norm1_weight, norm1_bias, norm2_weight, norm2_bias,
    )  # fmt: skip
    if are_plain(num_heads, activation, norm_first, eps) and _goes_to_the_kernel(tensors, num_heads, backend):
        # The kernel checks all else before it writes: to check it here too takes as long as a short step.
        with contextlib.suppress(RuntimeError, TypeError):
            return cpu.native()(*tensors, num_heads, activation, norm_first, eps)
    args = prepare(*tensors, num_heads=num_heads, activation=activation, norm_first=norm_first, eps=eps)
    if needs_grad(*tensors) or in_forward_mode():
        raise RuntimeError("decoder_step writes into its caches and has no derivative: call it under torch.no_grad()")
    readable = lengths.is_cpu and type(lengths) is Tensor and not torch.compiler.is_compiling()
    if readable and not bool(((lengths >= 0) & (lengths < k_cache.shape[2])).all()):
        raise RuntimeError(f"lengths must leave a place of the {k_cache.shape[2]} of k_cache, got {lengths.tolist()}")
    return OP(*args, backend=backend)


def _goes_to_the_kernel(tensors: tuple, num_heads: int, backend: str) -> bool:
    """Whether this is an eager call without gradients that gets the backend "cpu"."""
    if torch.is_grad_enabled() or in_forward_mode() or not are_plain_eager(tensors):
        return False
    x, k_cache, v_cache = tensors[:3]
    if x is None or k_cache is None or v_cache is None or k_cache.dim() != 4 or v_cache.dim() != 4:
        return False
    if _registry.wanted(backend) not in ("auto", "cpu") or cpu.supports(*tensors, num_heads) is not None:
        return False
    return _registry.select(OP.name, backend, prefer, (*tensors, num_heads)) == "cpu"


def prepare(
    x: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
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
    activation: str = "gelu_tanh",
    norm_first: bool = True,
    eps: float = 1e-5,
) -> tuple:
    """Validates a call of `decoder_step`; returns the arguments of the op."""
    for name, t in (("x", x), ("k_cache", k_cache), ("v_cache", v_cache), ("lengths", lengths)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if x.dim() != 2 or x.shape[1] == 0:
        raise RuntimeError(f"x must have shape [N, E] with E > 0, got {list(x.shape)}")
    batch = x.shape[0]
    if k_cache.dim() != 4 or k_cache.shape[0] != batch or 0 in k_cache.shape[1:]:
        raise RuntimeError(f"k_cache must have shape [{batch}, Hkv, capacity, D], got {list(k_cache.shape)}")
    if v_cache.shape != k_cache.shape:
        raise RuntimeError(f"v_cache must have the shape of k_cache, {list(k_cache.shape)}, got {list(v_cache.shape)}")
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache)):
        if t.dtype != x.dtype or t.device != x.device:
            raise RuntimeError(f"{name} must be {x.dtype} on {x.device} as x is, got {t.dtype} on {t.device}")
    if lengths.shape != (batch,) or lengths.dtype != torch.int64 or lengths.device != x.device:
        got = f"{lengths.dtype} {list(lengths.shape)} on {lengths.device}"
        raise RuntimeError(f"lengths must be int64 of shape [{batch}] on {x.device}, got {got}")
    (_, kv_heads, _, depth), num_heads = k_cache.shape, integer("num_heads", num_heads)
    if num_heads < 1 or num_heads % kv_heads:
        raise ValueError(f"num_heads must be a multiple of the {kv_heads} heads of k_cache, got {num_heads}")
    weights = (
        in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, linear1_weight, linear1_bias, linear2_weight, linear2_bias,
        norm1_weight, norm1_bias, norm2_weight, norm2_bias,
    )  # fmt: skip
    packed = (num_heads + 2 * kv_heads) * depth
    options = check_layer(x, weights, packed, num_heads * depth, activation, norm_first, eps)
    return x, k_cache, v_cache, lengths, *weights, num_heads, *options


def prefer(x, *rest) -> tuple[str, ...]:
    """By the table "Transformer layers" in docs/decisions.md. Many rows of bfloat16 are multiplied in float32, ahead where it was
    measured; a few wait for the weights on any processor."""
    ours = x.dtype is not torch.bfloat16 or x.shape[0] <= _FEW_ROWS or _cpu.mkl_on_amd()
    return ("cpu", "torch") if ours else ("torch", "cpu")


OP = ForwardOp(
    "decoder_step",
    "(Tensor x, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor lengths, Tensor in_proj_weight, Tensor? in_proj_bias, "
    "Tensor out_proj_weight, Tensor? out_proj_bias, Tensor linear1_weight, Tensor? linear1_bias, Tensor linear2_weight, "
    "Tensor? linear2_bias, Tensor? norm1_weight, Tensor? norm1_bias, Tensor? norm2_weight, Tensor? norm2_bias, int num_heads, "
    "str activation, bool norm_first, float eps) -> Tensor",
    fake=lambda x, *rest: x.new_empty(x.shape),
    prefer=prefer,
)
decoder_step.op, decoder_step.prepare = OP, prepare
