"""What launchers of CUDA C++ and of Triton kernels share."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Gpu:
    """The properties that choices between kernels go by."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int  # that a block can have


# By the CUDA programming guide's table of compute capabilities and the sizes of the largest products.
A100 = Gpu((8, 0), 108, 163 << 10)
L40S = Gpu((8, 9), 142, 99 << 10)
H100 = Gpu((9, 0), 132, 227 << 10)


@functools.cache
def properties(device: int) -> Gpu:
    found = torch.cuda.get_device_properties(device)
    return Gpu((found.major, found.minor), found.multi_processor_count, found.shared_memory_per_block_optin)


def reason(t: torch.Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES) -> str | None:
    """Why CUDA kernels of these dtypes cannot take tensors like t; None where they can."""
    if t.dtype not in dtypes:
        names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
        return f"the kernels take {', '.join(names[:-1])} and {names[-1]}, got {t.dtype}"
    if not t.is_cuda:
        return f"the tensors are on {t.device}, not on a GPU"
    if (found := properties(t.device.index).capability) < (8, 0):
        return f"the GPU has compute capability {found}, the kernels need 8.0"
    return None


def allows_tf32(dtype: torch.dtype, *switches) -> bool:
    """Whether products of this dtype may take numbers rounded to TF32: where PyTorch's own switches (that of products, if none is
    named) all say so."""
    if dtype != torch.float32:
        return False
    for switch in switches or (torch.backends.cuda.matmul,):  # noqa: SIM110 (a generator takes as long as the question)
        if switch.fp32_precision != "tf32":
            return False
    return True


def product(
    a: torch.Tensor,  # [M, K]
    b: torch.Tensor,  # [K, N]
    out: torch.Tensor | None = None,  # [M, N] float32
) -> torch.Tensor:
    """a b, into `out` if there is one, by PyTorch's own product, summed up and left in float32 for 16-bit numbers too."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)  # PyTorch has no such product on the CPU


def linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x w^T, as `product`; in float32 by the one call of PyTorch's that transposes by itself."""
    return torch.nn.functional.linear(x, w) if x.dtype == torch.float32 else product(x, w.t())


def tickets(like: torch.Tensor, count: int) -> torch.Tensor:
    """Counters by which the blocks of a launch tell who is last. They are zero before and after every launch, so that they are
    made once for a stream; a CUDA graph has its own."""
    if like.is_cuda and not torch.cuda.is_current_stream_capturing():
        return _kept_tickets(like.device, torch.cuda.current_stream(like.device).cuda_stream, count)
    return torch.zeros(count, dtype=torch.int32, device=like.device)


@functools.cache
def _kept_tickets(device: torch.device, stream: int, count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)
