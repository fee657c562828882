"""The tile unit of csrc/cpu/tile_unit.h, by a program without PyTorch: in software, and the processor's where it has one."""

import subprocess
from pathlib import Path

import pytest

from bigmodel_kernels import build_info
from tests.emulator.emulator import needs_compiler

ROOT = Path(__file__).parents[1]
FLAGS = ["-std=c++20", "-O1", "-Wno-psabi", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-pthread"]
SOURCES = ["tests/native/tile_unit_program.cpp", "csrc/cpu/tile_unit.cpp", "csrc/cpu/isa.cpp"]


@needs_compiler
def test_units_agree_and_bad_shapes_fault(tmp_path):
    isa = build_info().get("isa", "")
    if not isa.startswith(("avx512", "amx")):
        pytest.skip(f"the kernels that use tiles need AVX-512; this CPU has {isa}")
    program = tmp_path / "tile_unit_program"
    includes = [f"-I{ROOT / folder}" for folder in ("tests/native/stub", "csrc")]
    command = ["g++", *FLAGS, "-DONE_ISA_AVX512", *includes, *(str(ROOT / s) for s in SOURCES), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.stdout.endswith("PASS\n"), done.stdout
    assert done.returncode == 0
