"""What Triton launchers of all ops share."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from bigmodel_kernels import _gpu

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1 at import: kernels run in Python, on CPU tensors
LOG2E = tl.constexpr(1.4426950408889634)


def gpu(device: int | None) -> str:
    """The name under which tables of configurations have a GPU; "sm_86" is also for any that they do not have."""
    if device is None:
        return "interpreter"
    major, minor = _gpu.properties(device).capability
    return "sm_90" if major in (9, 10) else "sm_80" if (major, minor) in ((8, 0), (8, 7)) else "sm_86"


def reason(t: torch.Tensor) -> str | None:
    """Why Triton kernels cannot take tensors like t; None where they can."""
    if t.dtype not in _gpu.DTYPES:
        return f"the kernels take float32, float16 and bfloat16, got {t.dtype}"
    if INTERPRETED:
        # Triton's interpreter multiplies the bit patterns of bfloat16 numbers, silently.
        return "Triton's interpreter has no bfloat16 arithmetic" if t.dtype == torch.bfloat16 else None
    if not t.is_cuda:
        return f"the tensors are on {t.device}, not on a GPU (TRITON_INTERPRET=1 runs the kernels there, slowly)"
    return _gpu.reason(t)


def precision(dtype: torch.dtype, *switches) -> str:
    """How tl.dot multiplies: IEEE float32 unless PyTorch's own switches allow TF32; 16-bit products are exact either way."""
    return "tf32" if _gpu.allows_tf32(dtype, *switches) else "ieee"


def launch(kernel, programs: int, *args, **constants) -> None:
    """Runs `programs` programs of a kernel on the device and current stream of its first argument."""
    if programs:
        first = args[0]
        with torch.cuda.device_of(first.base if isinstance(first, TensorDescriptor) else first):
            kernel[(programs,)](*args, **constants)


DESCRIPTOR_BYTES = 16  # addresses and strides are multiples of
LARGEST_DESCRIPTOR_STRIDE = 1 << 40  # bytes


class Descriptor(TensorDescriptor):
    """One whose fields have been checked: Triton's own constructor checks them every time, for longer than a launch may take."""

    def __init__(self, base: torch.Tensor, shape: list[int], strides: list[int], block_shape: list[int]):
        self.base, self.shape, self.strides, self.block_shape = base, shape, strides, block_shape


def descriptor(t: torch.Tensor, tile: list[int]) -> TensorDescriptor | None:
    """t for the copy engine (TMA) of sm_90, tile by tile; None where its address or its strides do not allow it."""
    if t.data_ptr() % DESCRIPTOR_BYTES:
        return None
    fields = described(t.shape, t.stride(), t.element_size())
    return fields and Descriptor(t, *fields, tile)


@functools.lru_cache(maxsize=4096)
def described(shape: tuple, strides: tuple, element_size: int) -> tuple[list[int], list[int]] | None:
    """The shape and the strides of a descriptor for such a tensor, None where there can be none."""
    if strides[-1] != 1 or 0 in shape:
        return None
    granule = DESCRIPTOR_BYTES // element_size
    legal = []
    for size, stride in zip(shape, strides[:-1]):
        if size == 1:
            stride = granule  # nothing lies along it, whatever it says
        elif stride <= 0 or stride % granule or stride * element_size >= LARGEST_DESCRIPTOR_STRIDE:
            return None
        legal.append(stride)
    return list(shape), [*legal, 1]


def dropout_threshold(dropout_p: float) -> int:
    """What the unsigned 32-bit numbers of dropout are compared with, as the signed one that a kernel takes."""
    threshold = min(int(dropout_p * 2**32), 2**32 - 1)
    return threshold - 2**32 if threshold >= 2**31 else threshold


# For kernels that leave a partial sum per program: two programs for every multiprocessor of the largest GPU.
PROGRAMS = {"sm_90": 264, "sm_80": 216, "sm_86": 164, "interpreter": 6}


def split_rows(device: int | None, rows: int, block: int) -> tuple[int, int]:
    """(rows of each program, programs) for a kernel that goes over its rows `block` at a time."""
    blocks = -(-rows // block)
    chunk = max(1, -(-blocks // PROGRAMS[gpu(device)])) * block
    return chunk, -(-rows // chunk)


@triton.jit
def exp_of_negative(x):
    """e^x for x <= 0, at least e^-87: 2^n 2^(r log2 e), n ln 2 taken off x in two parts (Cody & Waite).

    2^(x log2 e) alone would be off by the rounding of its exponent: 6 units in the last place at -10.
    """
    x = tl.where(x < -87.0, -87.0, x)  # keeps NaN
    n = tl.floor(x * LOG2E + 0.5)
    r = x - n * 0.693359375 + n * 2.12194440e-4
    return tl.exp2(n) * tl.exp2(r * LOG2E)


@triton.jit
def sigmoid(x):
    e = exp_of_negative(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def tanh(x):
    """An odd polynomial near 0 (Moshier's Cephes), 1 - 2 e^-2|x| / (1 + e^-2|x|) beyond."""
    z = x * x
    near = z * -5.70498872745e-3 + 2.06390887954e-2
    near = near * z - 5.37397155531e-2
    near = near * z + 1.33314422036e-1
    near = near * z - 3.33332819422e-1
    e = exp_of_negative(-2.0 * tl.abs(x))
    far = 1.0 - 2.0 * e / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, x + x * z * near, tl.where(x < 0, -far, far))
