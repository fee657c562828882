"""What stands between products: norms, bias and activation, cross-entropy; against eager and torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import bigmodel_kernels as bmk
from benchmarks.gpu_bench import Bench, gradients

BACKENDS = ("auto", "triton")
ROWS, WIDTH, CLASSES = 8192, 4096, 50257


def measure(bench: Bench) -> None:
    rows, width = bench.pick((ROWS, WIDTH), (6, 16))
    dtype = bench.dtypes[0]
    torch.manual_seed(0)
    x, residual = (bench.draw(rows, width, dtype=dtype).requires_grad_() for _ in range(2))
    weight, bias = (bench.draw(width, dtype=dtype).requires_grad_() for _ in range(2))
    logits = bench.draw(rows, bench.pick(CLASSES, 20), dtype=dtype).requires_grad_()
    target = torch.randint(logits.shape[1], (rows,), device=bench.device)

    def summed(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x + residual, x.shape[-1:], weight, bias)

    def cross_entropy(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, target)

    _case(
        bench, "layer_norm", (x, weight, bias), dtype,
        lambda *t, backend: bmk.layer_norm(*t, backend=backend),
        lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias),
    )  # fmt: skip
    _case(
        bench, "layer_norm of a sum", (x, residual, weight, bias), dtype,
        lambda x, r, w, b, backend: bmk.layer_norm(x, w, b, residual=r, backend=backend)[0], summed,
    )  # fmt: skip
    _case(
        bench, "rms_norm", (x, weight), dtype,
        lambda *t, backend: bmk.rms_norm(*t, backend=backend),
        lambda x, weight: F.rms_norm(x, x.shape[-1:], weight),
    )  # fmt: skip
    _case(
        bench, "bias_act gelu", (x, bias), dtype,
        lambda *t, backend: bmk.bias_act(*t, activation="gelu", backend=backend),
        lambda x, bias: F.gelu(x + bias),
    )  # fmt: skip
    _case(
        bench, "cross_entropy", (logits,), dtype,
        lambda logits, backend: bmk.cross_entropy(logits, target, backend=backend), cross_entropy,
    )  # fmt: skip


def _case(
    bench: Bench,
    name: str,
    inputs: tuple[Tensor, ...],
    dtype: torch.dtype,
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
) -> None:
    fused = bench.compiled(plain)
    calls = {backend: lambda b=backend: ours(*inputs, backend=b) for backend in BACKENDS}
    stock = {"eager": lambda: plain(*inputs), "compile": lambda: fused(*inputs)}
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    exact = plain(*doubles)
    label = f"{name} {str(dtype)[6:]} {list(inputs[0].shape)}"
    traffic = float(inputs[0].element_size() * (sum(t.numel() for t in inputs) + exact.numel()))
    with torch.no_grad():
        bench.compare(f"{label} fwd", calls, stock, exact.detach(), dtype=dtype, traffic=traffic)
    upstream = bench.draw(*exact.shape, dtype=dtype) if exact.dim() else torch.ones_like(exact).to(dtype)
    truth = torch.autograd.grad(exact, doubles, upstream.double())
    bench.compare(
        f"{label} fwd+bwd",
        {n: gradients(f, inputs, upstream) for n, f in calls.items()},
        {n: gradients(f, inputs, upstream) for n, f in stock.items()},
        truth, dtype=dtype, traffic=2 * traffic + sum(t.numel() * t.element_size() for t in inputs), gradient=True,
    )  # fmt: skip
