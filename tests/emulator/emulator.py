"""Runs CUDA kernels on the host: builds a program from a kernel header and launches it on CPU tensors.

LSTM = Program("lstm_cell.cuh", "bmk::lstm_cell_forward<float>")   # a kernel more is a line more
LSTM.run("bmk::lstm_cell_forward<float>", grid, block, x, 3, None, shared_bytes=4096, seed=7)

README.md beside this file says what is emulated and what is found.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "csrc" / "cuda"
COMPILER = "g++"  # 11 or later; clang's instrumentation has other flags
TIMEOUT = 120  # seconds a launch may take: longer, and it spins on plain loads, which the emulator cannot see

FLAGS = ["-std=c++20", "-O1", "-g1", "-fno-pie", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
CHECKED = ["-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
DETECT = {  # what is looked for: how kernels are compiled, how the program is linked
    "memory": (["-fsanitize=address,undefined", *CHECKED], ["-fsanitize=address,undefined"]),
    # Only the instrumentation: runtime/hooks.cpp takes the place of ThreadSanitizer's library.
    "races": (
        ["-fsanitize=thread,undefined", *CHECKED, "--param=tsan-distinguish-volatile=1"],
        ["-fsanitize=undefined"],
    ),
}
ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0", "UBSAN_OPTIONS": "print_stacktrace=0"}


@cache
def why_not() -> str | None:
    """Why kernels cannot be emulated here; None where they can."""
    if platform.system() != "Linux" or shutil.which(COMPILER) is None:
        return f"the emulator compiles kernels with {COMPILER} on Linux, which is not here"
    with tempfile.TemporaryDirectory() as folder:
        command = [COMPILER, *FLAGS, *DETECT["races"][0], "-c", "-xc++", "-o", f"{folder}/object", "-"]
        found = subprocess.run(command, input="#include <bit>\nint main() {}", capture_output=True, text=True)
        if not found.returncode:
            command = [COMPILER, *FLAGS, *DETECT["memory"][0], "-no-pie", "-xc++", "-o", f"{folder}/program", "-"]
            found = subprocess.run(command, input="int main() {}", capture_output=True, text=True)
    return (
        f"{COMPILER} is too old, or its sanitizers are not installed: {found.stderr[-500:]}"
        if found.returncode
        else None
    )


needs_compiler = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


class EmulatorError(RuntimeError):
    """What the emulator or a sanitizer found, with the lines of the source it speaks of."""


class Program:
    """The kernels of one header, named as C++ names them. `edit=(file, old, new)` plants a mistake: `old` occurs once."""

    def __init__(self, header: str | Path, *kernels: str, edit: tuple[str, str, str] | None = None):
        self.header = KERNELS / header
        self.kernels = kernels
        self.edit = edit

    def with_edit(self, file: str, old: str, new: str) -> Program:
        return Program(self.header, *self.kernels, edit=(file, old, new))

    def run(
        self,
        kernel: str,
        grid: int | tuple[int, ...],
        block: int | tuple[int, ...],
        *arguments,
        shared_bytes: int = 0,
        cluster: int | tuple[int, ...] = 1,
        live_blocks: int = 4,
        cooperative: bool = False,
        seed: int = 0,
        detect: str = "memory",
    ) -> None:
        """Launches a kernel. Tensors are written in place; a tuple stands for the members of a struct, None for null."""
        sizes = [_index(size) for size in (grid, block, cluster)]
        if cooperative:
            live_blocks = sizes[0][0] * sizes[0][1] * sizes[0][2]
        buffers: dict[int, torch.UntypedStorage] = {}
        words = " ".join(word for argument in arguments for word in _words(argument, buffers))
        description = [
            kernel.replace(" ", ""),
            *(str(n) for size in sizes for n in size),
            *(str(n) for n in (shared_bytes, live_blocks, seed, len(buffers))),
            *(str(storage.nbytes()) for storage in buffers.values()),
            words,
            ";\n",
        ]
        data = b"".join(ctypes.string_at(storage.data_ptr(), storage.nbytes()) for storage in buffers.values())
        program = _build(self.header, self.kernels, self.edit, detect)
        try:
            result = subprocess.run(
                [program],
                input=" ".join(description).encode() + data,
                capture_output=True,
                timeout=TIMEOUT,
                env=os.environ | ENVIRONMENT,
            )
        except subprocess.TimeoutExpired as error:
            raise EmulatorError(f"{kernel} ran for {TIMEOUT} s: does it spin on a plain load?") from error
        if result.returncode:
            raise EmulatorError(_with_lines(program, result.stderr.decode(errors="replace")))
        at = 0
        for storage in buffers.values():
            ctypes.memmove(storage.data_ptr(), result.stdout[at : at + storage.nbytes()], storage.nbytes())
            at += storage.nbytes()


def _index(size: int | tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = (*(size if isinstance(size, tuple) else (size,)), 1, 1)[:3]
    return x, y, z


def _words(argument, buffers: dict[int, torch.UntypedStorage]) -> list[str]:
    """One argument as runtime/main.cpp reads it. Tensors that share a storage share a buffer."""
    match argument:
        case None:
            return ["n"]
        case torch.Tensor():
            storage = argument.untyped_storage()
            start = storage.data_ptr()
            buffers.setdefault(start, storage)
            return ["p", str(list(buffers).index(start)), str(argument.data_ptr() - start if argument.numel() else 0)]
        case bool() | int():
            return ["i", str(int(argument))]
        case float():
            return ["r", argument.hex()]
        case tuple() | list():
            return ["(", *(word for member in argument for word in _words(member, buffers)), ")"]
    raise TypeError(f"a kernel takes tensors, None, int, float and tuples of them, not {type(argument).__name__}")


# ---- building ----


def included(source: Path, found: set[Path]) -> set[Path]:
    """The project's headers that a source includes, and itself."""
    if source in found:
        return found
    found.add(source)
    for name in re.findall(r'^\s*#\s*include\s+["<]([^">]+)[">]', source.read_text(), re.MULTILINE):
        for folder in (source.parent, KERNELS, HERE):
            if (folder / name).is_file():
                included((folder / name).resolve(), found)
                break
    return found


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()[:20]


