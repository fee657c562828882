"""The layer by PyTorch's ops, differentiable by its own autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from bigmodel_kernels.ops.attention import torch_op as attention
from bigmodel_kernels.ops.encoder_layer import reference


def supports(*args) -> str | None:
    return None


def layer(
    x, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, linear1_weight, linear1_bias, linear2_weight, linear2_bias,
    norm1_weight, norm1_bias, norm2_weight, norm2_bias, activation, norm_first, eps, *, attend: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """With `attend`, what the heads give for the values of in_proj."""
    width = x.shape[-1:]

    def fed(t):
        inner = reference.ACTIVATIONS[activation](F.linear(t, linear1_weight, linear1_bias))
        return F.linear(inner, linear2_weight, linear2_bias)

    return reference.layer(
        x,
        lambda t: F.layer_norm(t, width, norm1_weight, norm1_bias, eps),
        lambda t: F.layer_norm(t, width, norm2_weight, norm2_bias, eps),
        lambda t: F.linear(attend(F.linear(t, in_proj_weight, in_proj_bias)), out_proj_weight, out_proj_bias),
        fed,
        norm_first,
    )


def call(x, *rest):
    *weights, attn_mask, is_causal, num_heads, activation, norm_first, eps = rest

    def attend(packed):
        q, k, v = reference.heads_of(packed, num_heads)
        limits = (-1, 0 if is_causal else -1, False)
        out, _ = attention.call(
            q, k, v, attn_mask, None, None, q.shape[-1] ** -0.5, 0.0, 0.0, *limits, False, False, False
        )
        return out.transpose(1, 2).flatten(2)

    return layer(x, *weights, activation, norm_first, eps, attend=attend)


def fwd(*args):
    return call(*args).contiguous()
