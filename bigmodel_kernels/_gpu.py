"""What launchers of CUDA C++ and of Triton kernels share."""

from __future__ import annotations

import functools

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def reason(t: torch.Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES) -> str | None:
    """Why CUDA kernels of these dtypes cannot take tensors like t; None where they can."""
    if t.dtype not in dtypes:
        names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
        return f"the kernels take {', '.join(names[:-1])} and {names[-1]}, got {t.dtype}"
    if not t.is_cuda:
        return f"the tensors are on {t.device}, not on a GPU"
    if capability(t.device.index) < (8, 0):
        return f"the GPU has compute capability {capability(t.device.index)}, the kernels need 8.0"
    return None


def product(
    a: torch.Tensor,  # [M, K]
    b: torch.Tensor,  # [K, N]
    out: torch.Tensor,  # [M, N] float32
) -> torch.Tensor:
    """out = a b by PyTorch's own product, summed up and left in float32 for 16-bit numbers too."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)  # PyTorch has no such product on the CPU
