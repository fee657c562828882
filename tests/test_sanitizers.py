"""The kernels read and write only what is theirs, and compute nothing that C++ leaves undefined."""

import subprocess
import sys

import pytest

from bigmodel_kernels import build_info
from tests import sanitize

FREED = """
import ctypes, torch
import bigmodel_kernels as bmk
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
memory = libc.malloc(4 * 2048)
q = torch.frombuffer((ctypes.c_float * 2048).from_address(memory), dtype=torch.float32).view(1, 1, 32, 64)
q.fill_(1.0)
bmk.attention(q, q, q, backend="cpu")
libc.free(memory)
print("freed", flush=True)
bmk.attention(q, q, q, backend="cpu")
"""
# Odd sizes, layouts, dtypes and refused arguments of every op, 440 tests in half a minute of one core.
SELECTION = (
    "tests/test_simd.py",
    "tests/ops/test_attention.py",
    "tests/ops/test_conv.py",
    "tests/ops/test_lstm.py",
    "-k",
    "any_layout or other_dtypes or test_layouts or test_seeds or test_expanded or test_lengths or test_chunks"
    " or test_depthwise_integers or (test_simd and not lower_instruction_sets)",
)


@pytest.mark.slow
def test_kernels_are_clean_and_a_mistake_is_seen():
    if sanitize.runtime() is None:
        pytest.skip(f"{sanitize.COMPILER} has no AddressSanitizer here")
    built = sanitize.build("avx512" if build_info().get("isa", "").startswith("avx512") else "generic")
    assert built.returncode == 0, (built.stdout + built.stderr)[-4000:]

    freed = [sys.executable, "-c", FREED]  # which finds a package in its own folder first
    mistake = subprocess.run(
        freed, cwd=sanitize.FOLDER, env=sanitize.environment(), capture_output=True, text=True, check=False
    )
    assert mistake.stdout == "freed\n"
    assert mistake.returncode != 0
    assert "heap-use-after-free" in mistake.stderr

    clean = sanitize.pytest(*SELECTION, capture_output=True, text=True)
    assert clean.returncode == 0, (clean.stdout + clean.stderr)[-4000:]
