"""The formula of a Transformer's encoder layer in plain torch ops."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from bigmodel_kernels.ops.attention import reference as attention
from bigmodel_kernels.ops.norm import reference as norm

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


def heads_of(packed, num_heads: int) -> tuple[torch.Tensor, ...]:
    """q, k and v [N, H, S, D] of the product [N, S, 3 E]."""
    return packed.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()


def layer(x, norm1, norm2, attended, fed, norm_first: bool):
    """How the two halves and their norms stand to each other."""
    if norm_first:
        h = x + attended(norm1(x))
        return h + fed(norm2(h))
    h = norm1(x + attended(x))
    return norm2(h + fed(h))


def fwd(
    x, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, linear1_weight, linear1_bias, linear2_weight, linear2_bias,
    norm1_weight, norm1_bias, norm2_weight, norm2_bias, attn_mask, is_causal, num_heads, activation, norm_first, eps,
):  # fmt: skip
    def product(t, weight, bias):
        z = t @ weight.t()
        return z if bias is None else z + bias

    def normal(weight, bias):
        return lambda t: norm.fwd(t, None, weight, bias, eps, True)[0]

    def attended(t):
        q, k, v = heads_of(product(t, in_proj_weight, in_proj_bias), num_heads)
        right = 0 if is_causal else -1
        out, _ = attention.fwd(q, k, v, attn_mask, None, None, q.shape[-1] ** -0.5, 0.0, 0.0, -1, right, False)
        return product(out.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)

    def fed(t):
        inner = ACTIVATIONS[activation](product(t, linear1_weight, linear1_bias))
        return product(inner, linear2_weight, linear2_bias)

    norms = normal(norm1_weight, norm1_bias), normal(norm2_weight, norm2_bias)
    return layer(x, *norms, attended, fed, norm_first)
