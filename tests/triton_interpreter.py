"""Runs functions in a process whose Triton interprets its kernels.

TRITON_INTERPRET counts when triton is first imported and then holds for the whole process, so tests of interpreted kernels
share one child process per test worker, and their own process keeps a Triton that compiles.
"""

import atexit
import functools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import ClassVar

import torch
from triton import language
from triton.language import semantic
from triton.runtime import interpreter


class _Patched:
    """What the interpreter puts in place of triton.language while a kernel runs: once per module, not per function call."""

    _patch = staticmethod(interpreter._patch_lang)
    _scopes: ClassVar[dict] = {}

    @classmethod
    def enter(cls, function):
        if function.__module__ not in cls._scopes:
            cls._scopes[function.__module__] = cls._patch(function)
            # Triton 3.6 makes numbers of arrays of one element by int(array), which NumPy 2.4 refuses.
            language.tensor.__index__ = lambda self: self.handle.data.item()
        return cls

    @classmethod
    def restore(cls):
        while cls._scopes:
            cls._scopes.popitem()[1].restore()


def _remember_types() -> None:
    """What the interpreter derives anew from the type of every value it makes, two thirds of its time, is derived once."""
    numpy_dtype, broadcast = interpreter._get_np_dtype, semantic.TritonSemantic.broadcast_impl_value
    new_type, new_tensor = language.block_type.__init__, language.tensor.__init__
    dtypes, types, tensors = {}, {}, {}

    def get_numpy_dtype(kind):
        name = kind.scalar.name
        if name not in dtypes:
            dtypes[name] = numpy_dtype(kind)
        return dtypes[name]

    def broadcast_where_needed(self, a, b):
        needed = not (a.type.is_block() and b.type.is_block()) or a.handle.data.shape != b.handle.data.shape
        return broadcast(self, a, b) if needed else (a, b)

    def type_init(self, element_ty, shape):
        key = (element_ty.name, *(getattr(n, "value", n) for n in shape))
        if key not in types:
            new_type(self, element_ty, shape)
            types[key] = vars(self).copy()
        vars(self).update(types[key])

    def tensor_init(self, handle, type):
        if type.name not in tensors:
            new_tensor(self, handle, type)
            tensors[type.name] = {key: value for key, value in vars(self).items() if key not in ("handle", "type")}
        vars(self).update(tensors[type.name], handle=handle, type=type)

    interpreter._get_np_dtype, semantic.TritonSemantic.broadcast_impl_value = get_numpy_dtype, broadcast_where_needed
    language.block_type.__init__, language.tensor.__init__ = type_init, tensor_init


def _start() -> None:
    torch.set_num_threads(1)
    interpreter._patch_lang = _Patched.enter
    _remember_types()


@functools.cache
def _child() -> ProcessPoolExecutor:
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        executor = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start)
        executor.submit(os.getpid).result()  # started while the variable is set
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
    atexit.register(executor.shutdown)
    return executor


def _seeded(function, args, kwargs):
    torch.manual_seed(0)  # as conftest.py does for each test in its own process
    return function(*args, **kwargs)


def interpreted(function, *args, **kwargs):
    """function(*args, **kwargs), a function of an importable module, in the child; exceptions come back as they were."""
    return _child().submit(_seeded, function, args, kwargs).result()
