"""Every kernel of csrc/cuda, compiled for sm_80 and sm_90a: registers, spills and the instructions that are meant."""

import functools
import re
from fnmatch import fnmatch

import pytest
from torch.utils import cpp_extension

from bigmodel_kernels import _gpu
from bigmodel_kernels.ops.conv import cuda as conv
from bigmodel_kernels.ops.conv_step import cuda as conv_step
from bigmodel_kernels.ops.lstm import cuda_plan as lstm
from tests.cuda_binaries import SOURCES, build_script, cubin, kernels
from tests.emulator.shared_sizes import decode_shared_bytes

ARCHITECTURES = ["sm_80", "sm_90a"]
# Kernel (as a pattern), most registers of a thread, instructions that must be there.
# Scopes 0 to 3: block, cluster, grid, streamed.
BUDGET = [
    ("lstm_cell_forward<*>", 40, ()),
    ("lstm_cell_backward<*>", 40, ()),
    ("lstm_*ward_stream<*>", 64, ("LDG", "STG")),
    ("lstm_forward<float, 0, *>", 168, ("FFMA", "LDS")),
    ("lstm_forward<float, *>", 255, ("FFMA", "LDS")),
    ("lstm_forward<tf32, *>", 255, ("HMMA", "LDS")),
    ("lstm_forward<*, 0, *>", 128, ("HMMA", "LDS")),  # 512 threads
    ("lstm_forward<*>", 255, ("HMMA", "LDS")),
    ("lstm_backward<float, *>", 255, ("FFMA", "LDS")),
    ("lstm_backward<tf32, *>", 255, ("HMMA", "LDS")),
    ("lstm_backward<*, 0, 8>", 192, ("HMMA", "LDS")),
    ("lstm_backward<*>", 255, ("HMMA", "LDS")),
    ("attention_decode<*, 0, 64>", 128, ("HMMA", "LDSM", "LDGSTS")),
    ("attention_decode<*, 0, 128>", 170, ("HMMA", "LDSM", "LDGSTS")),  # 3 blocks of 128 threads to a multiprocessor
    ("attention_decode<*, 64>", 128, ("HMMA", "LDS", "LDGSTS")),  # caches of 8 bits
    ("attention_decode<*, 128>", 170, ("HMMA", "LDS", "LDGSTS")),
    ("depthwise_weights<*, 8, 1>", 168, ("LDG", "STG")),  # 3 blocks of 128 threads to a multiprocessor
    ("depthwise_weights<*>", 100, ("LDG", "STG")),
    ("depthwise_forward<*, 0>", 72, ("LDG", "STG")),
    ("depthwise_forward<*, 3>", 128, ("LDG", "STG")),  # 4 blocks of 128 threads to a multiprocessor
    ("depthwise_forward<*>", 168, ("LDG", "STG")),
    ("conv_stem<float, *>", 128, ("FFMA", "LDS")),  # 2 blocks of 256 threads to a multiprocessor, as the next three
    ("conv_stem<*>", 128, ("HMMA", "LDS")),
    ("conv_stem_weights<float, *>", 128, ("FFMA", "LDS")),
    ("conv_stem_weights<*>", 128, ("HMMA", "LDS")),
    ("conv_stem_input<*>", 64, ("LDG", "STG")),
    ("conv_spread<*>", 64, ("LDG", "STG")),
    ("conv_step<*>", 128, ("FFMA", "LDG", "LDS", "ATOMG")),  # 512 threads
]
CLUSTER = ("lstm_*ward<*, 1, *>",)  # only a trap where there are no clusters
GPUS = {"sm_80": _gpu.A100, "sm_90a": _gpu.H100}
STEMS = [  # weight, stride, dilation, window of the pool: those whose tiles are the largest
    ((64, 3, 7, 7), [2, 2], [1, 1], [3, 3, 2, 2, 1, 1]),
    ((16, 3, 5, 5), [1, 1], [1, 1], [2, 2, 2, 2, 0, 0]),
    ((64, 512, 1, 1), [1, 1], [1, 1], [1, 1, 1, 1, 0, 0]),
    ((64, 10, 7, 7), [4, 4], [2, 2], [1, 1, 1, 1, 0, 0]),
    ((64, 56, 9), [3], [5], [1, 1, 1, 1, 0, 0]),
]
OUTSIDE_LOOPS = 8  # instructions: what the message before a trap puts on the stack, and a spill at the start


