"""What the figures were measured on: names, versions, and the peaks that the floors are computed from."""

import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import bigmodel_kernels as bmk
from benchmarks.contestant import DTYPES

ROOT = Path(__file__).resolve().parent.parent
GEMM_SIZE = 2048
COPY_BYTES = (1 << 20, 8 << 20, 256 << 20)  # copies that live in the private caches, in the shared cache, in memory
RUNTIME_VARIABLES = ("OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "ATEN_", "BIGMODEL_")
PEAK_SECONDS = 0.6  # spent on each peak; the fastest of the runs counts


@dataclass(frozen=True)
class Peaks:
    """Measured ceilings of this machine: FLOP/s by dtype, and bytes/s by the size of the copied tensor."""

    flops: dict[str, float]
    bandwidth: dict[int, float]

    def __or__(self, other: "Peaks") -> "Peaks":
        """The higher of two measurements: what else the machine does can only lower them."""
        return Peaks(
            {dtype: max(value, other.flops[dtype]) for dtype, value in self.flops.items()},
            {size: max(value, other.bandwidth[size]) for size, value in self.bandwidth.items()},
        )

    def bandwidth_for(self, traffic: float) -> float:
        """Data that fits into a cache may be found there: the copy that moves the next larger amount sets the floor."""
        sizes = sorted(self.bandwidth)
        return self.bandwidth[next((size for size in sizes if traffic <= 2 * size), sizes[-1])]

    def floor(self, flops: float, traffic: float, dtype: str) -> tuple[float, str]:
        """The least time in seconds, and which of the two sets it."""
        compute, memory = flops / self.flops[dtype], traffic / self.bandwidth_for(traffic)
        return (compute, "compute") if compute >= memory else (memory, "memory")


def fastest(function: Callable[[], object], seconds: float = PEAK_SECONDS) -> float:
    """Seconds of the fastest of as many runs as fit into `seconds`, after one that warms up."""
    function()
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < seconds:
        before = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - before)
    return best


def gemm_peak(dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of PyTorch's matrix product, its 1x1 convolution and our own product."""
    a = torch.randn(GEMM_SIZE, GEMM_SIZE).to(dtype)
    b = torch.randn(GEMM_SIZE, GEMM_SIZE).to(dtype)
    contenders = [lambda: torch.mm(a, b)]
    if dtype is torch.float32:
        image = a.view(1, GEMM_SIZE, 1, GEMM_SIZE).permute(0, 3, 1, 2)  # channels_last: rows of a are the pixels
        contenders.append(lambda: torch.conv2d(image, b.view(GEMM_SIZE, GEMM_SIZE, 1, 1)))  # oneDNN; mm in fp32 is MKL
    if bmk.build_info()["native"] == "ok":
        contenders.append(lambda: torch.ops.bigmodel_native.gemm(a, b))
    return 2 * GEMM_SIZE**3 / min(map(fastest, contenders))


def copy_bandwidth(size: int) -> float:
    """bytes/s of copying a tensor of `size` bytes, read and write counted."""
    source = torch.ones(size // 4)
    target = torch.empty_like(source)
    return 2 * size / fastest(lambda: target.copy_(source))


def measure_peaks(dtypes: list[str]) -> Peaks:
    return Peaks({d: gemm_peak(DTYPES[d]) for d in dtypes}, {size: copy_bandwidth(size) for size in COPY_BYTES})


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def git_commit() -> str:
    """The commit of the checkout, with `+changes` if the files differ from it; empty outside one."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        diff = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    if head.returncode != 0:
        return ""
    return head.stdout.strip() + ("+changes" if diff.stdout.strip() else "")


class Others:
    """The part of all CPUs that other programs (and a hypervisor) took inside the `with` block; None where /proc/stat
    does not tell. Threads that wait for each other are slowed by far more than that part."""

    share: float | None = None

    def __enter__(self) -> "Others":
        self._busy, self._own, self._start = busy_seconds(), time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._busy is not None:
            others = (busy_seconds() - self._busy) - (time.process_time() - self._own)
            self.share = max(0.0, others / (os.cpu_count() * (time.perf_counter() - self._start)))


def busy_seconds() -> float | None:
    """CPU seconds that all CPUs together have been busy since the machine started."""
    try:
        ticks = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, ticks)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def describe() -> dict:
    """Everything that names the machine and the software; goes into every report."""
    build = bmk.build_info()
    return {
        "device": cpu_model(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "isa": build.get("isa", "not built"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "version": bmk.__version__,
        "commit": git_commit(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(RUNTIME_VARIABLES)},
        "build": build,
    }
