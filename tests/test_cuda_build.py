"""Every kernel of csrc/cuda, compiled for sm_80 and sm_90a: registers, spills and the instructions that are meant."""

import re
from fnmatch import fnmatch

import pytest

from tests.cuda_binaries import SOURCES, build_script, cubin, kernels

ARCHITECTURES = ["sm_80", "sm_90a"]
# Kernel (as a pattern), most registers of a thread, instructions that must be there. Scopes 0, 1, 2: block, cluster, grid.
BUDGET = [
    ("lstm_cell_forward<*>", 40, ()),
    ("lstm_cell_backward<*>", 40, ()),
    ("lstm_forward<float, 0, *>", 168, ("FFMA", "LDS")),
    ("lstm_forward<float, *>", 255, ("FFMA", "LDS")),
    ("lstm_forward<*, 0, *>", 128, ("HMMA", "LDS")),  # 512 threads
    ("lstm_forward<*>", 255, ("HMMA", "LDS")),
    ("lstm_backward<float, *>", 255, ("FFMA", "LDS")),
    ("lstm_backward<*, 0, 8>", 192, ("HMMA", "LDS")),
    ("lstm_backward<*>", 255, ("HMMA", "LDS")),
    ("attention_decode<*, 64>", 128, ("HMMA", "LDSM", "LDGSTS")),
    ("attention_decode<*, 128>", 170, ("HMMA", "LDSM", "LDGSTS")),  # 3 blocks of 128 threads to a multiprocessor
    ("depthwise_forward<*, 0>", 72, ("LDG", "STG")),
    ("depthwise_forward<*, 3>", 128, ("LDG", "STG")),  # 4 blocks of 128 threads to a multiprocessor
    ("depthwise_forward<*>", 168, ("LDG", "STG")),
    ("conv_stem<*>", 128, ("HMMA", "LDS")),  # 2 blocks of 256 threads to a multiprocessor
]
CLUSTER = ("lstm_*ward<*, 1, *>",)  # only a trap where there are no clusters
OUTSIDE_LOOPS = 8  # instructions: what the message before a trap puts on the stack, and a spill at the start


def needs_nvcc():
    if build_script().cuda_home() is None:
        pytest.skip("nvcc is not installed here (CUDA_HOME, PATH, /usr/local/cuda)")
    return pytest.importorskip("tests.triton_aot", reason="cuobjdump and nvdisasm come with Triton").tool


def within(kernel, architecture: str) -> list[str]:
    """What of the budget a kernel breaks."""
    if architecture == "sm_80" and any(fnmatch(kernel.name, pattern) for pattern in CLUSTER):
        return []
    row = next((row for row in BUDGET if fnmatch(kernel.name, row[0])), None)
    if row is None:
        return [f"{kernel.name} has no row in the budget"]
    _, registers, needed = row
    problems = []
    if kernel.registers > registers:
        problems.append(f"{kernel.registers} registers, {registers} are allowed")
    if kernel.spilled_in_loops or kernel.spilled > OUTSIDE_LOOPS:
        problems.append(f"{kernel.spilled} instructions go to local memory, {kernel.spilled_in_loops} in loops")
    if missing := [word for word in needed if word not in kernel.instructions]:
        problems.append(f"no {', '.join(missing)}")
    return [f"{kernel.name} on {architecture}: {problem}" for problem in problems]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", sorted(p.name for p in SOURCES.glob("*.cu")))
def test_within_budget(source, architecture):
    tool = needs_nvcc()
    found = kernels(cubin(SOURCES / source, architecture), tool)
    assert found
    assert not [problem for kernel in found for problem in within(kernel, architecture)]


def test_the_budget_can_be_broken():
    from tests.cuda_binaries import Kernel

    good = Kernel("lstm_forward<bf16, 0, 8>", 128, 0, 0, frozenset({"HMMA", "LDS", "EXIT"}))
    assert within(good, "sm_80") == []
    for change in ({"registers": 129}, {"spilled": 9}, {"spilled_in_loops": 1}, {"instructions": frozenset({"HMMA"})}):
        assert within(Kernel(**{**vars(good), **change}), "sm_80")
    assert within(Kernel(**{**vars(good), "name": "unknown"}), "sm_80")


def test_no_assembly_outside_ptx():
    for path in [*SOURCES.glob("*.cu"), *SOURCES.glob("*.cuh")]:
        assert path.name.startswith("ptx") or not re.search(r"\basm\b\s*(volatile)?\s*\(", path.read_text()), path
