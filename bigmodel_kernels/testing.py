"""Inputs, error bounds and the comparison that tests and benchmarks share.

The error rule, for a result in dtype d against the same computation in float64:
  (a) the relative L2 error is below the cap of d (CAPS), which grows with sqrt(steps / 200) for recurrences past 200 steps,
      since independent roundings add up as a random walk;
  (b) the largest error is at most twice (gradients: three times) that of PyTorch's own op in d on the same input, plus one
      rounding step of d at the size of the result.
Inside `tf32(True)` float32 is held to what TF32 keeps.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch

CAPS = {  # relative L2 error: forward, backward
    torch.float64: (1e-13, 4e-13),
    torch.float32: (2e-6, 4e-6),
    torch.float16: (6e-4, 1e-3),
    torch.bfloat16: (4e-3, 6e-3),
}
TF32_CAPS = (
    2**-9,
    2**-8,
)  # of float32 by TF32: two operands, each of which may be cut after 10 bits, by less than 2^-10
WHOLE_MODEL = 1.5
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded", "offset")

_tf32: ContextVar[bool] = ContextVar("bigmodel_kernels_tf32", default=False)


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """PyTorch's switches for TF32 on a GPU, of products, convolutions and LSTMs, all on or all off; bounds are as they say."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    before = [switch.fp32_precision for switch in switches]
    token = _tf32.set(allowed)
    try:
        for switch in switches:
            switch.fp32_precision = "tf32" if allowed else "ieee"
        yield
    finally:
        _tf32.reset(token)
        for switch, value in zip(switches, before):
            switch.fp32_precision = value


def make(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    layout: str = "contiguous",
    integer: bool = False,
    requires_grad: bool = False,
) -> torch.Tensor:
    """A reproducible normal (or small-integer-valued) tensor of `shape` in one of LAYOUTS.

    transposed: the last two dimensions are stored swapped; sliced: every second element of a larger tensor along the last
    dimension; expanded: stride 0 along the first dimension; offset: contiguous, starting one element past an aligned address.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        if integer:
            return torch.randint(-3, 4, size, generator=generator).to(dtype)
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    if layout == "transposed" and len(shape) >= 2:
        t = draw(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
    elif layout == "sliced":
        t = draw(*shape[:-1], 2 * shape[-1])[..., ::2]
    elif layout == "expanded":
        t = draw(1, *shape[1:]).expand(shape)
    elif layout == "offset":
        t = draw(math.prod(shape) + 1)[1:].view(shape)
    elif layout in LAYOUTS:
        t = draw(*shape)
    else:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")
    return t.requires_grad_(requires_grad)


def relative_l2(actual: torch.Tensor, exact: torch.Tensor, magnitude: float = 0.0) -> float:
    """|actual - exact| / |exact| in the L2 norm, in float64; 0 for empty tensors.

    Args:
        magnitude: root mean square below which `exact` counts as cancelled to noise: the size of the terms summed up.
    """
    if exact.numel() == 0:
        return 0.0
    difference = (actual.double() - exact.double()).norm().item()
    norm = max(exact.double().norm().item(), magnitude * math.sqrt(exact.numel()))
    return difference if difference == 0 or math.isnan(difference) else difference / norm if norm else math.inf


@dataclass(frozen=True)
class ErrorReport:
    """What check_error found; `message` says which bound was broken, by how much."""

    rel_l2: float
    max_err: float
    baseline_max_err: float
    ok: bool
    message: str


def check_error(
    actual: torch.Tensor,
    exact: torch.Tensor,
    baseline: torch.Tensor | None,
    *,
    dtype: torch.dtype,
    gradient: bool = False,
    steps: int = 0,
    magnitude: float = 0.0,
    name: str = "result",
) -> ErrorReport:
    """Applies the error rule of this module.

    Args:
        actual: our result.
        exact: the result in float64.
        baseline: PyTorch's own result in `dtype` on the same input, for rule (b); None leaves that rule out.
        dtype: what was computed in.
        gradient: whether this is a gradient.
        steps: time steps of a recurrence.
        magnitude: root mean square of the terms summed up, where the exact result cancels to (nearly) nothing.
    """
    if actual.shape != exact.shape:
        return ErrorReport(
            math.inf, math.inf, 0.0, False, f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}"
        )
    finite = torch.isfinite(exact)
    same_elsewhere = torch.equal(
        torch.nan_to_num(actual.double()[~finite], nan=0.0), torch.nan_to_num(exact.double()[~finite], nan=0.0)
    ) and torch.equal(actual.isnan(), exact.isnan())
    if not same_elsewhere:
        return ErrorReport(math.inf, math.inf, 0.0, False, f"{name}: infinities or NaNs are not where they belong")
    a, e = actual.double()[finite], exact.double()[finite]
    growth = math.sqrt(max(1.0, steps / 200))
    short = dtype == torch.float32 and _tf32.get()
    cap = (TF32_CAPS if short else CAPS[dtype])[1 if gradient else 0] * growth
    rel = relative_l2(a, e, magnitude)
    largest = (a - e).abs().max().item() if e.numel() else 0.0
    problems = []
    if not rel <= cap:
        problems.append(f"relative L2 error {rel:.2e} above the cap {cap:.2e}")
    baseline_largest = math.nan
    if baseline is not None and dtype != torch.float64 and e.numel():  # in float64 `exact` is itself a rounded result
        baseline_largest = (baseline.double()[finite] - e).abs().max().item()
        rounding_step = (TF32_CAPS[0] if short else torch.finfo(dtype).eps) * max(e.abs().max().item(), magnitude)
        bound = (3 if gradient else 2) * baseline_largest + rounding_step
        if not largest <= bound:
            problems.append(f"largest error {largest:.2e} above {bound:.2e} (torch's own: {baseline_largest:.2e})")
    return ErrorReport(rel, largest, baseline_largest, not problems, f"{name}: " + ("; ".join(problems) or "ok"))


def check_whole_model(
    actual: torch.Tensor, exact: torch.Tensor, baseline: torch.Tensor, *, dtype: torch.dtype, name: str = "result"
) -> ErrorReport:
    """The rule for a result behind many layers, each of which adds its roundings: the relative L2 error is at most WHOLE_MODEL
    times that of the same model on PyTorch's own ops in `dtype`, plus the cap of one op."""
    if actual.shape != exact.shape:
        return check_error(actual, exact, None, dtype=dtype, name=name)
    rel, allowed = relative_l2(actual, exact), WHOLE_MODEL * relative_l2(baseline, exact) + CAPS[dtype][0]
    largest, baseline_largest = (
        (t.double() - exact.double()).abs().max().item() if exact.numel() else 0.0 for t in (actual, baseline)
    )
    ok = rel <= allowed
    message = f"{name}: " + ("ok" if ok else f"relative L2 error {rel:.2e} above {allowed:.2e}, by PyTorch's own")
    return ErrorReport(rel, largest, baseline_largest, ok, message)


def assert_matches(actual: torch.Tensor, exact: torch.Tensor, baseline: torch.Tensor | None, **options) -> None:
    """check_error as an assertion; same arguments."""
    report = check_error(actual, exact, baseline, **options)
    assert report.ok, report.message
