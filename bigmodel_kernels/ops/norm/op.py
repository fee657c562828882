"""bmk.layer_norm and bmk.rms_norm: normalisation over the last dimension, with the addition before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from bigmodel_kernels import _registry
from bigmodel_kernels._arguments import number
from bigmodel_kernels._library import Op, autocast_enabled
from bigmodel_kernels._plans import Plans
from bigmodel_kernels.ops.norm import reference


def layer_norm(
    x: Tensor,  # [.., C]
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    *,
    residual: Tensor | None = None,  # [.., C]
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """weight (h - mean) / sqrt(variance + eps) + bias over the last dimension of h = x + residual (Ba et al. 2016).

    Args:
        x: of any strides.
        weight, bias: in the dtype of x; 1 and 0 if None.
        residual: added to x first, as the blocks of a Transformer do.
        eps: added to the variance, which is that of the row itself (divided by C).
        backend: "auto", "cpu", "torch" or "triton".

    Returns:
        [.., C], contiguous; with residual also h, for the next addition.

    Raises:
        RuntimeError: sizes, devices or dtypes that do not go together, or the backend asked for cannot take the call.
        TypeError: an argument of the wrong type.
        ValueError: eps out of range, or an unknown backend.
    """
    tensors = (x, residual, weight, bias)
    key, plan = PLANS.look_up(backend, tensors, (eps, True))
    if plan is not None:
        try:
            return plan(*tensors)
        except RuntimeError:  # is raised below
            pass
    args = prepare(x, weight, bias, residual=residual, eps=eps)
    y, h, *_ = OP(*args, backend=backend)
    if key is not None:
        PLANS.remember(key, args, save=False)
    return y if residual is None else (y, h)


def rms_norm(
    x: Tensor,  # [.., C]
    weight: Tensor | None = None,  # [C]
    *,
    residual: Tensor | None = None,  # [.., C]
    eps: float | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """weight h / sqrt(mean of h^2 + eps) over the last dimension of h = x + residual (Zhang & Sennrich 2019).

    Args, results and errors are those of `layer_norm`; eps None is the smallest step at 1 of the dtype computed in
    (float32 for 16-bit inputs), as in torch.
    """
    tensors = (x, residual, weight, None)
    key, plan = PLANS.look_up(backend, tensors, (eps, False))
    if plan is not None:
        try:
            return plan(*tensors)
        except RuntimeError:  # is raised below
            pass
    args = prepare_rms(x, weight, residual=residual, eps=eps)
    y, h, *_ = OP(*args, backend=backend)
    if key is not None:
        PLANS.remember(key, args, save=False)
    return y if residual is None else (y, h)


def prepare_rms(
    x: Tensor, weight: Tensor | None = None, *, residual: Tensor | None = None, eps: float | None = None
) -> tuple:
    if eps is None and isinstance(x, Tensor) and x.is_floating_point():
        eps = torch.finfo(reference.arithmetic_dtype(x)).eps
    return (*prepare(x, weight, residual=residual, eps=eps)[:-1], False)


def prepare(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple:
    """Validates a call of `layer_norm`; returns the arguments of the op."""
    named = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    for name, t in named.items():
        if not isinstance(t, Tensor) and (t is not None or name == "x"):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if not x.is_floating_point():
        raise RuntimeError(f"x must have a floating dtype, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise RuntimeError(f"x must have a last dimension to normalise over, got shape {list(x.shape)}")
    eps = number("eps", eps)
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    if not x.is_cpu and autocast_enabled(x.device.type):  # to float32, as torch's own: the statistics need it
        x, weight, bias, residual = (t if t is None else t.float() for t in (x, weight, bias, residual))
    for name, t, shape in (
        ("weight", weight, x.shape[-1:]),
        ("bias", bias, x.shape[-1:]),
        ("residual", residual, x.shape),
    ):
        if t is not None and t.shape != shape:
            raise RuntimeError(f"{name} must have shape {list(shape)}, got {list(t.shape)}")
        if t is not None and (t.dtype != x.dtype or t.device != x.device):
            raise RuntimeError(f"{name} must be {x.dtype} on {x.device} as x is, got {t.dtype} on {t.device}")
    return x, residual, weight, bias, eps, True


def _empty(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device)


def _fake_fwd(x, residual, *rest):
    rows, wide = x.numel() // x.shape[-1], reference.arithmetic_dtype(x)
    h = _empty(x, 0) if residual is None else _empty(x, *x.shape)
    return _empty(x, *x.shape), h, _empty(x, rows, dtype=wide), _empty(x, rows, dtype=wide)


def _fake_bwd(dy, dh, h, mean, rstd, need_parameters, x, residual, weight, bias, *rest):
    sizes = (x.shape[-1] if need_parameters and t is not None else 0 for t in (weight, bias))
    return _empty(x, *x.shape), *(_empty(x, size) for size in sizes)


def _backward(op, args, outputs, grads, needs, backend):
    x, residual = args[:2]
    _, h, mean, rstd = outputs
    dy, dh = grads
    if residual is None:  # h is empty then, and so is the gradient that a compiled graph makes of it
        h, dh = x, None
    d_h, d_weight, d_bias = op.bwd(dy, dh, h, mean, rstd, needs[2] or needs[3], *args, backend)
    return [
        d_h if needs[0] else None,
        d_h if needs[1] else None,
        d_weight if needs[2] else None,
        d_bias if needs[3] else None,
        None,
        None,
    ]


_LEAST = {torch.bfloat16: 3 << 16, torch.float32: 1 << 22}  # numbers of a layer norm
_SHORTEST = 24  # row of an RMS norm
_LEAST_OF_WEIGHT = 1 << 15  # numbers of an RMS norm whose weight alone has a gradient


def _only_weight_learns(x: Tensor, residual: Tensor | None, weight: Tensor | None) -> bool:
    """Whether a backward would need no gradient of the rows, most of what PyTorch's of an RMS norm takes its time for."""
    if weight is None or residual is not None or not torch.is_grad_enabled():
        return False
    return weight.requires_grad and not x.requires_grad


