"""python -m benchmarks.gpu_measure machine | sync | ceilings | lstm | decode: figures of one GPU, a JSON object a line.

Kernels are timed by events on the device, contestants interleaved round by round with the L2 cache overwritten before each, after
their results were compared with float64. A ratio is the median over the rounds; above 1, ours is faster. Needs a GPU.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import bigmodel_kernels as bmk
from benchmarks import machine
from benchmarks.timer import MIN_ROUNDS, Ratio
from bigmodel_kernels import _gpu
from bigmodel_kernels.testing import check_error

ROOT = Path(__file__).parents[1]
FLUSH_BYTES = 256 << 20  # beyond every L2 cache
GEMM_SIZE = 8192
COPY_BYTES = 1 << 30


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


def compare(case: str, contestants: dict[str, Callable[[], torch.Tensor]], exact: torch.Tensor, steps: int = 0) -> None:
    """Checks every contestant against `exact`, then times them; the first is ours. A wrong result is shown without a time."""
    wrong = {}
    for name, function in contestants.items():
        result = function()
        report = check_error(result, exact, None, dtype=result.dtype, steps=steps, magnitude=0.1)
        if not report.ok:
            wrong[name] = report.message
    ours, *rivals = contestants
    if ours in wrong:
        show(case=case, wrong=wrong[ours])
        raise SystemExit(f"{case}: {wrong[ours]}")
    samples = interleaved(contestants)
    medians = {name: statistics.median(times) for name, times in samples.items()}
    best = min((name for name in rivals if name not in wrong), key=medians.get)
    ratio = Ratio.of([b / a for a, b in zip(samples[ours], samples[best])])
    times = {f"us {name}": round(medians[name], 2) for name in contestants}
    show(
        case=case,
        ratio=ratio.median,
        low=ratio.low,
        high=ratio.high,
        best=best,
        **times,
        **({"wrong": wrong} if wrong else {}),
    )


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
        subprocess.run(
            ["nvcc", "-std=c++20", "-O3", architecture, ROOT / "benchmarks" / "gpu_sync.cu", "-o", program], check=True
        )
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
                exact, steps,
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
            exact = bmk.attention_decode(q.double(), k.double(), v.double(), lengths, backend="torch")
            compare(
                f"decode bf16 B{batch} KV{length} 32/8 heads",
                {
                    "cuda": lambda: bmk.attention_decode(q, k, v, lengths, backend="cuda"),  # noqa: B023
                    "SDPA": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),  # noqa: B023
                },
                exact,
            )


MEASURES = {
    "machine": measure_machine, "sync": measure_sync, "ceilings": measure_ceilings, "lstm": measure_lstm,
    "decode": measure_decode,
}  # fmt: skip

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in MEASURES:
        sys.exit(__doc__)
    if not torch.cuda.is_available():
        sys.exit("not measured: no GPU was found")
    MEASURES[sys.argv[1]]()
