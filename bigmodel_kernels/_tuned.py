"""Launch constants that `python -m bigmodel_kernels tune` measured: where they are kept, and when they are believed.

One JSON file per GPU, in `$XDG_CACHE_HOME/bigmodel_kernels` (mode 0700). It is read once, at the first launch on that GPU, which
costs a millisecond and touches no CUDA stream; nothing is ever tuned by itself. It counts only as long as the kernels' sources,
Triton, the driver and the GPU are those it was measured with, and only if nobody else can write it. What `tune --cpu` measured
(cpu_tune.py) is kept in the same way, in a file of the processor.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import json
import os
import re
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

FORMAT = 1
LARGEST_FILE = 1 << 20  # bytes
LARGEST_CONSTANT = 1 << 16  # no side of a tile, and no number of warps or stages, is larger
DRIVER_VERSION = Path("/proc/driver/nvidia/version")

Constants = dict[str, int]


class Row(NamedTuple):
    """A row of an op's table: which calls of which kernel share their launch constants."""

    op: str
    kernel: str
    kind: str  # of number: bytes per element, or how products are formed
    size: int  # up to which
    more: str = ""

    def __str__(self) -> str:
        return " ".join(str(part) for part in self if part != "")


_trial: dict[str, Constants] = {}  # what `tune` tries out: before all else
_asked: dict[str, Constants] | None = None  # while recording: every row asked for, with the checked-in constants
_forget: list[Callable[[], None]] = []


def cached(function: Callable) -> Callable:
    """functools.lru_cache for what depends on tuned constants: forgotten where others are tried."""
    wrapped = functools.lru_cache(maxsize=4096)(function)
    _forget.append(wrapped.cache_clear)
    return wrapped


def forget() -> None:
    """Empties every cache of what depends on tuned constants; files are read anew."""
    for clear in _forget:
        clear()


def choose(row: Row, device: int | None, checked_in: Constants) -> Constants:
    """The constants of a row on a device (None: interpreted, or compiled for another): as tuned, else as checked in."""
    name = str(row)
    if _asked is not None:
        _asked[name] = dict(checked_in)
    found = _trial.get(name)
    if found is None and device is not None:
        found = rows_of(device).get(name)
    return found if found is not None and found.keys() == checked_in.keys() else checked_in


@contextlib.contextmanager
def trying(constants: dict[str, Constants]) -> Iterator[None]:
    """In the block rows have these constants; others keep theirs."""
    _trial.update(constants)
    forget()
    try:
        yield
    finally:
        for name in constants:
            del _trial[name]
        forget()


@contextlib.contextmanager
def recording() -> Iterator[dict[str, Constants]]:
    """Gives the rows that calls in the block ask for, with their checked-in constants."""
    global _asked
    forget()
    _asked = {}
    try:
        yield _asked
    finally:
        _asked = None


def folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification has a relative path ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "bigmodel_kernels"


def source_hash() -> str:
    """Of all that decides how a kernel runs: Triton sources of the ops, and what they share."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    sources = {here / "_triton.py", *here.glob("ops/*/triton*.py")} - {*here.glob("ops/*/triton_tuning.py")}
    for path in sorted(sources):
        digest.update(str(path.relative_to(here)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def driver_version() -> str:
    try:
        found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", DRIVER_VERSION.read_text())
    except OSError:
        found = None
    if found:
        return found[1]
    number = ctypes.c_int()  # a container without that file
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    return f"for CUDA {number.value}"


def key(device: int) -> dict[str, Any]:
    """What a file of tuned constants was measured with."""
    import triton

    properties = torch.cuda.get_device_properties(device)
    return {
        "format": FORMAT,
        "kernels": source_hash(),
        "triton": triton.__version__,
        "driver": driver_version(),
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
    }


def path_of(key: dict[str, Any]) -> Path:
    of_gpu = "gpu" in key
    name = re.sub(r"[^A-Za-z0-9]+", "-", key["gpu" if of_gpu else "cpu"]).strip("-")
    return folder() / (f"triton-{name}-{key['capability']}.json" if of_gpu else f"cpu-{name}.json")


@cached
def rows_of(device: int) -> dict[str, Constants]:
    """The tuned rows of a device; none where there is no file. A file that does not count is ignored, with one warning."""
    expected = key(device)
    return {name: entry["constants"] for name, entry in load(expected).items()}


def load(expected: dict[str, Any]) -> dict[str, dict]:
    """{row: entry} of the file for this key."""
    path = path_of(expected)
    try:
        text = _read(path)
        return {} if text is None else _rows(text, expected)
    except (OSError, ValueError) as error:
        warnings.warn(
            f"{path} is ignored, and the checked-in configurations are used: {error}. "
            f"To measure anew: python -m bigmodel_kernels tune{'' if 'gpu' in expected else ' --cpu'}",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}


def _read(path: Path) -> str | None:
    """The text of a file that only its owner, who runs this process, can have written; None where there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    with open(descriptor, encoding="utf-8") as file:
        found = os.fstat(file.fileno())
        _check_owner(found, "it")
        _check_owner(os.stat(path.parent), "its directory")
        if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST_FILE:
            raise ValueError(f"it is no regular file of up to {LARGEST_FILE} bytes")
        return file.read()


def _check_owner(found: os.stat_result, what: str) -> None:
    if found.st_uid != os.getuid():
        raise PermissionError(f"{what} belongs to user {found.st_uid}, not to {os.getuid()}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"others may write to {what} (mode {stat.S_IMODE(found.st_mode):04o})")


def _rows(text: str, expected: dict[str, Any]) -> dict[str, dict]:
    try:
        content = json.loads(text)
        rows = content["rows"]
        constants = [value for entry in rows.values() for value in entry["constants"].values()]
        found = dict(content["key"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it is corrupt ({type(error).__name__}: {error})") from error
    different = [
        f"{name} {found.get(name)!r}, now {value!r}" for name, value in expected.items() if found.get(name) != value
    ]
    if different:
        raise ValueError(f"it was measured with {'; '.join(different)}")
    if not all(type(value) is int and 0 <= value <= LARGEST_CONSTANT for value in constants):
        raise ValueError("it is corrupt (a constant is out of range)")
    return rows


def save(measured_with: dict[str, Any], rows: dict[str, dict]) -> Path:
    """Adds rows to the file of this key, replacing it as a whole: a reader sees the old one or the new one, never a part.

    Another process that saves at the same time waits its turn, so that none of the rows of either are lost.
    """
    path = path_of(measured_with)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.chmod(path.parent, 0o700)
    with open(path.parent / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            text = _read(path)
            before = {} if text is None else _rows(text, measured_with)
        except (OSError, ValueError):
            before = {}  # of another driver, another version, ..: replaced
        content = json.dumps({"key": measured_with, "rows": before | rows}, indent=1)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # of mode 0600
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(content + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    return path
