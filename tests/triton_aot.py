"""Compiles the Triton kernels that a call would launch, for a GPU that need not be there, and reads what came of it."""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bigmodel_kernels import _triton

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_90": 227 << 10}  # bytes per block


@dataclass(frozen=True)
class Binary:
    """One compiled kernel. `spills` counts the instructions of its SASS that go to local memory."""

    name: str
    constants: dict
    registers: int
    shared: int
    spills: int
    sass: str = field(repr=False)

    def __str__(self) -> str:
        return f"{self.name}: {self.registers} registers, {self.shared} bytes, {self.spills} spills, {self.constants}"


class _Driver:
    """As much of a driver as compiling asks for; the number of a device is that of its architecture."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


@contextlib.contextmanager
def compiling(gpu: str, monkeypatch, only: str | None = None):
    """In the block, launchers compile for `gpu` (`only` the kernel of that name) and run nothing.

    Gives the list of what they compiled, once each, filled at the block's end.
    """
    found: dict[str, Binary] = {}

    def launch(kernel, programs, *args, **constants):
        if only not in (None, kernel.__name__):
            return
        compiled = kernel.warmup(*args, grid=(programs,), **constants)
        if compiled.hash not in found:
            found[compiled.hash] = _read(compiled.hash, compiled, constants)

    with monkeypatch.context() as patch:
        patch.setattr(_triton, "launch", launch)
        patch.setattr(_triton, "gpu", lambda device: gpu)
        patch.setattr(driver, "_active", _Driver(int(gpu.removeprefix("sm_"))))
        binaries: list[Binary] = []
        yield binaries
        binaries.extend(found.values())


def _read(key: str, compiled, constants: dict) -> Binary:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = tool("nvdisasm", "-c", "-ndf", file.name)  # without the analysis of dataflow, which changes no line
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    spills = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    return Binary(compiled.metadata.name, constants, registers, compiled.metadata.shared, spills, sass)


def tool(name: str, *args: str) -> str:
    return subprocess.run([BIN / name, *args], capture_output=True, text=True, check=True).stdout
