"""What the CPU kernels take, and what choices between them go by."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch

from bigmodel_kernels import _tuned
from bigmodel_kernels._extension import build_info

TILED = ("amx", "amx_emulated")  # `isa` where products of bfloat16 numbers are formed in tiles
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def reason(t: torch.Tensor, name: str = "x") -> str | None:
    """Why the CPU kernels cannot take this tensor; None where they can."""
    if not t.is_cpu:
        return f"{name} is on {t.device}, not on the CPU"
    if t.dtype not in DTYPES:
        return f"{name} is {t.dtype}; the kernels take float32, float64 and bfloat16"
    return None


@functools.cache
def dot_products() -> bool:
    """Whether the kernels multiply bfloat16 by the CPU's dot products and PyTorch has nothing better, which AMX tiles are."""
    return build_info().get("isa") == "avx512_bf16" and not torch.cpu._is_amx_tile_supported()


def _cpuinfo(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")


@functools.cache
def vendor() -> str:
    """The processor's maker as Linux names it, such as GenuineIntel or AuthenticAMD; empty where it does not tell."""
    return _cpuinfo("vendor_id")


def tiles_key() -> dict[str, Any]:
    """What a choice between the kernels' products in tiles and PyTorch's was measured with; see cpu_tune.py."""
    here = Path(__file__).parent
    return {
        "format": _tuned.FORMAT,
        "kernels": hashlib.sha256((here / "_native.so").read_bytes()).hexdigest(),
        "torch": torch.__version__,
        "cpu": _cpuinfo("model name"),
        "isa": build_info()["isa"],
        "threads": torch.get_num_threads(),
    }


@functools.cache
def tiles_preferred(family: str) -> bool:
    """Whether `python -m bigmodel_kernels tune --cpu` found this family faster in tiles than PyTorch's own on this CPU."""
    if build_info().get("isa") not in TILED:
        return False
    entry = _tuned.load(tiles_key()).get(family)
    return entry is not None and entry["constants"].get("ours") == 1


@functools.cache
def mkl_on_amd() -> bool:
    """Whether PyTorch's float32 products go to MKL's AVX-512 kernels on a processor of AMD's (Zen 4 and 5): they are made for
    Intel's. A few rows with many weights took up to twice the time of the kernels here, large products up to 1.4 times."""
    mkl = torch.backends.mkl.is_available()
    return mkl and vendor() == "AuthenticAMD" and torch.backends.cpu.get_cpu_capability() == "AVX512"


@functools.cache
def slow_products() -> bool:
    """Whether small ones are slow, too: on Zen 5 (family 26) MKL's kernels of 256 bits reach half of the peak. On Zen 4
    (family 25) a vector of 512 bits takes two cycles."""
    return mkl_on_amd() and int(_cpuinfo("cpu family") or 0) >= 26
