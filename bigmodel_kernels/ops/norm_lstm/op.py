"""bmk.norm_lstm: the steps of one layer of an LSTM with layer norm."""

from __future__ import annotations

import functools

from torch import Tensor

from bigmodel_kernels._arguments import number
from bigmodel_kernels._library import Op, autocast, have_plain_sizes, needs_grad
from bigmodel_kernels.ops.lstm.op import saved_dtype
from bigmodel_kernels.ops.norm_lstm import reference

NAMES = ("a", "hx[0]", "hx[1]", "w", "gain", "gain_c", "bias_c")


def norm_lstm(
    a: Tensor,  # [T, B, 4 H]
    hx: tuple[Tensor, Tensor],  # [B, H], [B, H]
    w: Tensor,  # [4 H, H]
    gain: Tensor,  # [4 H]
    gain_c: Tensor,  # [H]
    bias_c: Tensor,  # [H]
    *,
    eps: float = 1e-5,
    eps_c: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """An LSTM whose recurrent product and cell state are normalised over the units (Ba, Kiros & Hinton 2016), one layer:

        [i f g o] = a_t + gain N(w h_(t-1))     c_t = sigmoid(f) c_(t-1) + sigmoid(i) tanh(g)
        h_t = sigmoid(o) tanh(gain_c N(c_t) + bias_c)

    Args:
        a: the input's part of the gates, with all biases.
        hx: hidden and cell state before the first step.
        eps, eps_c: added to the variances of the recurrent product and of the cell state.
        backend: "auto", "cpu", "torch" or "triton".

    Returns:
        output [T, B, H], and the states (h, c) [B, H] after the last step.

    Raises:
        RuntimeError: sizes, devices or dtypes that do not go together, or the backend asked for cannot take the call.
        TypeError: an argument of the wrong type.
        ValueError: an unknown backend.
    """
    args = prepare(a, hx, w, gain, gain_c, bias_c, eps=eps, eps_c=eps_c)
    output, h_n, c_n, *_ = OP(*args, backend=backend)
    return output, (h_n, c_n)


def prepare(
    a: Tensor,
    hx: tuple[Tensor, Tensor],
    w: Tensor,
    gain: Tensor,
    gain_c: Tensor,
    bias_c: Tensor,
    *,
    eps: float = 1e-5,
    eps_c: float = 1e-5,
) -> tuple:
    """Validates a call of `norm_lstm`; returns the arguments of the op."""
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        raise TypeError(f"hx must be two tensors (h, c), got {type(hx).__name__}")
    h, c = hx
    tensors = a, h, c, w, gain, gain_c, bias_c
    for i, t in enumerate(tensors):
        if not isinstance(t, Tensor):
            raise TypeError(f"{NAMES[i]} must be a tensor, got {type(t).__name__}")
    save = needs_grad(*tensors)
    tensors = autocast(*tensors)
    dtype, device = tensors[0].dtype, tensors[0].device
    for i, t in enumerate(tensors):
        if t.dtype != dtype or t.device != device:
            raise RuntimeError(f"{NAMES[i]} must be {dtype} on {device} as a is, got {t.dtype} on {t.device}")
    # A model calls with the same few sizes again and again; symbolic ones are no keys.
    check_sizes = _check_known_sizes if have_plain_sizes(tensors) else _check_sizes
    check_sizes(*[t.shape for t in tensors])
    return *tensors, number("eps", eps), number("eps_c", eps_c), save


def _check_sizes(a, *others) -> None:
    """Of the shapes."""
    if len(a) != 3 or a[0] == 0 or a[2] % 4:
        raise RuntimeError(f"a must have shape [T, B, 4 H] with at least one step, got {list(a)}")
    _, batch, rows = a
    hidden = rows // 4
    shapes = (batch, hidden), (batch, hidden), (rows, hidden), (rows,), (hidden,), (hidden,)
    for name, found, shape in zip(NAMES[1:], others, shapes):
        if found != shape:
            raise RuntimeError(f"{name} must have shape {list(shape)}, got {list(found)}")


_check_known_sizes = functools.lru_cache(maxsize=4096)(_check_sizes)


def empty_saved(a: Tensor, save: bool) -> list[Tensor]:
    """What the forward keeps for the backward, not filled: z, gates, cells."""
    steps, batch, rows = a.shape
    steps = steps if save else 0
    return [a.new_empty(steps, batch, n, dtype=saved_dtype(a.dtype)) for n in (rows, rows, rows // 4)]


def _fake_fwd(a, h0, c0, w, gain, gain_c, bias_c, eps, eps_c, save):
    return a.new_empty(*a.shape[:2], h0.shape[1]), a.new_empty(h0.shape), a.new_empty(c0.shape), *empty_saved(a, save)


def _fake_bwd(d_output, d_h_n, d_c_n, output, z, gates, cells, *args):
    return tuple(t.new_empty(t.shape) for t in args[:7])


def _backward(op, args, outputs, grads, needs, backend):
    output, _, _, *saved = outputs
    return *op.bwd(*grads, output, *saved, *args, backend), None, None, None


def _differentiable(*args):
    return reference.forward(*args[:-1])


def prefer(a, *rest) -> tuple[str, ...]:
    """The kernel was faster than the loop in PyTorch's ops at all sizes measured: "LSTM on the CPU" in docs/decisions.md."""
    return ("cpu", "torch")


_ARGS = "Tensor a, Tensor h0, Tensor c0, Tensor w, Tensor gain, Tensor gain_c, Tensor bias_c, float eps, float eps_c, bool save"
OP = Op(
    "norm_lstm",
    f"({_ARGS}) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor z, Tensor gates, Tensor cells)",
    "(Tensor? d_output, Tensor? d_h_n, Tensor? d_c_n, Tensor output, Tensor z, Tensor gates, Tensor cells, "
    f"{_ARGS}) -> (Tensor d_a, Tensor d_h0, Tensor d_c0, Tensor d_w, Tensor d_gain, Tensor d_gain_c, Tensor d_bias_c)",
    fake_fwd=_fake_fwd,
    fake_bwd=_fake_bwd,
    prefer=prefer,
    backward=_backward,
    differentiable=_differentiable,
    results=3,
)
norm_lstm.op, norm_lstm.prepare = OP, prepare
