"""Backends: their names, what each op has, and which one a call gets.

A backend of the op `foo` is the module `bigmodel_kernels.ops.foo.<file>`, imported on first use, with
    supports(*args) -> str | None    the reason it cannot take these arguments, None where it can
    fwd(*args), bwd(*args)           the op's forward and backward; same arguments and results on every backend
    infer(*args)                     optional: the results of fwd alone, without what is saved for a backward
`cuda` modules also name a NATIVE_OP: where the binary has it for CUDA, it has all that the module calls.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from bigmodel_kernels import _extension

FILES = {"cpu": "cpu", "cuda": "cuda", "triton": "triton_kernels", "torch": "torch_op"}
BACKENDS = tuple(FILES)

_log = logging.getLogger("bigmodel_kernels")


def _environment_backend() -> str:
    """The whole of the environment's say: BIGMODEL_DISABLE=1, BIGMODEL_BACKEND=<name>, BIGMODEL_LOG=1."""
    if os.environ.get("BIGMODEL_LOG") == "1":
        _log.setLevel(logging.INFO)
        _log.addHandler(logging.StreamHandler())
    if os.environ.get("BIGMODEL_DISABLE") == "1":
        return "torch"
    return check_name(os.environ.get("BIGMODEL_BACKEND", "auto"), "BIGMODEL_BACKEND")


def check_name(name: str, argument: str = "backend") -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{argument} must be one of auto, {', '.join(BACKENDS)}; got {name!r}")
    return name


_environment = _environment_backend()
_wanted: ContextVar[str | None] = ContextVar("bigmodel_kernels_backend", default=None)
_listener: ContextVar[Callable[..., None] | None] = ContextVar("bigmodel_kernels_listener", default=None)
_logged: set[tuple] = set()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every op of the block whose own `backend` is "auto" on the backend `name` (or "auto").

    An explicit name never falls back: a call that the backend cannot take raises, with every reason.
    """
    token = _wanted.set(check_name(name, "name"))
    try:
        yield
    finally:
        _wanted.reset(token)


def availability(op: str, backend: str) -> str | None:
    """Why `backend` has no kernel of `op` on this machine, whatever the arguments; None where it has."""
    # With a GPU nobody looks at the variable, which takes longer to read than all the rest.
    interpreted = backend == "triton" and not _has_gpu() and os.environ.get("TRITON_INTERPRET") == "1"
    return _availability(op, backend, interpreted)


@functools.cache
def _has_gpu() -> bool:
    return torch.cuda.is_available()


@functools.cache
def _availability(op: str, backend: str, interpreted: bool) -> str | None:
    if importlib.util.find_spec(f"bigmodel_kernels.ops.{op}.{FILES[backend]}") is None:
        return f"this version has no {backend} kernel of {op}"
    if backend == "cpu" and not _extension.has_kernel(f"{op}_fwd", "CPU"):
        return _extension.native_error or f"the binary was built without the cpu kernel of {op}"
    if backend == "cuda" and not _extension.has_kernel(module(op, backend).NATIVE_OP, "CUDA"):
        return (
            _extension.native_error or f"the binary was built without the cuda kernel of {op}; {_extension.CUDA_REMEDY}"
        )
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if backend in ("cuda", "triton") and not (_has_gpu() or interpreted):
        return "no GPU was found" + (
            " (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)" if backend == "triton" else ""
        )
    return None


@functools.cache
def module(op: str, backend: str) -> ModuleType:
    return importlib.import_module(f"bigmodel_kernels.ops.{op}.{FILES[backend]}")


def reason(op: str, backend: str, args: tuple) -> str | None:
    """Why `backend` cannot run this call; None where it can."""
    return availability(op, backend) or module(op, backend).supports(*args)


def require(op: str, backend: str, args: tuple) -> None:
    """Raises RuntimeError with every backend's reason unless `backend` can run this call: NotImplementedError, which is one,
    where it has no kernel of the op on this machine at all."""
    if (why := reason(op, backend, args)) is not None:
        others = "".join(f"\n  {name}: {reason(op, name, args) or 'ok'}" for name in BACKENDS if name != backend)
        error = RuntimeError if availability(op, backend) is None else NotImplementedError
        raise error(f"{op}: backend {backend!r} cannot run this call: {why}. The others:{others}")


def wanted(backend: str) -> str:
    """The backend a call asks for, itself or by use_backend or the environment; "auto" where nobody asks for one."""
    return (_wanted.get() or _environment) if backend == "auto" else check_name(backend)


def is_free(backend: str) -> bool:
    """Whether a call is free to go the fastest way: nobody asks for a backend, and nobody wants to be told of the choice."""
    return (
        backend == "auto"
        and (_wanted.get() or _environment) == "auto"
        and _listener.get() is None
        and not _log.isEnabledFor(logging.INFO)
    )


@contextlib.contextmanager
def listening(listener: Callable[..., None]) -> Iterator[None]:
    """Tells `listener(op, chosen, prefer, args)` of every choice in the block."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def select(op: str, backend: str, prefer: Callable[..., tuple[str, ...]], args: tuple) -> str:
    """The backend that runs this call: the one asked for, or for "auto" the first that can, in the op's own order.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend asked for cannot take the call; the message gives every backend's reason.
    """
    backend = wanted(backend)
    if backend == "auto":
        for chosen in prefer(*args):
            if chosen == "torch" or reason(op, chosen, args) is None:
                break
        else:
            chosen = "torch"
    else:
        chosen = backend
        require(op, chosen, args)
    if (listener := _listener.get()) is not None:
        listener(op, chosen, prefer, args)
    if _log.isEnabledFor(logging.INFO):
        _log_once(op, chosen, args)
    return chosen


