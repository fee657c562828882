"""The steps of an LSTM with layer norm as their formula reads, and their gradient, with N(x) = (x - mean) / sqrt(var + eps):

z = W h'     [i f g o] = a_t + gain N(z)     c = sigmoid(f) c' + sigmoid(i) tanh(g)     h = sigmoid(o) tanh(gain_c N(c) + bias_c)
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    a: Tensor,  # [T, B, 4 H]
    h0: Tensor,  # [B, H]
    c0: Tensor,  # [B, H]
    w: Tensor,  # [4 H, H]
    gain: Tensor,  # [4 H]
    gain_c: Tensor,  # [H]
    bias_c: Tensor,  # [H]
    eps: float,
    eps_c: float,
) -> tuple[Tensor, ...]:
    """output [T, B, H], h_n, c_n [B, H]; z, gates [T, B, 4 H] and cells [T, B, H] for the backward."""
    h, c = h0, c0
    kept: list[tuple[Tensor, ...]] = []
    for a_t in a:
        z = h @ w.t()
        i, f, g, o = (a_t + torch.layer_norm(z, gain.shape, gain, None, eps)).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * c + i * g
        h = o * torch.layer_norm(c, gain_c.shape, gain_c, bias_c, eps_c).tanh()
        kept.append((h, z, torch.cat([i, f, g, o], -1), c))
    output, z, gates, cells = (torch.stack(t) for t in zip(*kept))
    return output, h, c, z, gates, cells


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rstd = (x.var(-1, correction=0, keepdim=True) + eps).rsqrt()
    return (x - x.mean(-1, keepdim=True)) * rstd, rstd


def _norm_gradient(d: Tensor, normed: Tensor, rstd: Tensor) -> Tensor:
    return rstd * (d - d.mean(-1, keepdim=True) - normed * (d * normed).mean(-1, keepdim=True))


def backward(d_output, d_h_n, d_c_n, output, z, gates, cells, a, h0, c0, w, gain, gain_c, bias_c, eps, eps_c):
    """Gradients of a, h0, c0, w, gain, gain_c, bias_c."""
    d_a = torch.empty_like(a)
    d_w, d_gain, d_gain_c, d_bias_c = (torch.zeros_like(t) for t in (w, gain, gain_c, bias_c))
    d_h, d_c = d_h_n, d_c_n
    for t in reversed(range(len(a))):
        (i, f, g, o), c = gates[t].chunk(4, -1), cells[t]
        d_h = d_h + d_output[t]
        normed, rstd = _normed(c, eps_c)
        tanh_u = (normed * gain_c + bias_c).tanh()
        d_u = d_h * o * (1 - tanh_u.square())
        d_gain_c += (d_u * normed).sum(0)
        d_bias_c += d_u.sum(0)
        d_c = d_c + _norm_gradient(d_u * gain_c, normed, rstd)
        d_f = d_c * (cells[t - 1] if t else c0)
        d_gates = torch.cat([d_c * g, d_f, d_c * i, d_h * tanh_u], -1)
        slopes = torch.cat([i * (1 - i), f * (1 - f), 1 - g.square(), o * (1 - o)], -1)
        d_a[t] = d_gates * slopes
        d_c = d_c * f
        normed, rstd = _normed(z[t], eps)
        d_gain += (d_a[t] * normed).sum(0)
        d_z = _norm_gradient(d_a[t] * gain, normed, rstd)
        d_w += d_z.t() @ (output[t - 1] if t else h0)
        d_h = d_z @ w
    return d_a, d_h, d_c, d_w, d_gain, d_gain_c, d_bias_c
