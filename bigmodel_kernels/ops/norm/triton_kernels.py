"""The launchers of the Triton kernels of triton_rows.py."""

from __future__ import annotations

import torch

from bigmodel_kernels import _triton
from bigmodel_kernels._rows import rows_of
from bigmodel_kernels.ops.norm.triton_rows import LARGEST_ROW, backward_kernel, blocks, forward_kernel


def supports(x, *rest) -> str | None:
    if (why := _triton.reason(x)) is not None:
        return why
    if x.shape[-1] > LARGEST_ROW:
        return f"the kernels take rows of up to {LARGEST_ROW} elements, got {x.shape[-1]}"
    return None


def fwd(x, residual, weight, bias, eps, center):
    columns = x.shape[-1]
    source, added = rows_of(x), rows_of(residual)
    rows = source.shape[0]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = None if residual is None else torch.empty_like(y)
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    sizes = blocks(x.device.index, "forward", x.element_size(), columns)
    _triton.launch(
        forward_kernel, -(-rows // sizes["BLOCK_R"]),
        source, added, *(t if t is None else t.contiguous() for t in (weight, bias)), y, h, mean, rstd,
        rows, columns, source.stride(0), 0 if added is None else added.stride(0), eps, CENTER=center, **sizes,
    )  # fmt: skip
    return y, x.new_empty(0) if h is None else h, mean, rstd


def bwd(dy, dh, h, mean, rstd, need_parameters, x, residual, weight, bias, eps, center):
    columns = x.shape[-1]
    source, above, dh = (
        rows_of(h),
        rows_of(torch.zeros_like(h) if dy is None else dy),
        rows_of(dh),
    )
    rows = source.shape[0]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sizes = blocks(x.device.index, "backward", x.element_size(), columns)
    chunk, programs = _triton.split_rows(x.device.index, rows, sizes["BLOCK_R"])
    wanted = [need_parameters and t is not None for t in (weight, bias)]
    partial = torch.empty(2, programs, columns, dtype=torch.float32, device=x.device) if any(wanted) else None
    _triton.launch(
        backward_kernel, programs,
        above, dh, source, weight if weight is None else weight.contiguous(), mean, rstd, dx, partial,
        rows, columns, chunk, above.stride(0), 0 if dh is None else dh.stride(0), source.stride(0),
        CENTER=center, **sizes,
    )  # fmt: skip
    d_parameters = [partial[i].sum(0).to(x.dtype) if want else x.new_empty(0) for i, want in enumerate(wanted)]
    return dx, *d_parameters
