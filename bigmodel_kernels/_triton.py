"""What Triton launchers of all ops share."""

from __future__ import annotations

import functools

import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1 when triton was imported: kernels run in Python, on CPU tensors
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def reason(t: torch.Tensor) -> str | None:
    """Why Triton kernels cannot take tensors like t; None where they can."""
    if t.dtype not in DTYPES:
        return f"the kernels take float32, float16 and bfloat16, got {t.dtype}"
    if INTERPRETED:
        # Triton's interpreter multiplies the bit patterns of bfloat16 numbers, silently.
        return "Triton's interpreter has no bfloat16 arithmetic" if t.dtype == torch.bfloat16 else None
    if not t.is_cuda:
        return f"the tensors are on {t.device}, not on a GPU (TRITON_INTERPRET=1 runs the kernels there, slowly)"
    if capability(t.device.index) < (8, 0):
        return f"the GPU has compute capability {capability(t.device.index)}, the kernels need 8.0"
    return None


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: IEEE float32 unless PyTorch's own switch allows TF32; 16-bit products are exact either way."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def launch(kernel, programs: int, *args, **constants) -> None:
    """Runs `programs` programs of a kernel on the device and current stream of its first argument."""
    if programs:
        with torch.cuda.device_of(args[0]):
            kernel[(programs,)](*args, **constants)
