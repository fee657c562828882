"""FlashAttention's own kernels, of those installed or in the folder $BIGMODEL_FA3; docs/gpu.md says how they get to a machine."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

PACKAGES = {"FA3": "flash_attn_interface", "FA2": "flash_attn"}
# (q, k, v, causal, (left, right)) -> out, all [B, S, H, D]; -1 is no limit
Attention = Callable[..., Tensor]


@functools.cache
def installed() -> dict[str, Attention]:
    found: dict[str, Attention] = {}
    for name, package in PACKAGES.items():
        try:
            function = importlib.import_module(package).flash_attn_func
        except (ImportError, AttributeError):
            continue
        found[name] = functools.partial(_by_package, function)
    folder = os.environ.get("BIGMODEL_FA3")
    if folder and "FA3" not in found:
        load_fa3(Path(folder))
        found["FA3"] = _ByBinary.apply
    return found


def load_fa3(folder: Path) -> None:
    """The binary that xFormers' wheels carry, `_C.so`, with `libcudart.so.12` beside it where the machine has none."""
    if (runtime := folder / "libcudart.so.12").is_file():
        ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
    torch.ops.load_library(folder / "_C.so")


def _by_package(function: Callable, q, k, v, causal: bool, window: tuple[int, int]) -> Tensor:
    out = function(q, k, v, causal=causal, window_size=window)
    return out[0] if isinstance(out, tuple) else out


class _ByBinary(torch.autograd.Function):
    """FlashAttention 3's operators, which come without gradients of their own."""

    @staticmethod
    def forward(ctx, q, k, v, causal: bool, window: tuple[int, int]) -> Tensor:
        ctx.options = {
            "softmax_scale": q.shape[-1] ** -0.5, "is_causal": causal,
            "window_size_left": window[0], "window_size_right": window[1],
        }  # fmt: skip
        out, lse, *_ = torch.ops.flash_attn_3.fwd(q, k, v, **ctx.options)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in (q, k, v)]
        torch.ops.flash_attn_3.bwd(grad.contiguous(), q, k, v, out, lse, *grads, **ctx.options)
        return *grads, None, None
