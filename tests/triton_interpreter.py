"""Runs functions in a process whose Triton interprets its kernels.

TRITON_INTERPRET counts when triton is first imported and then holds for the whole process, so tests of interpreted kernels
share one child process per test worker, and their own process keeps a Triton that compiles.
"""

import atexit
import functools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import torch


@functools.cache
def _child() -> ProcessPoolExecutor:
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        executor = ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        )
        executor.submit(os.getpid).result()  # started while the variable is set
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
    atexit.register(executor.shutdown)
    return executor


def interpreted(function, *args, **kwargs):
    """function(*args, **kwargs), a function of an importable module, in the child; exceptions come back as they were."""
    return _child().submit(function, *args, **kwargs).result()
