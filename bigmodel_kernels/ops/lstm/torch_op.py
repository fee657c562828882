"""PyTorch's own LSTM: `call` is what a user would have written; `fwd` and `bwd` are for compiled graphs, whose backend is
chosen only when they run. PyTorch has no forward and backward pair for all of these calls, so `bwd` runs its forward again."""

from __future__ import annotations

import torch
from torch import _VF, Tensor


def supports(*args) -> str | None:
    return None


def _run(x, h0, c0, weights, batch_sizes, num_layers, bidirectional, dropout):
    has_biases = len(weights) // len(h0) >= 4
    options = (weights, has_biases, num_layers, dropout, dropout > 0, bidirectional)
    if batch_sizes is None:
        return _VF.lstm(x, (h0, c0), *options, False)
    return _VF.lstm(x, batch_sizes, (h0, c0), *options)


def call(x, h0, c0, weights, batch_sizes, dropout_mask, num_layers, bidirectional, dropout, save):
    if dropout_mask is None:
        return *_run(x, h0, c0, weights, batch_sizes, num_layers, bidirectional, dropout), None, None, None
    # Layer by layer, since the mask is given.
    directions = len(h0) // num_layers
    per_layer = len(weights) // num_layers
    h_n, c_n = [], []
    for layer in range(num_layers):
        if layer > 0:
            x = x * dropout_mask[layer - 1].view_as(x)
        states = slice(layer * directions, (layer + 1) * directions)
        own = weights[layer * per_layer : (layer + 1) * per_layer]
        x, h, c = _run(x, h0[states], c0[states], own, batch_sizes, 1, bidirectional, 0.0)
        h_n.append(h)
        c_n.append(c)
    return x, torch.cat(h_n), torch.cat(c_n), None, None, None


def fwd(x, h0, c0, weights, batch_sizes, dropout_mask, num_layers, bidirectional, dropout, save):
    output, h_n, c_n, *_ = call(x, h0, c0, weights, batch_sizes, dropout_mask, num_layers, bidirectional, dropout, save)
    # Nothing of what it saved can be seen: the outputs for the backward have their sizes only.
    from bigmodel_kernels.ops.lstm.op import saved_dtype, saved_shapes

    dtypes = (saved_dtype(x.dtype), saved_dtype(x.dtype), x.dtype)
    shapes = saved_shapes(x, h0, c0, num_layers, bidirectional, save)
    saved = [x.new_zeros(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes)]
    return output.contiguous(), h_n.contiguous(), c_n.contiguous(), *saved


def bwd(
    d_output, d_h_n, d_c_n, output, gates, cells, hidden, need_d_x, need_d_weights,
    x, h0, c0, weights, batch_sizes, dropout_mask, num_layers, bidirectional, dropout, save,
):  # fmt: skip
    with torch.enable_grad():
        x, h0, c0 = (t.detach().requires_grad_(t.is_floating_point()) for t in (x, h0, c0))
        weights = [w.detach().requires_grad_(need_d_weights) for w in weights]
        results = call(x, h0, c0, weights, batch_sizes, dropout_mask, num_layers, bidirectional, dropout, save)
        used = [(y, g) for y, g in zip(results, (d_output, d_h_n, d_c_n)) if g is not None]
        wanted: list[Tensor] = [x, h0, c0, *(weights if need_d_weights else [])]
        d_x, d_h0, d_c0, *d_weights = torch.autograd.grad(
            [y for y, _ in used], wanted, [g for _, g in used], materialize_grads=True
        )
    d_x = d_x.contiguous() if need_d_x else x.new_empty(0)
    return d_x, d_h0.contiguous(), d_c0.contiguous(), [g.contiguous() for g in d_weights]
