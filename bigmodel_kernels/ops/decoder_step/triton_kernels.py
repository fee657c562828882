"""The step by the Triton kernels of its parts, one after the other."""

from __future__ import annotations

from bigmodel_kernels.ops.attention_decode.op import attention_decode
from bigmodel_kernels.ops.decoder_step.torch_op import keep
from bigmodel_kernels.ops.encoder_layer.triton_kernels import layer


def supports(*args) -> str | None:
    return None  # what a part cannot take, that part refuses


def fwd(x, k_cache, v_cache, lengths, *rest):
    *weights, num_heads, activation, norm_first, eps = rest

    def attend(packed):
        q = keep(packed, k_cache, v_cache, lengths, num_heads)
        out = attention_decode(q, k_cache, v_cache, lengths + 1, backend="triton")
        return out.transpose(1, 2).flatten(1)

    return layer(x, *weights, activation, norm_first, eps, attend=attend)
