"""Builds the two binaries of bigmodel_kernels.

`_native.so`  every native op, on the LibTorch stable ABI: no Python in it, one file serves torch 2.10 and later.
`_C`          pybind11: build information and host-side geometry. Left out where Python's headers are not installed.

CUDA kernels are compiled by nvcc, against a CPU or a CUDA build of torch alike, where a GPU is visible or one is asked for:
CPU_ONLY=1 leaves them out, FORCE_CUDA=1 raises if they cannot be built, TORCH_CUDA_ARCH_LIST and MAX_JOBS are respected.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

try:
    import pybind11
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    sys.exit(
        f"bigmodel_kernels is built against the torch you run it with, and {error.name} is not installed here.\n"
        "Install it first, then build without isolation:\n"
        "    pip install -r requirements.txt\n    pip install --no-build-isolation ."
    )
from setuptools import Extension, find_packages, setup

TARGET = "0x020a000000000000"  # LibTorch stable ABI of torch 2.10
DEBUG = os.environ.get("DEBUG") == "1"
SANITIZE = os.environ.get("SANITIZE", "")  # for example "address,undefined"; `make sanitize` uses it
# "generic" or "avx512": kernels of that set alone, for a quick build that checks them.
ONE_ISA = os.environ.get("ONE_ISA", "")
CUDA_ARCHS = "8.0+PTX;9.0a"  # unless TORCH_CUDA_ARCH_LIST says otherwise
# Started first, so that no core waits for the last one.
LONGEST_TO_COMPILE = (
    "lstm.cu",
    "attention_decode.cu",
    "conv.cpp",
    "lstm.cpp",
    "conv_backward.cpp",
    "attention.cpp",
    "gated_conv.cpp",
)
NVCC_FLAGS = ["-O3", "-std=c++20", "-Xcompiler=-fvisibility=hidden", "-Xfatbin=-compress-all"]


def cuda_home() -> Path | None:
    """The CUDA toolkit: a folder that holds nvcc and the runtime's headers."""
    nvcc = shutil.which("nvcc")
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    found = [nvcc and str(Path(nvcc).resolve().parents[1]), "/usr/local/cuda"]
    for folder in map(Path, filter(None, named if any(named) else found)):
        if (folder / "bin" / "nvcc").is_file() and (folder / "include" / "cuda_runtime.h").is_file():
            return folder
    return None


def cuda_version(home: Path) -> str:
    said = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", said)[1]


def static_runtime(home: Path) -> Path | None:
    """The folder of libcudart_static.a: linked in, so that the binary also loads where there is no CUDA at all."""
    places = (home / "lib64", home / "targets" / f"{platform.machine()}-linux" / "lib", home / "lib")
    return next((p for p in places if (p / "libcudart_static.a").is_file()), None)


def why_no_cuda(home: Path | None) -> str | None:
    """The reason CUDA kernels cannot be built here, naming what mends it; None where they can."""
    if os.environ.get("CPU_ONLY") == "1":
        return "CPU_ONLY=1 is set"
    if not glob("csrc/cuda/*.cu"):
        return "this version has no CUDA kernels"
    if home is None:
        return (
            "nvcc and cuda_runtime.h were not found under CUDA_HOME, beside the nvcc on PATH or in /usr/local/cuda: "
            f"install the CUDA toolkit {torch.version.cuda or '13.0'} or set CUDA_HOME"
        )
    if static_runtime(home) is None:
        return f"libcudart_static.a was not found under {home}: install the development files of the CUDA runtime"
    if torch.version.cuda and cuda_version(home).split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {cuda_version(home)}, torch of {torch.version.cuda}: install that toolkit and set CUDA_HOME"
    asked = os.environ.get("FORCE_CUDA") == "1" or os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not (torch.cuda.is_available() or asked):
        return "no GPU is visible: set FORCE_CUDA=1 or TORCH_CUDA_ARCH_LIST to build for one (in a clone: make cuda)"
    return None


def compiler_version() -> str:
    compiler = os.environ.get("CXX", "g++")
    try:
        first_line = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, check=True
        ).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError):
        sys.exit(
            f"No working C++ compiler: {compiler} could not be run. Install one (Debian: apt-get install g++) or set CXX."
        )
    return f"{compiler}: {first_line}"


