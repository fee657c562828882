"""WaveNet's layer as its formula reads (van den Oord et al., 2016), tap by tap, and its gradient written out.

z = sum over taps of weight[tap] x[t - shift(tap)] + bias        shift(tap) = dilation * (K - 1 - tap)
t = tanh(first half of z)    s = sigmoid(second half of z)    a = t s
out = x + W_out a + b_out                skip_out = skip + W_skip a + b_skip

d_a = W_out^T d_out + W_skip^T d_skip    d_z = [d_a s (1 - t^2), d_a t s (1 - s)]
d_x[t] = d_out[t] + sum over taps of weight[tap]^T d_z[t + shift(tap)]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bigmodel_kernels.ops.attention.reference import arithmetic_dtype


def _delayed(x: Tensor, steps: int) -> Tensor:
    """x[t - steps], zeros before the first step; a negative delay looks ahead, zeros after the last step."""
    length = x.shape[-1]
    if steps >= 0:
        return F.pad(x, (steps, 0))[..., :length]
    return F.pad(x, (0, -steps))[..., -steps:]


def _taps(weight: Tensor, dilation: int) -> list[tuple[int, Tensor]]:
    """(how far it looks back, [2 D, C]) of every tap."""
    taps = weight.unbind(-1)
    return [(dilation * (len(taps) - 1 - k), w) for k, w in enumerate(taps)]


def _mix(weight: Tensor, a: Tensor, bias: Tensor | None, added: Tensor | None) -> Tensor:
    y = weight.squeeze(-1) @ a
    y = y if bias is None else y + bias[:, None]
    return y if added is None else y + added


def _gate(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> tuple[Tensor, Tensor]:
    z = sum(w @ _delayed(x, shift) for shift, w in _taps(weight, dilation))
    z = z if bias is None else z + bias[:, None]
    first, second = z.chunk(2, 1)
    return first.tanh(), second.sigmoid()


def fwd(
    x: Tensor,  # [N, C, T]
    weight: Tensor,  # [2 D, C, K]
    bias: Tensor | None,  # [2 D]
    out_weight: Tensor | None,  # [C, D, 1]
    out_bias: Tensor | None,  # [C]
    skip_weight: Tensor | None,  # [S, D, 1]
    skip_bias: Tensor | None,  # [S]
    skip: Tensor | None,  # [N, S, T]
    dilation: int,
) -> tuple[Tensor, Tensor]:
    """(out, skip_out), each empty where its weight is left out."""
    dtype, wide = x.dtype, arithmetic_dtype(x)
    x, weight, bias, out_weight, out_bias, skip_weight, skip_bias, skip = (
        None if p is None else p.to(wide) for p in (x, weight, bias, out_weight, out_bias, skip_weight, skip_bias, skip)
    )
    t, s = _gate(x, weight, bias, dilation)
    out = x.new_empty(0) if out_weight is None else _mix(out_weight, t * s, out_bias, x)
    total = x.new_empty(0) if skip_weight is None else _mix(skip_weight, t * s, skip_bias, skip)
    return out.to(dtype), total.to(dtype)


def bwd(
    d_out: Tensor | None,  # [N, C, T]
    d_skip: Tensor | None,  # [N, S, T]
    need_x: bool,
    need_weights: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    skip_weight: Tensor | None,
    skip_bias: Tensor | None,
    skip: Tensor | None,
    dilation: int,
) -> tuple[Tensor, ...]:
    """Gradients of x, weight, bias, out_weight, out_bias, skip_weight, skip_bias; empty where not wanted or left out."""
    dtype, wide = x.dtype, arithmetic_dtype(x)
    d_out, d_skip, x, weight, bias = (None if p is None else p.to(wide) for p in (d_out, d_skip, x, weight, bias))
    t, s = _gate(x, weight, bias, dilation)
    d_a = torch.zeros_like(t)
    mixed = []
    for d, w, b in ((d_out, out_weight, out_bias), (d_skip, skip_weight, skip_bias)):
        if d is None:
            mixed += [None if p is None else torch.zeros_like(p) for p in (w, b)]
            continue
        d_a = d_a + w.to(wide).squeeze(-1).mT @ d
        mixed += [(d @ (t * s).mT).sum(0).unsqueeze(-1), None if b is None else d.sum((0, 2))]
    d_z = torch.cat([d_a * s * (1 - t * t), d_a * t * s * (1 - s)], 1)
    d_x = x.new_empty(0)
    if need_x:
        d_x = sum(w.mT @ _delayed(d_z, -shift) for shift, w in _taps(weight, dilation))
        d_x = d_x if d_out is None else d_x + d_out
    d_weight = torch.stack([(d_z @ _delayed(x, shift).mT).sum(0) for shift, _ in _taps(weight, dilation)], -1)
    weights = [d_weight, None if bias is None else d_z.sum((0, 2)), *mixed]
    return d_x.to(dtype), *(x.new_empty(0) if g is None or not need_weights else g.to(dtype) for g in weights)
