"""python -m bigmodel_kernels check: every op, on every backend that can run it here, against float64 by the error rule."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import bigmodel_kernels as bmk
from bigmodel_kernels import _registry, testing

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """`run(*tensors, backend=...)` on normal tensors of `shapes`; returns one tensor or several. Those from number `weights`
    on are times `scale`, before they are rounded to the dtype: in `run` that would be one more rounding."""

    op: str
    name: str
    run: Callable[..., Tensor | tuple]
    shapes: tuple[tuple[int, ...], ...]
    weights: int = 99
    scale: float = 0.3


def _lstm(x, h, c, *weights, backend, **options):
    output, (h_n, c_n) = bmk.lstm(x, (h, c), weights, backend=backend, **options)
    return output, h_n, c_n


def _lstm_cell(x, h, c, *weights, backend):
    return bmk.lstm_cell(x, (h, c), *weights, backend=backend)


def _varlen(q, k, v, backend):
    starts = torch.tensor([0, 30, 97], dtype=torch.int32, device=q.device)
    return bmk.attention_varlen(q, k, v, starts, starts, 67, 67, is_causal=True, backend=backend)


def _decode(q, k, v, backend):
    return bmk.attention_decode(q, k, v, torch.tensor([40, 97], device=q.device), backend=backend)


def _gated_conv(x, *tensors, backend):
    *weights, skip = tensors
    return bmk.gated_conv(x, *weights, skip=skip, dilation=3, backend=backend)


@torch.no_grad()
def _conv_step(x, weight, bias, out_weight, out_bias, backend):
    """The columns of three steps."""
    state, columns = bmk.ConvState.start(x.shape[0], x.shape[1], weight.shape[2], 1, x), []
    for x_t in x.unbind(-1):
        y, _, state = bmk.conv_step(
            x_t, state, weight, bias, out_weight, out_bias, activation="tanh_sigmoid", backend=backend
        )
        columns.append(y)
    return torch.stack(columns, -1)


def _layer_norm(x, weight, bias, residual, backend):
    return bmk.layer_norm(x, weight, bias, residual=residual, backend=backend)


def _norm_lstm(a, h, c, w, gain, gain_c, bias_c, backend):
    output, states = bmk.norm_lstm(a, (h, c), w, gain, gain_c, bias_c, backend=backend)
    return output, *states


def _bias_act(x, bias, residual, backend):
    return bmk.bias_act(x, bias, activation="gelu", residual=residual, backend=backend)


def _linear(x, weight, bias, residual, backend):
    return bmk.linear(x, weight, bias, activation="gelu", residual=residual, backend=backend)


@torch.no_grad()
def _encoder_layer(x, *weights, backend):
    return bmk.encoder_layer(x, *weights, num_heads=4, activation="gelu", backend=backend)


@torch.no_grad()
def _decoder_step(x, k_cache, v_cache, *weights, backend):
    lengths, caches = torch.tensor([11, 3], device=x.device), (k_cache.clone(), v_cache.clone())
    return bmk.decoder_step(x, *caches, lengths, *weights, num_heads=4, backend=backend), *caches


def _cross_entropy(logits, backend):
    target = torch.arange(logits.shape[0], device=logits.device)
    return bmk.cross_entropy(logits, target, label_smoothing=0.1, backend=backend)


def _cases() -> Iterator[Case]:
    q, kv = (2, 4, 97, 40), (2, 2, 97, 40)
    yield Case("attention", "causal", lambda *t, backend: bmk.attention(*t, is_causal=True, backend=backend), (q, q, q))
    yield Case("attention", "gqa", lambda *t, backend: bmk.attention(*t, enable_gqa=True, backend=backend), (q, kv, kv))
    yield Case(
        "attention",
        "mask",
        lambda *t, backend: bmk.attention(*t[:3], attn_mask=t[3], backend=backend),
        (q, q, q, (1, 4, 97, 97)),
    )
    yield Case("attention_varlen", "causal", _varlen, ((97, 4, 40),) * 3)
    one_query = ((2, 4, 1, 40), kv, kv)
    yield Case("attention", "decode", _decode, one_query)
    yield Case("attention_decode", "without gradients", torch.no_grad()(_decode), one_query)
    image, weight = (3, 5, 19, 21), (7, 5, 3, 3)

    def conv(**options):
        return lambda x, w, b, backend: bmk.conv(x, w, b, backend=backend, **options)

    yield Case("conv", "3x3 relu pool", conv(padding=1, activation="relu", pool=("max", 2)), (image, weight, (7,)))
    yield Case("conv", "strided", conv(stride=2, dilation=2), (image, weight, (7,)))
    yield Case(
        "conv", "causal 1-d", conv(padding="causal", dilation=3, activation="tanh"), ((3, 5, 50), (7, 5, 2), (7,))
    )
    gated = ((14, 5, 2), (14,), (5, 7, 1), (5,))
    yield Case("gated_conv", "residual and skip", _gated_conv, ((3, 5, 120), *gated, (6, 7, 1), (6,), (3, 6, 120)), 1)
    yield Case("conv_step", "gated", _conv_step, ((3, 5, 3), *gated))
    layer = ((64, 12), (64, 16), (64,), (64,))
    yield Case("lstm", "one layer", _lstm, ((20, 5, 12), (1, 5, 16), (1, 5, 16), *layer), 3)
    both = ((20, 5, 12), (2, 5, 16), (2, 5, 16), *layer, *layer)
    yield Case("lstm", "bidirectional", lambda *t, backend: _lstm(*t, backend=backend, bidirectional=True), both, 3)
    rows, row = (7, 70), (70,)
    yield Case("norm", "layer", _layer_norm, (rows, row, row, rows))
    yield Case("norm", "rms", lambda x, w, backend: bmk.rms_norm(x, w, backend=backend), (rows, row))
    yield Case("linear", "gelu", _linear, ((50, 70), (90, 70), (90,), (50, 90)), 1)
    feed_forward = ((90, 32), (90,), (32, 90), (32,))
    parameters = ((96, 32), (96,), (32, 32), (32,), *feed_forward, (32,), (32,), (32,), (32,))
    yield Case("encoder_layer", "gelu", _encoder_layer, ((5, 21, 32), *parameters), 1)
    yield Case("decoder_step", "gelu", _decoder_step, ((2, 32), *((2, 4, 12, 8),) * 2, *parameters), 3)
    yield Case("bias_act", "gelu", _bias_act, (rows, row, rows))
    yield Case("cross_entropy", "smooth", _cross_entropy, (rows,))
    norms = ((64,), (16,), (16,))
    yield Case("norm_lstm", "one layer", _norm_lstm, ((4, 5, 64), (5, 16), (5, 16), (64, 16), *norms))
    yield Case("lstm_cell", "step", _lstm_cell, ((5, 12), (5, 16), (5, 16), *layer), 3)


def _evaluate(case: Case, dtype: torch.dtype, backend: str, values: list[Tensor]) -> dict[str, Tensor]:
    """Results and, of an op that has them, the gradients of all inputs. `values` are exact in `dtype`."""
    leaves = [v.to(dtype).requires_grad_() for v in values]
    results = case.run(*leaves, backend=backend)
    results = results if isinstance(results, tuple) else (results,)
    upstream = [testing.make(*r.shape, dtype=dtype, seed=90 + i).to(r.device) for i, r in enumerate(results)]
    gradients = torch.autograd.grad(results, leaves, upstream) if results[0].requires_grad else ()
    return {f"result {i}": r.detach() for i, r in enumerate(results)} | {
        f"gradient {i}": g for i, g in enumerate(gradients)
    }


def check_case(case: Case, dtype: torch.dtype, backend: str) -> list[testing.ErrorReport]:
    """The error rule on every result and gradient of a case, on the device that the backend is for."""
    device = "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"
    values = [testing.make(*shape, dtype=torch.float64, seed=i) for i, shape in enumerate(case.shapes)]
    values = [v * (case.scale if i >= case.weights else 1) for i, v in enumerate(values)]
    values = [v.to(dtype).double().to(device) for v in values]
    with testing.tf32(False):
        actual = _evaluate(case, dtype, backend, values)
        exact = _evaluate(case, torch.float64, "torch", values)
        baseline = _evaluate(case, dtype, "torch", values)
    return [
        testing.check_error(actual[n], exact[n], baseline[n], dtype=dtype, gradient=n.startswith("gradient"), name=n)
        for n in exact
    ]


def _line(case: Case, dtype: torch.dtype, backend: str) -> tuple[str, int]:
    """What is shown of a case, and how many of its results are wrong."""
    label = f"{case.op:13s} {case.name:14s} {backend:7s} {str(dtype).removeprefix('torch.'):9s}"
    try:
        reports = check_case(case, dtype, backend)
    except RuntimeError as error:
        if "cannot run this call" not in str(error):
            raise
        why = str(error).splitlines()[0].partition("cannot run this call: ")[2].partition(". The others")[0]
        return f"-     {label} {why}", 0
    bad = [r.message for r in reports if not r.ok]
    worst = max(r.rel_l2 for r in reports)
    return f"{'WRONG' if bad else 'ok   '} {label} worst relative error {worst:.1e}  {'; '.join(bad)}", len(bad)


def run() -> int:
    """Prints one line per case; returns 0 if every result is within its bounds."""
    started = time.perf_counter()
    wrong = 0
    for case in _cases():
        backends = [b for b in _registry.BACKENDS if b != "torch" and _registry.availability(case.op, b) is None]
        if not backends:
            print(f"ok    {case.op:13s} {case.name:14s} torch   only: no kernel of ours runs on this machine")
        for backend in backends:
            for dtype in DTYPES:
                shown, bad = _line(case, dtype, backend)
                wrong += bad
                print(shown)
    verdict = f"{wrong} wrong" if wrong else "all right"
    print(f"{verdict}, {time.perf_counter() - started:.1f} s; the bounds: bigmodel_kernels.testing")
    return 1 if wrong else 0
