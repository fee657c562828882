"""Builds the two binaries of bigmodel_kernels.

`_native.so`  every native op, on the LibTorch stable ABI: no Python in it, one file serves torch 2.10 and later.
`_C`          pybind11: build information and host-side geometry. Left out where Python's headers are not installed.

CPU_ONLY=1 leaves CUDA out, FORCE_CUDA=1 raises if CUDA cannot be built, TORCH_CUDA_ARCH_LIST and MAX_JOBS are respected.
"""

import os
import platform
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
SANITIZE = os.environ.get("SANITIZE", "")  # for example "address,undefined"


def why_no_cuda() -> str | None:
    """The reason CUDA kernels cannot be built here, naming what mends it; None where they can."""
    if os.environ.get("CPU_ONLY") == "1":
        return "CPU_ONLY=1 is set"
    if torch.version.cuda is None:
        return "this torch is a CPU build: install a CUDA build of torch"
    if cpp_extension.CUDA_HOME is None:
        return "nvcc was not found on PATH or under CUDA_HOME: install the CUDA toolkit " + torch.version.cuda
    if not (torch.cuda.is_available() or os.environ.get("FORCE_CUDA") or os.environ.get("TORCH_CUDA_ARCH_LIST")):
        return "no GPU is visible: set FORCE_CUDA=1 or TORCH_CUDA_ARCH_LIST to build for one"
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
    cuda_sources = sorted(glob("csrc/cuda/*.cu"))
    no_cuda = why_no_cuda() if cuda_sources else "this version has no CUDA kernels"
    if no_cuda and os.environ.get("FORCE_CUDA") == "1":
        sys.exit(f"FORCE_CUDA=1, but CUDA kernels cannot be built: {no_cuda}")
    cxx = [
        "-std=c++20",
        "-g1" if not DEBUG else "-g",
        "-O0" if DEBUG else "-O3",
        "-fvisibility=hidden",
        "-Wall",
        "-Wno-psabi",
    ]
    # Contraction to fused multiply-add is wanted; NaN and infinity keep their meaning (no -ffast-math).
    cxx += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
    link = []
    if SANITIZE:
        cxx += [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer"]
        link += [f"-fsanitize={SANITIZE}"]
    make = cpp_extension.CppExtension if no_cuda else cpp_extension.CUDAExtension
    native = make(
        "bigmodel_kernels._native",
        sorted(glob("csrc/cpu/*.cpp")) + ([] if no_cuda else cuda_sources),
        depends=headers,
        define_macros=[("TORCH_TARGET_VERSION", TARGET)] + ([] if no_cuda else [("USE_CUDA", None)]),
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3", "-std=c++20", "-lineinfo"]},
        extra_link_args=link,
        py_limited_api=True,
    )
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        print(
            "warning: Python.h was not found, so the module _C is left out (Debian: apt-get install python3-dev)",
            file=sys.stderr,
        )
        return [native]
    info = {
        "BUILD_COMPILER": compiler_version(),
        "BUILD_CUDA": torch.version.cuda if not no_cuda else f"none: {no_cuda}",
        "BUILD_CUDA_ARCHS": os.environ.get("TORCH_CUDA_ARCH_LIST", ""),
        "BUILD_TORCH": torch.__version__,
    }
    bindings = Extension(
        "bigmodel_kernels._C",
        ["csrc/bindings.cpp", "csrc/cpu/isa.cpp"],
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


if platform.system() != "Linux":
    sys.exit(f"bigmodel_kernels builds on Linux with g++; this is {platform.system()}.")
compiler_version()

setup(
    packages=find_packages(include=["bigmodel_kernels*"]) + find_packages("python"),
    package_dir={"bigmodel_models": "python/bigmodel_models"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
)
