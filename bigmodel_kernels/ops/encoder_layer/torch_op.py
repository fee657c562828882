"""The layer by PyTorch's ops, differentiable by its own autograd."""

from __future__ import annotations

import torch.nn.functional as F

from bigmodel_kernels.ops.attention import torch_op as attention
from bigmodel_kernels.ops.conv.reference import activate
from bigmodel_kernels.ops.encoder_layer import reference


def supports(*args) -> str | None:
    return None


def call(
    x, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, linear1_weight, linear1_bias, linear2_weight, linear2_bias,
    norm1_weight, norm1_bias, norm2_weight, norm2_bias, attn_mask, is_causal, num_heads, activation, norm_first, eps,
):  # fmt: skip
    width = x.shape[-1:]

    def attended(t):
        q, k, v = reference.heads_of(F.linear(t, in_proj_weight, in_proj_bias), num_heads)
        limits = (-1, 0 if is_causal else -1, False)
        out, _ = attention.call(
            q, k, v, attn_mask, None, None, q.shape[-1] ** -0.5, 0.0, 0.0, *limits, False, False, False
        )
        return F.linear(out.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)

    def fed(t):
        return F.linear(
            activate(F.linear(t, linear1_weight, linear1_bias), activation, 0.0), linear2_weight, linear2_bias
        )

    return reference.layer(
        x,
        lambda t: F.layer_norm(t, width, norm1_weight, norm1_bias, eps),
        lambda t: F.layer_norm(t, width, norm2_weight, norm2_bias, eps),
        attended,
        fed,
        norm_first,
    )


def fwd(*args):
    return call(*args).contiguous()
