"""python -m benchmarks.gpu_measure machine | sync | ceilings | lstm | decode | conv: figures of one GPU, a JSON object a line.

Kernels are timed by events on the device, contestants interleaved round by round with the L2 cache overwritten before each, after
their results were compared with float64. A ratio is the median over the rounds; above 1, ours is faster. Needs a GPU.
"""

from __future__ import annotations

import functools
import json
import math
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.cpp_extension import CUDA_HOME

import bigmodel_kernels as bmk
from benchmarks import machine
from benchmarks.timer import MIN_ROUNDS, Ratio
from bigmodel_kernels import _gpu
from bigmodel_kernels.testing import check_error

ROOT = Path(__file__).parents[1]
FLUSH_BYTES = 256 << 20  # beyond every L2 cache
GEMM_SIZE = 8192
COPY_BYTES = 1 << 30
failed: list[str] = []  # cases whose result was wrong


def show(**figure) -> None:
    print(json.dumps(figure), flush=True)


def microseconds(function: Callable[[], object], flush: torch.Tensor | None) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if flush is not None:
        flush.zero_()
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def interleaved(functions: dict[str, Callable[[], object]], rounds: int = MIN_ROUNDS) -> dict[str, list[float]]:
    """Microseconds of each contestant, one per round, in an order drawn anew for each round."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    order, names = random.Random(0), list(functions)
    for function in functions.values():
        for _ in range(3):
            function()
    samples: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        order.shuffle(names)
        for name in names:
            samples[name].append(microseconds(functions[name], flush))
    return samples


def compare(
    case: str, contestants: dict[str, Callable[[], torch.Tensor]], exact: torch.Tensor, steps: int = 0,
    gradient: bool = False, traffic: int = 0,
) -> None:  # fmt: skip
    """Checks every contestant against `exact`, then times them; the first is ours. Where that is wrong no time is shown; a rival
    that is wrong (rounding before a max-pool sends gradients elsewhere) is a yardstick only where all are.

    Args:
        traffic: bytes that must be moved.
    """
    wrong = {}
    for name, function in contestants.items():
        result = function()
        report = check_error(
            result, exact, None, dtype=result.dtype, gradient=gradient, steps=steps, magnitude=0.1, name=name
        )
        if not report.ok:
            wrong[name] = report.message
    ours, *rivals = contestants
    if ours in wrong:
        show(case=case, wrong=wrong[ours])
        failed.append(case)
        return
    samples = interleaved(contestants)
    medians = {name: statistics.median(times) for name, times in samples.items()}
    figures: dict = {f"us {name}": round(medians[name], 2) for name in contestants}
    if rivals:
        best = min([name for name in rivals if name not in wrong] or rivals, key=medians.get)
        ratio = Ratio.of([b / a for a, b in zip(samples[ours], samples[best])])
        figures = {"ratio": ratio.median, "low": ratio.low, "high": ratio.high, "best": best} | figures
    if traffic:
        figures["terabytes_per_second"] = traffic / medians[ours] / 1e6
    if wrong:
        figures["wrong"] = wrong
    show(case=case, **figures)


def measure_machine() -> None:
    gpu = _gpu.properties(0)
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,memory.total", "--format=csv,noheader"]
    said = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    show(
        gpu=said, capability=list(gpu.capability), multiprocessors=gpu.multiprocessors, torch=torch.__version__,
        cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), commit=machine.git_commit(),
    )  # fmt: skip


def measure_sync() -> None:
    major, minor = _gpu.properties(0).capability
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "gpu_sync")
        architecture = f"-arch=sm_{major}{minor}{'a' if major == 9 else ''}"
        nvcc = shutil.which("nvcc") or Path(CUDA_HOME or "/usr/local/cuda", "bin", "nvcc")
        source = ROOT / "benchmarks" / "gpu_sync.cu"
        subprocess.run([nvcc, "-std=c++20", "-O3", architecture, source, "-o", program], check=True)
        subprocess.run([program], check=True)


def measure_ceilings() -> None:
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = statistics.median(interleaved({"copy": lambda: target.copy_(source)})["copy"]) / 1e6
    show(what="copy, read and written", terabytes_per_second=2 * COPY_BYTES / seconds / 1e12)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, device="cuda").to(dtype) for _ in range(2))
        seconds = statistics.median(interleaved({"mm": lambda: torch.mm(a, b)}, rounds=10)["mm"]) / 1e6  # noqa: B023
        show(what=f"product {dtype}", teraflops=2 * GEMM_SIZE**3 / seconds / 1e12)


# T, B, I, H, layers, bidirectional
LSTM_CASES = [
    (256, 16, 128, 128, 1, False),
    (256, 16, 512, 512, 1, False),
    (1024, 16, 768, 768, 1, False),
    (256, 64, 256, 256, 1, False),
    (256, 16, 256, 256, 2, True),
]


def measure_lstm() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for steps, batch, inputs, hidden, layers, both in LSTM_CASES:
            torch.manual_seed(0)
            stock = torch.nn.LSTM(inputs, hidden, layers, bidirectional=both, device="cuda", dtype=dtype)
            stock.flatten_parameters()
            x = torch.randn(steps, batch, inputs, device="cuda").to(dtype)
            upstream = torch.randn(steps, batch, hidden * (1 + both), device="cuda").to(dtype)
            options = {"num_layers": layers, "bidirectional": both}
            weights = list(stock._flat_weights)

            def ours(x=x, weights=weights, options=options):
                return bmk.lstm(x, None, weights, **options, backend="cuda")[0]

            name = f"lstm {str(dtype)[6:]} T{steps} B{batch} H{hidden} L{layers}{' bi' if both else ''}"
            double = torch.nn.LSTM(inputs, hidden, layers, bidirectional=both, device="cuda", dtype=torch.float64)
            double.load_state_dict(stock.state_dict())
            with torch.no_grad():
                exact = double(x.double())[0]
                compare(f"{name} fwd", {"cuda": ours, "cuDNN": lambda: stock(x)[0]}, exact, steps)  # noqa: B023

            def gradient(output, upstream=upstream, weights=weights):
                return torch.autograd.grad(output, weights, upstream)[1]

            exact = torch.autograd.grad(double(x.double())[0], list(double._flat_weights), upstream.double())[1]
            compare(
                f"{name} fwd+bwd",
                {"cuda": lambda: gradient(ours()), "cuDNN": lambda: gradient(stock(x)[0])},  # noqa: B023
                exact, steps, gradient=True,
            )  # fmt: skip


def measure_decode() -> None:
    heads, kv_heads, head_dim = 32, 8, 128
    for batch in (1, 8):
        for length in (1024, 4096, 8192, 65536):
            if batch * length > 1 << 18:
                continue
            q = torch.randn(batch, heads, 1, head_dim, device="cuda").bfloat16()
            k, v = (torch.randn(batch, kv_heads, length, head_dim, device="cuda").bfloat16() for _ in range(2))
            lengths = torch.full((batch,), length, dtype=torch.int32, device="cuda")
            stock = {"SDPA": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)}  # noqa: B023
            for cache in (torch.bfloat16, torch.float8_e4m3fn, torch.int8):
                scales = {} if cache == torch.bfloat16 else {"k_scale": 0.03, "v_scale": 0.03}
                kept = [t.to(cache) if not scales else _quantised(t, cache, 0.03) for t in (k, v)]

                def ours(q=q, kept=kept, lengths=lengths, scales=scales, backend="cuda"):
                    return bmk.attention_decode(q, *kept, lengths, **scales, backend=backend)

                compare(
                    f"decode bf16, cache {str(cache)[6:]}, B{batch} KV{length} 32/8 heads",
                    # Of 8 bits, SDPA's time is that of the cache before; its result is another one.
                    {"cuda": ours} | (stock if not scales else {}),
                    ours(q.double(), [t if scales else t.double() for t in kept], backend="torch"),
                    traffic=sum(t.nbytes for t in kept),
                )


def _quantised(t: torch.Tensor, cache: torch.dtype, scale: float) -> torch.Tensor:
    t = t.float() / scale
    return t.round().clamp(-128, 127).to(cache) if cache == torch.int8 else t.clamp(-448, 448).to(cache)


# batch, channels, size; output channels; kernel; options of bmk.conv
CONV_CASES = {
    "ResNet's stem": (
        (32, 3, 224, 224), 64, (7, 7),
        {"stride": 2, "padding": 3, "activation": "relu", "pool": ("max", 3, 2, 1)},
    ),
    "small CNN": ((256, 3, 32, 32), 16, (5, 5), {"padding": 2, "activation": "relu", "pool": ("max", 2)}),
    "depthwise 3x3": ((32, 256, 56, 56), 256, (3, 3), {"padding": 1, "groups": 256}),
    "depthwise 7x7": ((32, 384, 28, 28), 384, (7, 7), {"padding": 3, "groups": 384}),
    "depthwise causal": (
        (8, 1536, 2048), 1536, (4,), {"padding": "causal", "groups": 1536, "activation": "silu"},
    ),
}  # fmt: skip


def measure_conv() -> None:
    torch.backends.cudnn.benchmark = True
    for name, (shape, channels, kernel, options) in CONV_CASES.items():
        x = torch.randn(shape, device="cuda").bfloat16()
        x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
        depth = shape[1] // options.get("groups", 1)
        weight = torch.randn(channels, depth, *kernel, device="cuda") * (depth * math.prod(kernel)) ** -0.5
        weight, bias = weight.bfloat16().requires_grad_(), torch.randn(channels, device="cuda").bfloat16()

        def conv(backend, x=x, weight=weight, bias=bias, options=options):
            return bmk.conv(x, weight, bias, **options, backend=backend)

        compiled = torch.compile(functools.partial(conv, "torch"))
        double = functools.partial(conv, "torch", x.double(), weight.detach().double().requires_grad_(), bias.double())
        with torch.no_grad():
            exact = double()
            contestants = {"cuda": lambda: conv("cuda"), "eager": lambda: conv("torch"), "compile": compiled}
            traffic = x.nbytes + exact.numel() * x.element_size()
            compare(f"conv bf16 {name} fwd", contestants, exact, traffic=traffic)
        upstream = torch.randn_like(exact).bfloat16()

        def gradient(output, weight=weight, upstream=upstream):
            return torch.autograd.grad(output, weight, upstream.to(output.dtype))[0]

        contestants = {
            "cuda": lambda: gradient(conv("cuda")),
            "eager": lambda: gradient(conv("torch")),
            "compile": lambda: gradient(compiled()),  # noqa: B023
        }
        exact = gradient(double(), double.args[2])
        compare(f"conv bf16 {name} fwd+bwd of the weight", contestants, exact, gradient=True)


MEASURES = {
    "machine": measure_machine, "sync": measure_sync, "ceilings": measure_ceilings, "lstm": measure_lstm,
    "decode": measure_decode, "conv": measure_conv,
}  # fmt: skip

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in MEASURES:
        sys.exit(__doc__)
    if not torch.cuda.is_available():
        sys.exit("not measured: no GPU was found")
    MEASURES[sys.argv[1]]()
    if failed:
        sys.exit(f"wrong results: {', '.join(failed)}")