def announce(layer: str, why: str, *args: object) -> None:
    """Tells who listens that PyTorch runs a whole layer in one call of its own, past the ops; `why` is for `explain`."""
    if (listener := _listener.get()) is not None:
        listener(layer, "torch", None, (why,))
    if _log.isEnabledFor(logging.INFO):
        _log_once(layer, "torch", args)


def _log_once(op: str, chosen: str, args: tuple) -> None:
    signature = (op, chosen, *(f"{a.dtype}{list(a.shape)}" for a in args if isinstance(a, torch.Tensor)))
    if signature not in _logged:
        _logged.add(signature)
        _log.info("%s -> %s  %s", op, chosen, " ".join(signature[2:]))


@dataclass(frozen=True)
class Explanation:
    """Which backend a call gets, and for every other one why not. `calls` holds one of these per op where there are several."""

    op: str
    backend: str
    reasons: dict[str, str]
    calls: list[Explanation] = field(default_factory=list)

    def __str__(self) -> str:
        if self.calls:
            return "\n".join(str(call) for call in self.calls)
        return f"{self.op}: {self.backend}\n" + "\n".join(f"  {name:7s} {why}" for name, why in self.reasons.items())


def _explanation(op: str, chosen: str, prefer: Callable[..., tuple[str, ...]] | None, args: tuple) -> Explanation:
    if prefer is None:  # a layer, announced
        return Explanation(op, chosen, {chosen: args[0]})
    order = prefer(*args)
    reasons = {}
    for name in BACKENDS:
        why = reason(op, name, args)
        if name == chosen:
            reasons[name] = "chosen"
        elif why is None and chosen in order and name in order and order.index(name) > order.index(chosen):
            reasons[name] = f"can run this, measured slower than {chosen} for such a call"
        else:
            reasons[name] = why or "can run this, not preferred for such a call"
    return Explanation(op, chosen, reasons)


def explain(function: Callable, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend `function(*args, **kwargs)` gets, and why not each other one.

    Args:
        function: an op (`bmk.attention`, ...), which is not run; or any other callable, such as a layer or a model,
            which is run once, and whose every op call is reported in `calls`.
    """
    if not callable(function):
        raise TypeError(f"function must be an op or another callable, got {type(function).__name__}")
    if hasattr(function, "prepare"):
        kwargs = dict(kwargs)
        backend = kwargs.pop("backend", "auto")
        prepared = function.prepare(*args, **kwargs)
        op = function.op
        return _explanation(op.name, select(op.name, backend, op.prefer, prepared), op.prefer, prepared)
    calls: list[Explanation] = []
    with listening(lambda *choice: calls.append(_explanation(*choice))):
        function(*args, **kwargs)
    names = dict.fromkeys(call.backend for call in calls)
    return Explanation(getattr(function, "__name__", type(function).__name__), "+".join(names) or "none", {}, calls)


def backends(op: str | None = None) -> dict[str, str]:
    """Every backend with "ok" or the reason it has no kernel on this machine (of `op`, or of any op)."""
    from bigmodel_kernels.ops import names

    if op is not None and op not in names():
        raise ValueError(f"op must be one of {', '.join(names())}; got {op!r}")

    def first_reason(backend: str) -> str:
        reasons = [availability(name, backend) for name in ([op] if op else names())]
        return "ok" if None in reasons or not reasons else reasons[0]

    return {backend: first_reason(backend) for backend in BACKENDS}
