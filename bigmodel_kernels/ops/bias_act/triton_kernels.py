"""The launchers of the Triton kernels of triton_pointwise.py."""

from __future__ import annotations

import torch

from bigmodel_kernels import _triton
from bigmodel_kernels._rows import rows_of
from bigmodel_kernels.ops.bias_act.reference import kept_scale
from bigmodel_kernels.ops.bias_act.triton_pointwise import backward_kernel, blocks, forward_kernel

MOST_ROWS = 2**31 - 2**12  # dropout counts rows in 32 bits


def supports(x, *rest) -> str | None:
    if (why := _triton.reason(x)) is not None:
        return why
    if x.numel() > MOST_ROWS * x.shape[-1]:
        return f"the kernels take up to {MOST_ROWS} rows, got x of shape {list(x.shape)}"
    return None


def fwd(x, bias, residual, seed, activation, dropout_p):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    columns = x.shape[-1]
    source, added = rows_of(x), rows_of(residual)
    rows, sizes = source.shape[0], blocks(x.device.index, "forward", x.element_size(), columns)
    _triton.launch(
        forward_kernel, -(-rows // sizes["BLOCK_R"]) * -(-columns // sizes["BLOCK_C"]),
        source, bias if bias is None else bias.contiguous(), added, seed, y,
        rows, columns, source.stride(0), 0 if added is None else added.stride(0),
        _triton.dropout_threshold(dropout_p), kept_scale(dropout_p), ACTIVATION=activation, **sizes,
    )  # fmt: skip
    return y


def bwd(dy, need_bias, x, bias, residual, seed, activation, dropout_p):
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dx.numel() == 0:
        return dx, x.new_zeros(x.shape[-1] if need_bias else 0)
    columns = x.shape[-1]
    source, above = rows_of(x), rows_of(dy)
    rows, sizes = source.shape[0], blocks(x.device.index, "backward", x.element_size(), columns)
    chunk, programs = _triton.split_rows(x.device.index, rows, sizes["BLOCK_R"])
    partial = torch.empty(programs, columns, dtype=torch.float32, device=x.device) if need_bias else None
    _triton.launch(
        backward_kernel, programs * -(-columns // sizes["BLOCK_C"]),
        above, source, bias if bias is None else bias.contiguous(), seed, dx, partial,
        rows, columns, chunk, above.stride(0), source.stride(0),
        _triton.dropout_threshold(dropout_p), kept_scale(dropout_p), ACTIVATION=activation, **sizes,
    )  # fmt: skip
    return dx, partial.sum(0).to(x.dtype) if need_bias else x.new_empty(0)
