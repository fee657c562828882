"""bmk.lstm: what it takes, what it gives, which backend runs it."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from bigmodel_kernels import _registry
from bigmodel_kernels._arguments import flag, integer, number
from bigmodel_kernels._library import Op, autocast, have_plain_sizes, needs_grad
from bigmodel_kernels.ops.lstm import cpu, reference


def lstm(
    x: Tensor,  # [T, B, I]; [B, T, I] with batch_first; [tokens, I] with batch_sizes
    hx: tuple[Tensor, Tensor] | None,  # [L D, B, P], [L D, B, H]
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,  # [T]
    backend: str = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A multi-layer LSTM over whole sequences, as torch.nn.LSTM computes it.

    Args:
        x: input of any strides.
        hx: initial hidden and cell state; None for zeros.
        weights: torch.nn.LSTM's flat list: per layer and direction w_ih [4 H, I], w_hh [4 H, P], then b_ih and b_hh [4 H]
            unless there are no biases, then w_hr [P, H] if h is projected. Gates in the order i, f, g, o.
        num_layers, bidirectional: how many groups of weights there are.
        batch_first: whether dense x and output have the batch in front.
        dropout: probability of zeroing an output of every layer but the last, when `training`.
        batch_sizes: for packed sequences (PackedSequence.batch_sizes): how many go on at each step, longest first; on the CPU.
        backend: "auto", "cpu", "cuda", "torch" or "triton".

    Returns:
        output [T, B, D P] (or [B, T, D P], [tokens, D P]), and the final states (h_n [L D, B, P], c_n [L D, B, H]).

    Raises:
        RuntimeError: sizes, devices or dtypes that do not go together, named with what was expected; or the backend asked
            for cannot take the call.
        ValueError: dropout, num_layers or backend out of range.
        TypeError: an argument of the wrong type.
    """
    args = prepare(
        x, hx, weights, num_layers=num_layers, bidirectional=bidirectional, batch_first=batch_first, dropout=dropout,
        training=training, batch_sizes=batch_sizes,
    )  # fmt: skip
    p = args[8]
    if p > 0 and (torch.compiler.is_compiling() or _registry.select(OP.name, backend, prefer, args) != "torch"):
        # PyTorch's own op draws its own; all others are given the mask, so that the backward and its formula see the same.
        tokens = x.shape[0] if batch_sizes is not None else x.shape[0] * x.shape[1]
        width = args[1].shape[2] * (2 if bidirectional else 1)
        keep = torch.full((num_layers - 1, tokens, width), 1 - p, dtype=args[0].dtype, device=x.device)
        mask = torch.bernoulli(keep) / (1 - p) if p < 1 else torch.zeros_like(keep)
        args = (*args[:5], mask, *args[6:])
    output, h_n, c_n, *_ = OP(*args, backend=backend)
    return output.transpose(0, 1) if batch_first and batch_sizes is None else output, (h_n, c_n)


