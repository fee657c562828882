"""Backend "cuda" of an op with its native ops run by the emulator, on CPU tensors: the launchers in ops/*/cuda.py and the
kernels, with all that is between them but the C++ of csrc/cuda/*.cu."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import torch

from bigmodel_kernels import _gpu, _registry

SUFFIX = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}


@contextlib.contextmanager
def emulated(monkeypatch, op: str | None = None, gpu: _gpu.Gpu = _gpu.H100, **native_ops):
    """In the block, CPU tensors pass for tensors on `gpu`; `backend="cuda"` of `op` calls these functions as its native ops."""
    availability, reason = _registry.availability, _gpu.reason

    def on_cpu(t, dtypes=_gpu.DTYPES):
        why = reason(t, dtypes)
        return None if why is not None and "not on a GPU" in why else why

    with monkeypatch.context() as patch:
        patch.setattr(_gpu, "reason", on_cpu)
        patch.setattr(_gpu, "properties", lambda device: gpu)
        if op:
            patch.setattr(
                _registry, "availability", lambda o, b: None if (o, b) == (op, "cuda") else availability(o, b)
            )
            patch.setattr(_registry.module(op, "cuda"), "native", SimpleNamespace(**native_ops))
        yield
