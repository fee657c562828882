"""One LSTM step as its formula reads, and its gradient: a sequence of length one to the reference of `lstm`."""

from __future__ import annotations

from torch import Tensor

from bigmodel_kernels.ops.lstm import reference as lstm


def _weights(w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> list[Tensor]:
    return [w for w in (w_ih, w_hh, b_ih, b_hh) if w is not None]


def forward(
    x: Tensor,  # [B, I]
    h: Tensor,  # [B, H]
    c: Tensor,  # [B, H]
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h and c after the step; gates [1, B, 4 H] and cells [1, B, H] for the backward."""
    weights = _weights(w_ih, w_hh, b_ih, b_hh)
    _, h_n, c_n, gates, cells, _ = lstm.forward(x[None], h[None], c[None], weights, None, None, 1, False)
    return h_n[0], c_n[0], gates, cells


def backward(d_h_new, d_c_new, h_new, gates, cells, x, h, c, w_ih, w_hh, b_ih, b_hh):
    """Gradients of x, h, c and of the list of those weights that are given."""
    no_hidden = x.new_empty(0, len(x), h.shape[1])
    d_x, d_h, d_c, d_weights = lstm.backward(
        d_h_new[None], h.new_zeros(h.shape)[None], d_c_new[None], h_new[None], gates, cells, no_hidden,
        x[None], h[None], c[None], _weights(w_ih, w_hh, b_ih, b_hh), None, None, 1, False,
    )  # fmt: skip
    return d_x[0], d_h[0], d_c[0], d_weights
