"""The C++ kernel of csrc/cpu/conv_step_kernel.h."""

from __future__ import annotations

import functools

import torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def supports(x_t, ring, position, *rest) -> str | None:
    if not x_t.is_cpu:
        return f"x_t is on {x_t.device}, not on the CPU"
    if x_t.dtype not in DTYPES:
        return f"x_t is {x_t.dtype}; the kernel takes float32, float64 and bfloat16"
    return None if ring.is_contiguous() else "the ring of the state is not contiguous"


@functools.cache
def native():
    """The kernel's operator, which takes contiguous weights."""
    return torch.ops.bigmodel_native.conv_step_fwd.default


def fwd(
    x_t, ring, position, weight, bias, out_weight, out_bias, skip_weight, skip_bias, skip, dilation, groups, activation,
    slope,
):  # fmt: skip
    tensors = [
        t if t is None or t.is_contiguous() else t.contiguous()
        for t in (weight, bias, out_weight, out_bias, skip_weight, skip_bias, skip)
    ]
    return native()(x_t, ring, position, *tensors, dilation, groups, activation, slope)