def prepare(
    x: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
) -> tuple:
    """Validates a call of `lstm`; returns the arguments of the op."""
    if not hasattr(weights, "__iter__"):
        raise TypeError(f"weights must be a list of tensors, got {type(weights).__name__}")
    weights = list(weights)
    _check_types(x, hx, weights, batch_sizes)
    bidirectional, batch_first = flag("bidirectional", bidirectional), flag("batch_first", batch_first)
    training, dropout = flag("training", training), number("dropout", dropout)
    if integer("num_layers", num_layers) < 1:
        raise ValueError(f"num_layers must be positive, got {num_layers}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be a probability in [0, 1], got {dropout}")
    # A model calls with the same few sizes again and again; symbolic ones are no keys.
    sizes = _known_sizes if have_plain_sizes((x,)) else _sizes
    cells, hidden, state = sizes(
        x.shape, tuple([w.shape for w in weights]), num_layers, bidirectional, batch_sizes is not None
    )
    if batch_first and batch_sizes is None:
        x = x.transpose(0, 1)
    if batch_sizes is None:
        if x.shape[0] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN: x has no steps")
        batch = x.shape[1]
    elif hx is not None:
        batch = hx[1].shape[1] if hx[1].dim() == 3 else -1
    else:
        batch = int(batch_sizes[0])
    if hx is None:
        hx = x.new_zeros(cells, batch, state), x.new_zeros(cells, batch, hidden)
    h0, c0 = hx
    _check_shape("hx[0]", h0.shape, (cells, batch, state))
    _check_shape("hx[1]", c0.shape, (cells, batch, hidden))
    save = needs_grad(x, h0, c0, weights)
    if batch_sizes is None or not x.is_cpu:  # as torch's own: its packed LSTM on the CPU returns what it was given
        x, h0, c0, weights = autocast(x, h0, c0, weights)
    dtype, device = x.dtype, x.device
    for i, t in enumerate((h0, c0, *weights)):
        if t.dtype != dtype or t.device != device:
            name = f"hx[{i}]" if i < 2 else f"weights[{i - 2}]"
            raise RuntimeError(f"{name} must be {dtype} on {device} as x is, got {t.dtype} on {t.device}")
    p = dropout if training and num_layers > 1 else 0.0
    return x, h0, c0, weights, batch_sizes, None, num_layers, bidirectional, p, save


def _check_types(x, hx, weights, batch_sizes) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if hx is not None and not (
        isinstance(hx, (tuple, list)) and len(hx) == 2 and isinstance(hx[0], Tensor) and isinstance(hx[1], Tensor)
    ):
        raise TypeError(f"hx must be None or two tensors (h_0, c_0), got {type(hx).__name__}")
    for i, w in enumerate(weights):
        if not isinstance(w, Tensor):
            raise TypeError(f"weights[{i}] must be a tensor, got {type(w).__name__}")
    if batch_sizes is not None and (
        not isinstance(batch_sizes, Tensor)
        or batch_sizes.dtype != torch.int64
        or batch_sizes.dim() != 1
        or not batch_sizes.is_cpu
    ):
        raise TypeError("batch_sizes must be a one-dimensional int64 tensor on the CPU")


def _check_shape(name: str, found: Sequence[int], shape: tuple[int, ...]) -> None:
    if found != shape:
        raise RuntimeError(f"{name} must have shape {list(shape)}, got {list(found)}")


