"""bmk.lstm_cell: one step of an LSTM."""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor

from bigmodel_kernels import _registry
from bigmodel_kernels._library import Op, autocast, have_plain_sizes, in_forward_mode, is_plain_eager, needs_grad
from bigmodel_kernels.ops.lstm.cpu import dots
from bigmodel_kernels.ops.lstm.op import saved_dtype
from bigmodel_kernels.ops.lstm_cell import cpu, reference

NAMES = ("x", "hx[0]", "hx[1]", "w_ih", "w_hh", "b_ih", "b_hh")


def lstm_cell(
    x: Tensor,  # [B, I]
    hx: tuple[Tensor, Tensor],  # [B, H], [B, H]
    w_ih: Tensor,  # [4 H, I]
    w_hh: Tensor,  # [4 H, H]
    b_ih: Tensor | None = None,  # [4 H]
    b_hh: Tensor | None = None,  # [4 H]
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM, as torch.nn.LSTMCell computes it; gates in the order i, f, g, o.

    Args:
        x: input of the step.
        hx: hidden and cell state before it.
        w_ih, w_hh, b_ih, b_hh: parameters as torch.nn.LSTMCell keeps them; both biases or neither.
        backend: "auto", "cpu", "cuda", "torch" or "triton".

    Returns:
        (h, c) after the step, [B, H] each.

    Raises:
        RuntimeError: sizes, devices or dtypes that do not go together, or the backend asked for cannot take the call.
        TypeError: an argument of the wrong type.
        ValueError: an unknown backend.
    """
    if not torch.is_grad_enabled() and type(hx) is tuple and len(hx) == 2:
        args = (x, *hx, w_ih, w_hh, b_ih, b_hh)
        if _goes_to_the_kernel(args, backend):
            # The kernel checks its arguments before it starts: to check them here too would take as long as a small step.
            with contextlib.suppress(RuntimeError, TypeError):
                return cpu.native()(*args)
    h, c, *_ = OP(*prepare(x, hx, w_ih, w_hh, b_ih, b_hh), backend=backend)
    return h, c


def _goes_to_the_kernel(args: tuple, backend: str) -> bool:
    """Whether this is an eager call, one without gradients, that gets the backend "cpu"."""
    if torch.compiler.is_compiling() or in_forward_mode() or _registry.wanted(backend) not in ("auto", "cpu"):
        return False
    if not is_plain_eager(range(7), args) or not all(isinstance(t, Tensor) for t in args[:5]):
        return False
    if cpu.supports(*args) is not None or args[0].dim() != 2:
        return False
    return _registry.select(OP.name, backend, prefer, (*args, False)) == "cpu"


def prepare(
    x: Tensor,
    hx: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple:
    """Validates a call of `lstm_cell`; returns the arguments of the op."""
    if not isinstance(hx, (tuple, list)):
        raise TypeError(f"hx must be two tensors (h, c), got {type(hx).__name__}")
    tensors = x, *hx, w_ih, w_hh, b_ih, b_hh
    # A model calls with the same few sizes again and again; symbolic ones are no keys.
    if len(hx) == 2 and have_plain_sizes(tensors):
        _check_known_sizes(*[None if t is None else t.shape for t in tensors])
    else:
        _check_types(x, hx, w_ih, w_hh, b_ih, b_hh)
        _check_sizes(*[None if t is None else t.shape for t in tensors])
    save = needs_grad(*tensors)
    if not x.is_cpu:  # as torch's own: on the CPU its cell returns what it was given
        tensors = autocast(*tensors)
    dtype, device = tensors[0].dtype, tensors[0].device
    for i, t in enumerate(tensors):
        if t is not None and (t.dtype is not dtype or t.device != device):
            raise RuntimeError(f"{NAMES[i]} must be {dtype} on {device} as x is, got {t.dtype} on {t.device}")
    return *tensors, save


def _check_types(x, hx, w_ih, w_hh, b_ih, b_hh) -> None:
    if not all(isinstance(t, Tensor) for t in hx):
        raise TypeError(f"hx must be two tensors (h, c), got {type(hx).__name__} of other things")
    if len(hx) != 2:
        raise RuntimeError("lstm_cell expects two hidden states")
    for name, t in {"x": x, "w_ih": w_ih, "w_hh": w_hh, "b_ih": b_ih, "b_hh": b_hh}.items():
        if not isinstance(t, (Tensor, type(None))):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")


def _check_sizes(x, h, c, w_ih, w_hh, b_ih, b_hh) -> None:
    """Of the shapes; None for what is left out, which only both biases may be."""
    for name, shape in zip(NAMES, (x, h, c, w_ih, w_hh)):
        if shape is None:
            raise TypeError(f"{name} must be a tensor, got NoneType")
    if (b_ih is None) != (b_hh is None):
        raise RuntimeError("b_ih and b_hh must be given both or neither")
    for name, shape in zip(NAMES, (x, h, c, w_ih, w_hh)):
        if len(shape) != 2:
            raise RuntimeError(f"{name} must have 2 dimensions, got {len(shape)}")
    hidden = w_hh[1]
    if x[1] != w_ih[1]:
        raise RuntimeError(f"input has inconsistent input_size: got {x[1]} expected {w_ih[1]}")
    for i, state in enumerate((h, c)):
        if state[0] != x[0]:
            raise RuntimeError(f"Input batch size {x[0]} doesn't match hidden{i} batch size {state[0]}")
        if state[1] != hidden:
            raise RuntimeError(f"hidden{i} has inconsistent hidden_size: got {state[1]}, expected {hidden}")
    for name, found, shape in zip(
        NAMES[3:], (w_ih, w_hh, b_ih, b_hh), ((4 * hidden, x[1]), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,))
    ):
        if found is not None and found != shape:
            raise RuntimeError(f"{name} must have shape {list(shape)}, got {list(found)}")


_check_known_sizes = functools.lru_cache(maxsize=4096)(_check_sizes)


def saved_shapes(x, h, save) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of what the forward keeps for the backward: gates, cells."""
    kept, batch, hidden = int(save), x.shape[0], h.shape[1]
    return (kept, batch, 4 * hidden), (kept, batch, hidden)


def _fake_fwd(x, h, c, w_ih, w_hh, b_ih, b_hh, save):
    saved = [x.new_empty(shape, dtype=saved_dtype(x.dtype)) for shape in saved_shapes(x, h, save)]
    return h.new_empty(h.shape), c.new_empty(c.shape), *saved


def _fake_bwd(d_h, d_c, h_new, gates, cells, need_d_x, need_d_weights, x, h, c, *weights_and_save):
    weights = weights_and_save[:4]
    d_weights = [w.new_empty(w.shape) for w in weights if w is not None] if need_d_weights else []
    return x.new_empty(x.shape if need_d_x else 0), h.new_empty(h.shape), c.new_empty(c.shape), d_weights


def _backward(op, args, outputs, grads, needs, backend):
    _, _, gates, cells = outputs
    # A step's gradient reads no h_new, which the caller may overwrite: the state before it stands in its place.
    d_x, d_h, d_c, d_weights = op.bwd(*grads, args[1], gates, cells, needs[0], any(needs[3:7]), *args, backend)
    d_weights = d_weights + [None] * (4 - len(d_weights))
    return d_x if needs[0] else None, d_h, d_c, *d_weights, None


def _differentiable(*args):
    return reference.forward(*args[:-1])


def prefer(x, h, c, w_ih, w_hh, b_ih, b_hh, save) -> tuple[str, ...]:
    """Without gradients all steps, with gradients those that repay a call to the kernel, and in bfloat16 those small enough that
    oneDNN's products are not faster: the table "LSTM on the CPU" in docs/decisions.md."""
    batch, size = x.shape[0], w_ih.numel() + w_hh.numel()
    if x.dtype != torch.bfloat16:
        ours = not save or batch * size > 2**20
    elif save:
        ours = dots() and batch <= 32 and size <= 2**17
    else:
        ours = dots() and (batch <= 8 or batch * size <= 2**22)
    return ("cpu", "torch") if ours else ("torch", "cpu")


_ARGS = "Tensor x, Tensor h, Tensor c, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, bool save"
OP = Op(
    "lstm_cell",
    f"({_ARGS}) -> (Tensor h_new, Tensor c_new, Tensor gates, Tensor cells)",
    "(Tensor? d_h_new, Tensor? d_c_new, Tensor h_new, Tensor gates, Tensor cells, bool need_d_x, bool need_d_weights, "
    f"{_ARGS}) -> (Tensor d_x, Tensor d_h, Tensor d_c, Tensor[] d_weights)",
    fake_fwd=_fake_fwd,
    fake_bwd=_fake_bwd,
    prefer=prefer,
    backward=_backward,
    differentiable=_differentiable,
    results=2,
    reads_results=lambda *args: False,
)
lstm_cell.op, lstm_cell.prepare = OP, prepare