@cache
def _compiler() -> str:
    return subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout


def _compile(arguments: list[str | Path]) -> None:
    result = subprocess.run([COMPILER, *FLAGS, *arguments], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{COMPILER} failed on {arguments[-1]}:\n{result.stderr[-8000:]}")


@contextlib.contextmanager
def _made_once(name: str):
    """A folder that is filled once for all processes: yields it, and whether it is still to be filled."""
    root = Path(tempfile.gettempdir(), f"bigmodel-emulator-{os.getuid()}")
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder, not (folder / "done").exists()
        (folder / "done").touch()


@cache
def _runtime() -> list[Path]:
    """The emulator itself, which is the same in all programs."""
    sources = sorted((HERE / "runtime").glob("*.cpp"))
    files = set().union(*(included(source, set()) for source in sources))
    name = "runtime-" + _digest(_compiler(), *FLAGS, *(path.read_bytes() for path in sorted(files)))
    with _made_once(name) as (folder, is_new):
        objects = [folder / f"{source.stem}.o" for source in sources]
        if is_new:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(lambda pair: _compile(["-c", "-o", pair[1], pair[0]]), zip(sources, objects)))
    return objects


@cache
def _precompiled(detect: str) -> Path:
    """A folder with launch.h compiled: half of what a small program takes."""
    compiled, _ = DETECT[detect]
    files = sorted(included(HERE / "launch.h", set()))
    name = "header-" + _digest(_compiler(), *FLAGS, *compiled, *(path.read_bytes() for path in files))
    with _made_once(name) as (folder, is_new):
        if is_new:
            _compile([*compiled, f"-I{KERNELS}", "-x", "c++-header", "-o", folder / "launch.h.gch", HERE / "launch.h"])
    return folder


@cache
def _build(header: Path, kernels: tuple[str, ...], edit: tuple[str, str, str] | None, detect: str) -> Path:
    compiled, linked = DETECT[detect]
    files = sorted(included(header, {HERE / "launch.h"}) | included(HERE / "launch.h", set()))
    parts = [_compiler(), *FLAGS, *compiled, *linked, *kernels, *(edit or ()), *map(str, _runtime())]
    name = f"{header.stem}-{_digest(str(header), *parts, *(path.read_bytes() for path in files))}"
    with _made_once(name) as (folder, is_new):
        if is_new:
            folder_of_header = _edited_copy(header.parent, folder / "source", *edit) if edit else header.parent
            source = folder / "program.cpp"
            lines = ["#include <launch.h>", f'#include "{folder_of_header / header.name}"']
            source.write_text("\n".join(lines + [f"EMULATE({kernel})" for kernel in kernels]) + "\n")
            include = [f"-I{path}" for path in (_precompiled(detect), folder_of_header, HERE, KERNELS)]
            _compile([*compiled, *include, "-c", "-o", folder / "program.o", source])
            _compile(["-no-pie", *linked, "-o", folder / "program", folder / "program.o", *_runtime()])
            (folder / "program.o").unlink()
    return folder / "program"


def _edited_copy(folder: Path, to: Path, file: str, old: str, new: str) -> Path:
    """A copy of a folder's headers, one of them changed."""
    to.mkdir(exist_ok=True)
    for path in folder.glob("*.cuh"):
        shutil.copy(path, to)
    text = (to / file).read_text()
    if text.count(old) != 1:
        raise ValueError(f"{file} has {text.count(old)} times {old!r}, not once")
    (to / file).write_text(text.replace(old, new))
    return to


def _with_lines(program: Path, message: str) -> str:
    """Addresses of instructions become lines of the source, where binutils are installed."""
    if shutil.which("addr2line") is None:
        return message

    def line(match: re.Match) -> str:
        tool = ["addr2line", "-i", "-e", program, match[1]]  # the line itself, and those it was inlined into
        lines = [
            path.rpartition("/")[2] for path in subprocess.run(tool, capture_output=True, text=True).stdout.split("\n")
        ]
        of_kernel = [name for name in lines if ".cuh:" in name and not name.startswith("ptx")]
        return (of_kernel or lines)[0].partition(" ")[0]

    return re.sub(r"pc=(0x[0-9a-f]+)", line, message)
