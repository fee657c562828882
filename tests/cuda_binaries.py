"""Compiles csrc/cuda/*.cu with nvcc for a GPU that need not be there, and reads what came of it."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils import cpp_extension

from tests.emulator.emulator import included

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc" / "cuda"


@functools.cache
def build_script():
    """setup.py as a module: what it compiles with, and where the toolkit is."""
    spec = importlib.util.spec_from_file_location("bigmodel_kernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Kernel:
    """One kernel of a cubin. `loops` is the SASS of its loops, innermost or not, each instruction once."""

    name: str  # "lstm_forward<bf16, 0, 8>"
    registers: int
    spilled: int  # instructions that go to local memory
    spilled_in_loops: int
    instructions: frozenset[str] = field(repr=False)  # the first words: "HMMA", "LDG"
    shared: int = 0  # static bytes, those that every block has on sm_90 not counted


def cubin(source: Path, architecture: str) -> Path:
    """The compiled source; compiled once for the same headers, flags and compiler."""
    home = build_script().cuda_home()
    flags = [*build_script().NVCC_FLAGS, *cpp_extension.COMMON_NVCC_FLAGS, f"-arch={architecture}"]
    flags += [f"-DTORCH_TARGET_VERSION={build_script().TARGET}", *(f"-I{p}" for p in cpp_extension.include_paths())]
    parts = [torch.__version__, build_script().cuda_version(home), *flags]
    digest = hashlib.sha256(
        "\0".join([*parts, *(p.read_text() for p in sorted(included(source, set())))]).encode()
    ).hexdigest()
    out = Path(tempfile.gettempdir(), f"bigmodel-cubins-{digest[:20]}-{source.stem}.{architecture}")
    if not out.exists():
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder, "out.cubin")
            command = [home / "bin" / "nvcc", "-cubin", *flags, source, "-o", made]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-4000:]
            made.rename(out) if made.stat().st_dev == out.parent.stat().st_dev else out.write_bytes(made.read_bytes())
    return out


def kernels(path: Path, tool) -> list[Kernel]:
    """The kernels of a cubin; `tool(name, *args)` runs cuobjdump or nvdisasm."""
    usage = tool("cuobjdump", "--dump-resource-usage", str(path))
    used = {m[1]: m for m in re.finditer(r"Function (\w+):\s*\n\s*REG:(\d+).* SHARED:(\d+)", usage)}
    reserved = 1024 if "sm_9" in path.suffix else 0
    found = []
    for part in tool("nvdisasm", "-c", "-ndf", str(path)).split("\n.text.")[1:]:
        mangled, _, code = part.partition(":")
        lines = code.splitlines()
        looped = _lines_in_loops(lines)
        words = [m[1] if (m := re.search(r"\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", line)) else "" for line in lines]
        spilled = [i for i, word in enumerate(words) if word.split(".")[0] in ("LDL", "STL")]
        found.append(
            Kernel(
                readable(mangled),
                int(used[mangled][2]),
                len(spilled),
                sum(i in looped for i in spilled),
                frozenset(word.split(".")[0] for word in words),
                int(used[mangled][3]) - reserved,
            )
        )
    return found


def _lines_in_loops(lines: list[str]) -> set[int]:
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_x_\d+):", line))}
    inside: set[int] = set()
    for i, line in enumerate(lines):
        target = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        start = labels.get(target[1], i) if target else i
        if start < i and not all("BRA" in x or not x.strip() for x in lines[start + 1 : i]):  # not the trap at the end
            inside.update(range(start, i))
    return inside


def readable(mangled: str) -> str:
    """_ZN3bmk12lstm_forwardI13__nv_bfloat16LNS_5ScopeE0ELi8EEEv.. -> lstm_forward<bf16, 0, 8>"""
    match = re.match(r"_ZN3bmk\d+(\w+?)(?:I(\w+?)EEv|E)", mangled)
    name, arguments = match[1], match[2] or ""
    kinds = {
        "13__nv_bfloat16": "bf16",
        "6__half": "half",
        "f": "float",
        "a": "int8",
        "14__nv_fp8_e4m3": "fp8",
        "NS_4Tf32E": "tf32",
    }
    pattern = "|".join([*map(re.escape, kinds), r"L(?:NS_\d+[A-Za-z]+E|[a-z])n?\d+E?"])
    words = [kinds.get(word) or re.search(r"\d+(?=E?$)", word)[0] for word in re.findall(pattern, arguments)]
    return f"{name}<{', '.join(words)}>" if words else name