def extensions() -> list[Extension]:
    headers = glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True)
    home = cuda_home()
    no_cuda = why_no_cuda(home)
    if no_cuda and os.environ.get("FORCE_CUDA") == "1":
        sys.exit(f"FORCE_CUDA=1, but CUDA kernels cannot be built: {no_cuda}")
    cxx = [
        "-std=c++20",
        "-O0" if DEBUG else "-O1" if SANITIZE else "-O3",
        "-fvisibility=hidden",
        "-Wall",
        "-Wno-psabi",
    ]
    # Contraction to fused multiply-add is wanted; NaN and infinity keep their meaning (no -ffast-math).
    cxx += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
    # Lines of the source cost a twentieth of the build; names of functions, for profilers, are there without them.
    # Python's own flags may hold a -g.
    cxx += ["-g"] if DEBUG else ["-g1"] if SANITIZE else ["-g0"]
    nvcc = [*NVCC_FLAGS, *(["-lineinfo"] if DEBUG else [])]
    link = []
    if SANITIZE:
        # -O1 leaves out what forms fused multiply-adds, and results are to be those of the real build.
        # Python's own flags may hold -fwrapv, under which no overflow is a mistake; object-size is what address sees better.
        cxx += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-sanitize=object-size", "-fno-wrapv"]
        cxx += ["-fexpensive-optimizations", "-fno-omit-frame-pointer"]
        link += [f"-fsanitize={SANITIZE}"]
    one_isa = [(f"ONE_ISA_{ONE_ISA.upper()}", None)] if ONE_ISA else []
    sources, cuda = sorted(glob("csrc/cpu/*.cpp")), {}
    if not no_cuda:
        cpp_extension.CUDA_HOME = str(home)  # which a CPU build of torch leaves unset
        os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHS
        sources += sorted(glob("csrc/cuda/*.cu"))
        cuda = {"libraries": ["cudart_static", "rt", "dl", "pthread"], "library_dirs": [str(static_runtime(home))]}
    native = cpp_extension.CppExtension(
        "bigmodel_kernels._native",
        sources,
        depends=[*headers, "setup.py"],
        define_macros=[("TORCH_TARGET_VERSION", TARGET), *one_isa],
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=link,
        py_limited_api=True,
        **cuda,
    )
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        print(
            "warning: Python.h was not found, so the module _C is left out (Debian: apt-get install python3-dev)",
            file=sys.stderr,
        )
        return [native]
    info = {
        "BUILD_COMPILER": compiler_version(),
        "BUILD_CUDA": f"none: {no_cuda}" if no_cuda else cuda_version(home),
        "BUILD_CUDA_ARCHS": "" if no_cuda else os.environ["TORCH_CUDA_ARCH_LIST"],
        "BUILD_TORCH": torch.__version__,
    }
    bindings = Extension(
        "bigmodel_kernels._C",
        ["csrc/bindings.cpp", "csrc/cpu/isa.cpp", "csrc/cpu/tile_unit.cpp"],
        depends=headers,
        include_dirs=[pybind11.get_include()],
        define_macros=[(name, f'"{value}"') for name, value in info.items()],
        extra_compile_args=["-std=c++20", "-O1", "-fvisibility=hidden"],
        language="c++",
    )
    return [native, bindings]


class BuildExtension(cpp_extension.BuildExtension):
    """`_native` carries no Python ABI tag: it is the same file for every Python."""

    def get_ext_filename(self, ext_name: str) -> str:
        if ext_name.rpartition(".")[2] == "_native":
            return os.path.join(*ext_name.split(".")) + ".so"
        return super().get_ext_filename(ext_name)

    def build_extension(self, ext: Extension) -> None:
        """setuptools sorts the sources by name, and ninja starts them in the order it is given."""
        compile_all = self.compiler.compile

        def longest_first(sources, *args, **kwargs):
            rank = {name: place for place, name in enumerate(LONGEST_TO_COMPILE)}
            return compile_all(sorted(sources, key=lambda s: rank.get(Path(s).name, len(rank))), *args, **kwargs)

        self.compiler.compile = longest_first
        try:
            super().build_extension(ext)
        finally:
            self.compiler.compile = compile_all


if __name__ == "__main__":
    if platform.system() != "Linux":
        sys.exit(f"bigmodel_kernels builds on Linux with g++; this is {platform.system()}.")
    compiler_version()

    setup(
        packages=find_packages(include=["bigmodel_kernels*"]) + find_packages("python"),
        package_dir={"bigmodel_models": "python/bigmodel_models"},
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildExtension},
    )