@functools.cache
def dynamic_shared(name: str, gpu: _gpu.Gpu) -> int:
    """The most dynamic shared memory that a launch of this kernel asks for, by the functions of its launcher (which
    tests/emulator/test_launch_sizes.py compares with those in C++); 0 where it has none."""
    family, _, arguments = name.rstrip(">").partition("<")
    size = 4 if arguments.startswith(("float", "tf32")) else 2
    if family == "attention_decode":
        _, cache, head_dim = arguments.split(", ")
        return decode_shared_bytes(2 if cache == "0" else 1, int(head_dim))
    if family in ("lstm_forward", "lstm_backward"):
        kernel = (lstm.FORWARD if family == "lstm_forward" else lstm.BACKWARD)[size]
        plans = [(hidden, lstm.plan(kernel, hidden, both, gpu)) for hidden in range(1, 3000) for both in (1, 2)]
        return max(kernel.shared_bytes(h, p.registers, p.warps, p.scope == "streamed") for h, p in plans if p)
    if family == "conv_step":
        shapes = [
            (batch, c, 2 * c, taps, 1, True, 2 * c) for batch in (1, 9) for c in (64, 512, 4096) for taps in (2, 8)
        ]
        blocks = [(shape, conv_step.block_of(*shape, size, gpu.shared_bytes)) for shape in shapes]
        return max(conv_step.shared_bytes(s[2], s[1], *s[3:6], *block, size) for s, block in blocks if block)
    geometries = [stem[:3] for stem in STEMS]
    if family == "conv_stem_weights":
        tiles = [conv.stem_gradient_tile(*geometry, size, gpu.shared_bytes) for geometry in geometries]
        sizes = [conv.stem_gradient_shared_bytes(*g, size, tile) for g, tile in zip(geometries, tiles) if tile]
        return max(sizes)
    if family == "conv_stem":
        save = arguments.endswith("1")
        tiles = [conv.stem_tile(*stem, size, save, gpu.shared_bytes) for stem in STEMS]
        return max(conv.stem_shared_bytes(*stem, size, save, tile) for stem, tile in zip(STEMS, tiles) if tile)
    return 0


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
    shared = kernel.shared + dynamic_shared(kernel.name, GPUS[architecture])
    if shared > GPUS[architecture].shared_bytes:
        problems.append(f"{shared} bytes of shared memory, a block can have {GPUS[architecture].shared_bytes}")
    if missing := [word for word in needed if word not in kernel.instructions]:
        problems.append(f"no {', '.join(missing)}")
    return [f"{kernel.name} on {architecture}: {problem}" for problem in problems]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_measurement_of_synchronisation_compiles(architecture):
    needs_nvcc()
    assert cubin(SOURCES.parents[1] / "benchmarks" / "gpu_sync.cu", architecture).stat().st_size


@pytest.mark.parametrize("asked", [None, "8.9", "8.0;9.0a+PTX"])
def test_architectures_are_those_asked_for(asked, monkeypatch):
    needs_nvcc()
    script = build_script()
    monkeypatch.chdir(SOURCES.parents[1])
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", cpp_extension.CUDA_HOME)
    monkeypatch.delenv("CPU_ONLY", raising=False)
    monkeypatch.setenv("FORCE_CUDA", "1")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked or "")
    native = script.extensions()[0]
    assert sum(source.endswith(".cu") for source in native.sources) == len(list(SOURCES.glob("*.cu")))
    flags = cpp_extension._get_cuda_arch_flags()
    wanted = re.findall(r"(\d+)\.(\d+a?)", asked or script.CUDA_ARCHS)
    assert {f for f in flags if "code=sm" in f} == {f"-gencode=arch=compute_{a}{b},code=sm_{a}{b}" for a, b in wanted}
    assert any("code=compute" in f for f in flags) == ("PTX" in (asked or script.CUDA_ARCHS))


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
    for change in (
        {"registers": 129},
        {"shared": 160 << 10},
        {"spilled": 9},
        {"spilled_in_loops": 1},
        {"instructions": frozenset({"HMMA"})},
    ):
        assert within(Kernel(**{**vars(good), **change}), "sm_80")
    assert within(Kernel(**{**vars(good), "name": "unknown"}), "sm_80")


def test_no_assembly_outside_ptx():
    for path in [*SOURCES.glob("*.cu"), *SOURCES.glob("*.cuh")]:
        assert path.name.startswith("ptx") or not re.search(r"\basm\b\s*(volatile)?\s*\(", path.read_text()), path
