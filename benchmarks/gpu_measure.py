"""python -m benchmarks.gpu_measure [--dry] NAME..: figures of one GPU, a JSON object a line. `all` stands for every name.

Contestants are checked against float64 first, then timed by events on the device, interleaved round by round with the L2 cache
overwritten before each. A ratio is the median over the rounds of the best stock option's time over ours: above 1, ours is faster.
`wall_ratio` is that of back-to-back calls, launches included. `of_ceiling` is the least time that the ceilings of the same run
(a product of large matrices, a copy) allow, over ours. Exit code 1 if a result of ours is wrong.

--dry runs all of it on the CPU at tiny sizes, which shows that it runs and nothing else. --profile CONTESTANT, with --only CASE,
shows the kernels of one contestant instead, and is what benchmarks.gpu_profile lets ncu look at.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.cpp_extension import CUDA_HOME

from benchmarks import machine
from benchmarks.gpu_bench import COPY_BYTES, GEMM_SIZE, Bench, show
from benchmarks.gpu_cases import attention, conv, conv_step, lstm, models, pointwise
from bigmodel_kernels import _gpu

ROOT = Path(__file__).parents[1]


def measure_machine(bench: Bench) -> None:
    if bench.dry:
        show(gpu="none: a dry run", torch=torch.__version__, commit=machine.git_commit())
        return
    gpu = _gpu.properties(0)
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,memory.total", "--format=csv,noheader"]
    said = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    show(
        gpu=said, capability=list(gpu.capability), multiprocessors=gpu.multiprocessors, torch=torch.__version__,
        cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), commit=machine.git_commit(),
    )  # fmt: skip


def measure_sync(bench: Bench) -> None:
    if bench.dry:
        show(not_measured="sync: a dry run compiles nothing")
        return
    major, minor = _gpu.properties(0).capability
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "gpu_sync")
        architecture = f"-arch=sm_{major}{minor}{'a' if major == 9 else ''}"
        nvcc = shutil.which("nvcc") or Path(CUDA_HOME or "/usr/local/cuda", "bin", "nvcc")
        source = ROOT / "benchmarks" / "gpu_sync.cu"
        subprocess.run([nvcc, "-std=c++20", "-O3", architecture, source, "-o", program], check=True)
        subprocess.run([program], check=True)


def measure_ceilings(bench: Bench) -> None:
    show(what=f"copy of {COPY_BYTES >> 20} MiB, read and written", terabytes_per_second=bench.bandwidth / 1e12)
    for dtype in (*bench.dtypes, *bench.pick((torch.float32,), ())):
        show(what=f"product of {GEMM_SIZE} x {GEMM_SIZE}, {dtype}", teraflops=bench.peak(dtype) / 1e12)


MEASURES: dict[str, Callable[[Bench], None]] = {
    "machine": measure_machine,
    "sync": measure_sync,
    "ceilings": measure_ceilings,
    "decode": attention.measure_decode,
    "conv_step": conv_step.measure,
    "pointwise": pointwise.measure,
    "lstm": lstm.measure,
    "attention": attention.measure,
    "conv": conv.measure,
    "models": models.measure,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_measure", description=__doc__)
    parser.add_argument("names", nargs="+", choices=(*MEASURES, "all"), metavar="NAME", help=", ".join(MEASURES))
    parser.add_argument("--dry", action="store_true", help="on the CPU, at tiny sizes")
    parser.add_argument("--only", metavar="CASE", help="this case alone, by its whole name")
    parser.add_argument(
        "--profile", metavar="CONTESTANT", help="profile this contestant of the case, in place of timing"
    )
    options = parser.parse_args(argv)
    if not options.dry and not torch.cuda.is_available():
        sys.exit("not measured: no GPU was found")
    bench = Bench(dry=options.dry, only=options.only, profiled=options.profile)
    for name in MEASURES if "all" in options.names else options.names:
        MEASURES[name](bench)
    for failure in bench.failures:
        print(f"WRONG {failure}", file=sys.stderr)
    return int(bool(bench.failures))


if __name__ == "__main__":
    sys.exit(main())
