"""The C++ kernels that csrc/cpu/encoder_layer.cpp calls one after the other."""

from __future__ import annotations

import functools

import torch

from bigmodel_kernels import _cpu


def supports(x, *rest) -> str | None:
    return _cpu.reason(x)


@functools.cache
def native():
    """The operator, which takes contiguous x, biases and norms."""
    return torch.ops.bigmodel_native.encoder_layer_fwd.default


def fwd(x, *rest):
    weights = [t if t is None or t.dim() == 2 else t.contiguous() for t in rest[:12]]
    return native()(x.contiguous(), *weights, *rest[12:])