def prefer(x, residual, weight, bias, eps, center) -> tuple[str, ...]:
    """By the table "Normalisation and cross-entropy on the CPU" in docs/decisions.md; on a GPU PyTorch's
    own until the kernels have been timed there."""
    if center:
        worth = x.dtype in _LEAST and x.numel() >= _LEAST[x.dtype]
    else:
        worth = x.shape[-1] >= _SHORTEST and x.dtype != torch.float16
        worth = worth and (x.numel() >= _LEAST_OF_WEIGHT or not _only_weight_learns(x, residual, weight))
    return ("cpu", "torch") if worth else ("torch", "cpu")


_ARGS = "Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool center"
OP = Op(
    "norm",
    f"({_ARGS}) -> (Tensor y, Tensor h, Tensor mean, Tensor rstd)",
    f"(Tensor? dy, Tensor? dh, Tensor h, Tensor mean, Tensor rstd, bool need_parameters, {_ARGS})"
    " -> (Tensor d_h, Tensor d_weight, Tensor d_bias)",
    fake_fwd=_fake_fwd,
    fake_bwd=_fake_bwd,
    prefer=prefer,
    backward=_backward,
    differentiable=reference.fwd,
    results=2,
    reads_results=lambda x, residual, *rest: residual is not None,
)


class _Plans(Plans):
    """Plans of normalisations, of which the fastest takes 5 us: a key has only what the choice depends on, and is made in one
    function. Sizes of weight and bias, which PyTorch's function and ours check too, are not in it: where a plan raises, the
    checks of `prepare` have better words. What is recorded is for the plan itself to ask.
    """

    def look_up(self, backend: str, tensors: Sequence, options: tuple) -> tuple[tuple | None, Callable | None]:
        """As of `Plans`; `tensors` are x, residual, weight and bias, `options` eps and what else tells calls apart."""
        x, residual, weight, bias = tensors
        if is_dynamo_compiling() or type(x) is not Tensor or not _registry.is_free(backend):
            return None, None
        if not x.is_cpu or type(options[0]) not in _EPS:
            return None, None
        dtype, added, only_weight = x.dtype, None, False
        if weight is not None:
            if type(weight) not in _PLAIN or weight.dtype is not dtype or not weight.is_cpu:
                return None, None
            only_weight = torch.is_grad_enabled() and weight.requires_grad and not x.requires_grad
        if bias is not None and (type(bias) not in _PLAIN or bias.dtype is not dtype or not bias.is_cpu):
            return None, None
        if residual is not None:
            if type(residual) not in _PLAIN or residual.dtype is not dtype or not residual.is_cpu:
                return None, None
            added = residual.shape
        try:
            key = (x.shape, dtype, added, only_weight, options)
            return key, self._plans.get(key)
        except (RuntimeError, TypeError):  # a nested tensor has no shape, a list no hash
            return None, None


_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_EPS = frozenset((float, type(None)))
PLANS = _Plans(OP)
layer_norm.op, layer_norm.prepare = OP, prepare
rms_norm.op, rms_norm.prepare = OP, prepare_rms