def _sizes(
    x: Sequence[int], weights: tuple[Sequence[int], ...], num_layers: int, bidirectional: bool, packed: bool
) -> tuple[int, int, int]:
    """Checks the shapes of x and of the weights; returns how many cells there are, hidden size and width of h."""
    cells = num_layers * (2 if bidirectional else 1)
    if len(weights) % cells or not 2 <= len(weights) // cells <= 5:
        raise RuntimeError(
            f"weights must hold w_ih, w_hh, then b_ih, b_hh if there are biases, then w_hr if h is projected, for each of "
            f"{cells} layers and directions; got {len(weights)} tensors"
        )
    dims = 2 if packed else 3
    if len(x) != dims:
        raise RuntimeError(f"x must have {dims} dimensions {'with batch_sizes' if packed else ''}, got {len(x)}")
    n = len(weights) // cells
    hidden = weights[1][0] // 4 if len(weights[1]) == 2 else 0
    state = weights[-1][0] if n % 2 else hidden
    for i, w in enumerate(weights):
        cell, j = i // n, i % n
        layer_input = x[-1] if cell * num_layers < cells else state * (cells // num_layers)
        if j == 0:
            shape = (4 * hidden, layer_input)
        elif j == 1:
            shape = (4 * hidden, state)
        else:
            shape = (state, hidden) if j == n - 1 and n % 2 else (4 * hidden,)
        _check_shape(f"weights[{i}]", w, shape)
    return cells, hidden, state


_known_sizes = functools.lru_cache(maxsize=4096)(_sizes)


def saved_shapes(x, h0, c0, num_layers, bidirectional, save) -> tuple[tuple[int, ...], ...]:
    """Shapes of what the forward keeps for the backward: gates, cells, hidden."""
    tokens = x.shape[0] if x.dim() == 2 else x.shape[0] * x.shape[1]
    kept, rows = (h0.shape[0], tokens) if save else (0, 0)
    hidden, width = c0.shape[2], h0.shape[2] * (2 if bidirectional else 1)
    return (kept, tokens, 4 * hidden), (kept, tokens, hidden), (num_layers - 1, rows, width)


def saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of gates and cells: in 16 bits, 1 - i would lose all but a few of them where i is near 1."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake_fwd(x, h0, c0, weights, batch_sizes, dropout_mask, num_layers, bidirectional, dropout, save):
    width = h0.shape[2] * (2 if bidirectional else 1)
    gates, cells, hidden = saved_shapes(x, h0, c0, num_layers, bidirectional, save)
    dtype = saved_dtype(x.dtype)
    return (
        x.new_empty(*x.shape[:-1], width),
        h0.new_empty(h0.shape),
        c0.new_empty(c0.shape),
        x.new_empty(gates, dtype=dtype),
        x.new_empty(cells, dtype=dtype),
        x.new_empty(hidden),
    )


def _fake_bwd(
    d_output, d_h_n, d_c_n, output, gates, cells, hidden, need_d_x, need_d_weights,
    x, h0, c0, weights, *rest,
):  # fmt: skip
    d_weights = [w.new_empty(w.shape) for w in weights] if need_d_weights else []
    return x.new_empty(x.shape if need_d_x else 0), h0.new_empty(h0.shape), c0.new_empty(c0.shape), d_weights


def _backward(op, args, outputs, grads, needs, backend):
    output, _, _, gates, cells, hidden = outputs
    d_x, d_h0, d_c0, d_weights = op.bwd(*grads, output, gates, cells, hidden, needs[0], any(needs[3]), *args, backend)
    return d_x if needs[0] else None, d_h0, d_c0, d_weights or None, *[None] * 6


def _differentiable(x, h0, c0, weights, batch_sizes, dropout_mask, num_layers, bidirectional, dropout, save):
    return reference.forward(x, h0, c0, weights, batch_sizes, dropout_mask, num_layers, bidirectional)


def prefer(x, h0, c0, weights, batch_sizes, dropout_mask, num_layers, bidirectional, dropout, save) -> tuple[str, ...]:
    """All to the kernels but dense bfloat16 of some size, where oneDNN's products are faster: the table "LSTM on the CPU" in
    docs/decisions.md."""
    if x.dtype == torch.bfloat16 and batch_sizes is None and h0.shape[2] == c0.shape[2]:
        steps, batch, inputs = x.shape
        size = 4 * c0.shape[2] * (inputs + h0.shape[2])  # of a layer's weights
        if cpu.dots():
            onednn = not save and batch >= 8 and size >= 2**21
        else:
            onednn = batch * size > 2**19 and not (steps == 1 and batch <= 16) and not (save and batch <= 4)
        if onednn:
            return ("torch", "cpu")
    return ("cpu", "torch")


_ARGS = (
    "Tensor x, Tensor h0, Tensor c0, Tensor[] weights, Tensor? batch_sizes, Tensor? dropout_mask, int num_layers, "
    "bool bidirectional, float dropout, bool save"
)
OP = Op(
    "lstm",
    f"({_ARGS}) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells, Tensor hidden)",
    "(Tensor? d_output, Tensor? d_h_n, Tensor? d_c_n, Tensor output, Tensor gates, Tensor cells, Tensor hidden, "
    f"bool need_d_x, bool need_d_weights, {_ARGS}) -> (Tensor d_x, Tensor d_h0, Tensor d_c0, Tensor[] d_weights)",
    fake_fwd=_fake_fwd,
    fake_bwd=_fake_bwd,
    prefer=prefer,
    backward=_backward,
    differentiable=_differentiable,
    results=3,
    reads_results=lambda *args: (True, False, False),
)
lstm.op, lstm.prepare = OP, prepare
