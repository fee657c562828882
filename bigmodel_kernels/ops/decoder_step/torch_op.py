"""The step by PyTorch's ops."""

from __future__ import annotations

import torch
from torch import Tensor

from bigmodel_kernels.ops.attention_decode import torch_op as attention_decode
from bigmodel_kernels.ops.encoder_layer.torch_op import layer


def supports(*args) -> str | None:
    return None


def keep(packed: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, num_heads: int) -> Tensor:
    """Writes the keys and values of [N, (H + 2 Hkv) D] into the caches; returns the queries, [N, H, 1, D]."""
    kv_heads, _, head_dim = k_cache.shape[1:]
    q, k, v = packed.unflatten(-1, (-1, head_dim)).split([num_heads, kv_heads, kv_heads], 1)
    places = torch.arange(packed.shape[0], device=packed.device)
    k_cache[places, :, lengths], v_cache[places, :, lengths] = k, v
    return q[:, :, None]


def fwd(x, k_cache, v_cache, lengths, *rest):
    *weights, num_heads, activation, norm_first, eps = rest

    def attend(packed):
        q = keep(packed, k_cache, v_cache, lengths, num_heads)
        options = (q.shape[-1] ** -0.5, 0.0, -1, -1, False)
        cached = (k_cache, v_cache, None, None, lengths + 1, None, None)
        out, _ = attention_decode.call(q, *cached, *options, backend="torch")
        return out.transpose(1, 2).flatten(1)

    with torch.autocast(x.device.type, enabled=False):  # what goes into the caches has their dtype
        return layer(x, *weights, activation, norm_first, eps, attend=attend).contiguous()
