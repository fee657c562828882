"""The layer by the Triton kernels of its parts, one after the other."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bigmodel_kernels.ops.attention.op import attention
from bigmodel_kernels.ops.encoder_layer import reference
from bigmodel_kernels.ops.linear.op import linear
from bigmodel_kernels.ops.norm.op import layer_norm


def supports(*args) -> str | None:
    return None  # what a part cannot take, that part refuses


def layer(
    x, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, linear1_weight, linear1_bias, linear2_weight, linear2_bias,
    norm1_weight, norm1_bias, norm2_weight, norm2_bias, activation, norm_first, eps, *, attend: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """With `attend`, what the heads give for the values of in_proj."""

    def product(t, weight, bias, activation=None):
        return linear(t, weight, bias, activation=activation, backend="triton")

    def fed(t):
        if activation == "gelu_tanh":
            inner = reference.ACTIVATIONS[activation](product(t, linear1_weight, linear1_bias))
        else:
            inner = product(t, linear1_weight, linear1_bias, activation)
        return product(inner, linear2_weight, linear2_bias)

    return reference.layer(
        x,
        lambda t: layer_norm(t, norm1_weight, norm1_bias, eps=eps, backend="triton"),
        lambda t: layer_norm(t, norm2_weight, norm2_bias, eps=eps, backend="triton"),
        lambda t: product(attend(product(t, in_proj_weight, in_proj_bias)), out_proj_weight, out_proj_bias),
        fed,
        norm_first,
    )


def fwd(x, *rest):
    *weights, attn_mask, is_causal, num_heads, activation, norm_first, eps = rest

    def attend(packed):
        q, k, v = reference.heads_of(packed, num_heads)
        out = attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal, backend="triton")
        return out.transpose(1, 2).flatten(2)

    return layer(x, *weights, activation, norm_first, eps, attend=attend)
