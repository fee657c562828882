"""The C++ kernels that csrc/cpu/decoder_step.cpp calls one after the other."""

from __future__ import annotations

import functools

import torch

from bigmodel_kernels import _cpu

MOST_ROWS = 16  # query heads that share keys


def supports(x, k_cache, v_cache, lengths, *rest) -> str | None:
    if (why := _cpu.reason(x)) is not None:
        return why
    if rest[12] > MOST_ROWS * k_cache.shape[1]:
        return f"more than {MOST_ROWS} query heads share keys"
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        return "the last dimension of a cache is not adjacent"
    return None


@functools.cache
def native():
    """The operator, which takes contiguous x, lengths, biases and norms."""
    return torch.ops.bigmodel_native.decoder_step_fwd.default


def fwd(x, k_cache, v_cache, lengths, *rest):
    weights = [t if t is None or t.dim() == 2 else t.contiguous() for t in rest[:12]]
    return native()(x.contiguous(), k_cache, v_cache, lengths.contiguous(), *weights, *rest[12:])
