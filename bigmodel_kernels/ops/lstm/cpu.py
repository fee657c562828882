"""The C++ kernels of csrc/cpu/lstm*.h."""

from __future__ import annotations

import functools

import torch

from bigmodel_kernels import _cpu


@functools.cache
def dots() -> bool:
    """Whether the kernels' products of bfloat16 numbers keep up with oneDNN's: dot products do, where it has no AMX."""
    return _cpu.tiles_preferred("lstm") if torch.cpu._is_amx_tile_supported() else _cpu.dot_products()


def supports(x, h0, c0, weights, batch_sizes, *rest) -> str | None:
    return _cpu.reason(x)


def _contiguous(x, h0, c0, weights, batch_sizes, dropout_mask):
    mask = None if dropout_mask is None else dropout_mask.contiguous()
    return x.contiguous(), h0.contiguous(), c0.contiguous(), [w.contiguous() for w in weights], batch_sizes, mask


def fwd(x, h0, c0, weights, batch_sizes, dropout_mask, num_layers, bidirectional, dropout, save):
    tensors = _contiguous(x, h0, c0, weights, batch_sizes, dropout_mask)
    return torch.ops.bigmodel_native.lstm_fwd(*tensors, num_layers, bidirectional, save)


def bwd(
    d_output, d_h_n, d_c_n, output, gates, cells, hidden, need_d_x, need_d_weights,
    x, h0, c0, weights, batch_sizes, dropout_mask, num_layers, bidirectional, dropout, save,
):  # fmt: skip
    grads = [None if g is None else g.contiguous() for g in (d_output, d_h_n, d_c_n)]
    tensors = _contiguous(x, h0, c0, weights, batch_sizes, dropout_mask)
    return torch.ops.bigmodel_native.lstm_bwd(
        *grads, output, gates, cells, hidden, need_d_x, need_d_weights, *tensors, num_layers, bidirectional
    )
