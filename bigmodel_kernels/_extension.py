"""Loads the two binaries once, and keeps the reason when one cannot be loaded.

`_native.so` registers every native op as `torch.ops.bigmodel_native.*`; `_C` tells about the build. The package works
without either: `auto` then runs PyTorch's own ops, and `python -m bigmodel_kernels info` shows what is missing.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

REMEDY = "build it with: pip install --no-build-isolation .   (in a clone: make build)"
CUDA_REMEDY = "build it with: FORCE_CUDA=1 pip install --no-build-isolation .   (in a clone: make cuda)"


def _load_native() -> str | None:
    path = Path(__file__).with_name("_native.so")
    if not path.is_file():
        return f"{path.name} is not built; {REMEDY}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load ({error.__cause__ or error}); {REMEDY}"
    return None


def _load_bindings():
    if importlib.util.find_spec("bigmodel_kernels._C") is None:
        return None, f"the module _C is not built for this Python; {REMEDY}"
    try:
        from bigmodel_kernels import _C
    except ImportError as error:
        return None, f"the module _C does not load ({error}); {REMEDY}"
    return _C, None


native_error = _load_native()
bindings, bindings_error = _load_bindings()


@functools.cache
def has_kernel(op: str, dispatch_key: str) -> bool:
    """Whether the loaded binary has a kernel of `bigmodel_native::<op>` for "CPU" or "CUDA"."""
    name = f"bigmodel_native::{op}"
    exists = native_error is None and torch._C._dispatch_has_kernel(name)
    return exists and torch._C._dispatch_has_kernel_for_dispatch_key(name, dispatch_key)


def lack_of_memory(error: RuntimeError, op: str, args: Sequence) -> RuntimeError | None:
    """PyTorch's own error where a native kernel could not allocate a tensor, which comes through the stable ABI without type and
    words; None of any other error. Programs that try a smaller batch then look for these."""
    text = str(error)
    if "API call failed" not in text or "empty" not in text:
        return None
    if any(isinstance(a, torch.Tensor) and a.is_cuda for a in args):
        return torch.OutOfMemoryError(f"CUDA out of memory. {op} could not allocate its result or its working memory")
    return RuntimeError(f"{op}: DefaultCPUAllocator: can't allocate memory for its result or its working memory")


@functools.cache
def _why_no_amx() -> str:
    """Why the processor's AMX is not used, empty where it is. A processor that computes wrongly is worth a warning."""
    why = bindings.why_no_amx()
    if "self-check" in why:
        logging.getLogger("bigmodel_kernels").warning("%s; bfloat16 runs without it", why)
    return why


def build_info() -> dict[str, str]:
    """What the binaries were built with: compiler, CUDA toolkit, torch, and the instruction set in use.

    Returns:
        Keys `native` ("ok" or why not), `bindings` likewise and, where `_C` is built, `compiler`, `cuda`, `cuda_archs`,
        `torch`, `torch_target`, `isa` (amx, amx_emulated, avx512_bf16, avx512, avx2 or generic) and `amx`, "ok" or why the
        processor's AMX is not used.
    """
    info = {"native": native_error or "ok", "bindings": bindings_error or "ok"}
    if bindings is not None:
        info |= bindings.build_info() | {"isa": bindings.isa(), "amx": _why_no_amx() or "ok"}
    return info
