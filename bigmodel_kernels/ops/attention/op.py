"""bmk.attention: what it takes, what it gives, which backend runs it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bigmodel_kernels import _cpu, _registry
from bigmodel_kernels._arguments import flag, integer, number
from bigmodel_kernels._library import Op, autocast, needs_grad
from bigmodel_kernels._plans import Plans
from bigmodel_kernels.ops.attention import reference

ALIGNMENTS = ("upper_left", "lower_right")
# What the CPU's forward keeps for a backward beside out and lse, as the op is told; 0 where no gradient may be asked for.
NOTHING, REST, PROBABILITIES = 1, 2, 3


def attention(
    q: Tensor,  # [B, Hq, Sq, D]
    k: Tensor,  # [B, Hkv, Sk, D]
    v: Tensor,  # [B, Hkv, Sk, Dv]
    *,
    attn_mask: Tensor | None = None,  # broadcastable to [B, Hq, Sq, Sk]
    is_causal: bool = False,
    alignment: str = "upper_left",
    scale: float | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,  # [Hq] or [B, Hq]
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(softcap(scale q k^T) + bias) v, without holding the Sq x Sk scores (Milakov & Gimelshein 2018, Dao et al. 2022).

    On a CPU a call in bfloat16 that records for a backward keeps more than its result: of more than 192 keys what rounding takes
    from it, of fewer, where there are dot products of bfloat16, its probabilities, in 2 bytes each and no more than q, k, v and
    the result take together; nothing else of size Sq x Sk is ever held.

    Query i stands at position p = i (alignment "upper_left") or i + Sk - Sq ("lower_right", so that the last query sees the
    last key) among the keys. A query with no key to attend to gives exactly 0, zero gradients and lse = -inf, and
    infinities or NaNs in keys and values that are masked out never reach a result.

    Args:
        q, k, v: of any strides; 3 dimensions mean [H, S, D], 2 mean [S, D], more than 4 mean more batch dimensions.
        attn_mask: bool (True: attend) or floating (added to the scores; has a gradient). May go together with is_causal.
        is_causal: attend to the keys up to position p.
        scale: 1 / sqrt(D) if None.
        dropout_p: probability of dropping a weight. Draws one seed from torch's generator.
        enable_gqa: let Hq be a multiple of Hkv: every Hq / Hkv query heads share a key/value head.
        window: attend to keys from p - left to p + right; (left, right), None for no limit, or one int for both.
        softcap: scores become softcap * tanh(score / softcap) if not 0 (Gemma 2).
        alibi_slopes: slope * |p - key| is taken from the scores (Press et al. 2021); no gradient.
        return_lse: also return the log-sum-exp of the scores, [B, Hq, Sq], float32 (float64 for float64 inputs), differentiable.
        deterministic: give the same bits on every run; None for what torch.use_deterministic_algorithms says. On the CPU
            it always holds, for any number of threads.
        backend: "auto", "cpu", "torch" or "triton".

    Returns:
        [B, Hq, Sq, Dv], stored as [B, Sq, Hq, Dv], so that merging the heads afterwards costs nothing; with return_lse also lse.

    Raises:
        RuntimeError: sizes, devices or dtypes that do not go together, or the backend asked for cannot take the call.
        ValueError: dropout_p, window, softcap, alignment or backend out of range.
        TypeError: an argument of the wrong type.
    """
    key = plan = None
    if attn_mask is None and alibi_slopes is None and dropout_p == 0 and not return_lse:
        tensors, window = (q, k, v), tuple(window) if isinstance(window, list) else window
        options = (is_causal, alignment, scale, dropout_p, enable_gqa, window, softcap, deterministic)
        key, plan = _PLANS.look_up(backend, tensors, options)
        if plan is not None:
            return plan(*tensors)
    args = prepare(
        q, k, v, attn_mask=attn_mask, is_causal=is_causal, alignment=alignment, scale=scale, dropout_p=dropout_p,
        enable_gqa=enable_gqa, window=window, softcap=softcap, alibi_slopes=alibi_slopes, return_lse=return_lse,
        deterministic=deterministic,
    )  # fmt: skip
    if dropout_p > 0 and (
        torch.compiler.is_compiling() or _registry.select(OP.name, backend, prefer, args) != "torch"
    ):  # PyTorch's own op draws its own numbers
        seed = torch.randint(0, 2**62, (1,), dtype=torch.int64, device=q.device)
        args = (*args[:5], seed, *args[6:])
    out, lse, *_ = OP(*args, backend=backend)
    if key is not None and q.dim() == 4:
        _PLANS.remember(key, args, save=args[-1])
    if q.dim() != 4:
        shape, first = _batch_shape(q, k, v), max(1, 4 - q.dim())
        out, lse = (t if t is None else t.reshape(*shape, *t.shape[first:]) for t in (out, lse))
    return (out, lse) if return_lse else out


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    alignment: str = "upper_left",
    scale: float | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
) -> tuple:
    """Validates a call of `attention`; returns the arguments of the op."""
    check_floating(q, k, v)
    dropout_p, softcap = checked_dropout(dropout_p), checked_softcap(softcap)
    lower_right = is_lower_right(alignment)
    left, right = window_sides(window)
    is_causal, enable_gqa = flag("is_causal", is_causal), flag("enable_gqa", enable_gqa)
    save = needs_grad(q, k, v, attn_mask)
    q, k, v = autocast(q, k, v)
    _check_same("k", k, q)
    _check_same("v", v, q)
    q, k, v = _four_dimensions(q, k, v, enable_gqa)
    depth = q.shape[3]
    if scale is None:
        scale = 1 / math.sqrt(depth) if depth else 1.0
    return (
        q,
        k,
        v,
        None if attn_mask is None else check_mask(attn_mask, q, (*q.shape[:3], k.shape[2])),
        None if alibi_slopes is None else slopes_2d(alibi_slopes, q.shape[0], q.shape[1], q.device),
        None,
        number("scale", scale),
        dropout_p,
        softcap,
        left,
        0 if is_causal else right,
        lower_right,
        flag("return_lse", return_lse),
        torch.are_deterministic_algorithms_enabled() if deterministic is None else flag("deterministic", deterministic),
        _kept_of(q, v, dropout_p, softcap) if keeps(q, save) else int(save),
    )


def check_floating(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if not t.is_floating_point():
            raise RuntimeError(f"{name} must have a floating dtype, got {t.dtype}")


def is_lower_right(alignment: str) -> bool:
    if alignment not in ALIGNMENTS:
        raise ValueError(f"alignment must be one of {', '.join(ALIGNMENTS)}; got {alignment!r}")
    return alignment == "lower_right"


def checked_dropout(dropout_p: float) -> float:
    dropout_p = number("dropout_p", dropout_p)
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be a probability in [0, 1], got {dropout_p}")
    return dropout_p


def checked_softcap(softcap: float) -> float:
    softcap = number("softcap", softcap)
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap must be 0 (none) or positive, got {softcap}")
    return softcap


def window_sides(window: int | tuple[int | None, int | None] | None) -> tuple[int, int]:
    """(left, right) with -1 for no limit."""
    if window is None:
        return -1, -1
    sides = (window, window) if isinstance(window, int) else tuple(window) if isinstance(window, (tuple, list)) else ()
    if len(sides) != 2 or any(isinstance(side, bool) or not isinstance(side, (int, type(None))) for side in sides):
        raise TypeError(f"window must be None, an int or a pair (left, right) of ints or None, got {window!r}")
    for side in sides:
        if side is not None and integer("window", side) < 0:
            raise ValueError(f"window must not be negative (None stands for no limit), got {window!r}")
    left, right = (-1 if side is None else side for side in sides)
    return left, right


def _check_same(name: str, t: Tensor, q: Tensor) -> None:
    if t.dtype != q.dtype or t.device != q.device:
        raise RuntimeError(f"{name} must be {q.dtype} on {q.device} as q is, got {t.dtype} on {t.device}")
    if t.dim() != q.dim() or t.dim() < 2:
        raise RuntimeError(f"{name} and q must have the same 2 or more dimensions, got {t.dim()} and {q.dim()}")


def _batch_shape(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    """All dimensions before the heads, of tensors that broadcast there."""
    shapes = [tuple(t.shape[:-3]) for t in (q, k, v)]
    return shapes[0] if shapes[0] == shapes[1] == shapes[2] else tuple(torch.broadcast_shapes(*shapes))


def _four_dimensions(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """[B, H, S, D] each, checked against each other; batch dimensions of size 1 are broadcast, as heads are without GQA."""
    dims = q.dim()
    try:
        batch = _batch_shape(q, k, v)
    except RuntimeError:
        raise RuntimeError(
            f"k and v must have the batch dimensions of q, got {[list(t.shape) for t in (q, k, v)]}"
        ) from None
    if dims < 4:
        q, k, v = (_lead(t, 4 - dims) for t in (q, k, v))
    elif dims > 4 or not (q.shape[0] == k.shape[0] == v.shape[0]):
        q, k, v = (t.expand(*batch, *t.shape[-3:]).reshape(-1, *t.shape[-3:]) for t in (q, k, v))
    if k.shape[-1] != q.shape[-1]:
        raise RuntimeError(f"k must have the head dimension of q, {q.shape[-1]}, got {k.shape[-1]}")
    if v.shape[-2] != k.shape[-2]:
        raise RuntimeError(f"v must have as many positions as k, {k.shape[-2]}, got {v.shape[-2]}")
    heads, kv_heads = q.shape[1], k.shape[1]
    if v.shape[1] != kv_heads:
        if kv_heads != 1 and v.shape[1] != 1:
            raise RuntimeError(f"v must have as many heads as k, {kv_heads}, got {v.shape[1]}")
        kv_heads = max(kv_heads, v.shape[1])
        k, v = (t.expand(-1, kv_heads, -1, -1) for t in (k, v))
    if heads != kv_heads:
        if enable_gqa:
            if kv_heads == 0 or heads % kv_heads:
                raise RuntimeError(f"q must have a multiple of the {kv_heads} heads of k, got {heads} heads")
        elif heads == 1:
            q = q.expand(-1, kv_heads, -1, -1)
        elif kv_heads != 1:
            raise RuntimeError(f"k must have the {heads} heads of q unless enable_gqa=True, got {kv_heads} heads")
    return q, k, v


def _lead(t: Tensor, count: int) -> Tensor:
    for _ in range(count):
        t = t.unsqueeze(0)
    return t


def check_mask(mask: Tensor, q: Tensor, full: tuple[int, int, int, int]) -> Tensor:
    """attn_mask as [B or 1, Hq or 1, Sq or 1, Sk or 1], of `full` sizes, for queries on the device and of the dtype of q."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"attn_mask must be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise RuntimeError(f"attn_mask must be bool or floating, got {mask.dtype}")
    if mask.device != q.device:
        raise RuntimeError(f"attn_mask must be on {q.device} as q is, got {mask.device}")
    if mask.dim() > 4:
        mask = mask.flatten(0, mask.dim() - 4)
    mask = _lead(mask, 4 - mask.dim())
    if any(size != 1 and size != wanted for size, wanted in zip(mask.shape, full)):
        raise RuntimeError(f"attn_mask must broadcast to {list(full)}, got shape {list(mask.shape)}")
    if mask.dtype in (torch.bool, torch.float32, q.dtype):
        return mask
    return mask.to(q.dtype)


def slopes_2d(slopes: Tensor, batch: int, heads: int, device: torch.device) -> Tensor:
    """alibi_slopes as float32 [B or 1, Hq], contiguous."""
    if not isinstance(slopes, Tensor):
        raise TypeError(f"alibi_slopes must be a tensor, got {type(slopes).__name__}")
    if not slopes.is_floating_point() or slopes.device != device:
        raise RuntimeError(f"alibi_slopes must be floating on {device}, got {slopes.dtype} on {slopes.device}")
    if slopes.requires_grad:
        raise ValueError("alibi_slopes must not require a gradient: it has none; pass alibi_slopes.detach()")
    if (
        slopes.dim() not in (1, 2)
        or slopes.shape[-1] != heads
        or (slopes.dim() == 2 and slopes.shape[0] not in (1, batch))
    ):
        raise RuntimeError(f"alibi_slopes must have shape [{heads}] or [{batch}, {heads}], got {list(slopes.shape)}")
    return (slopes if slopes.dim() == 2 else slopes[None]).float().contiguous()


SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor? attn_mask, Tensor? alibi_slopes, Tensor? seed, float scale, float dropout_p, "
    "float softcap, int window_left, int window_right, bool lower_right, bool return_lse, bool deterministic, int save"
)


def lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def heads_inside(q: Tensor, batch: int, heads: int, length: int, width: int) -> Tensor:
    """An empty [B, H, S, D] that is stored as [B, S, H, D]: the layout of all results."""
    return q.new_empty(batch, length, heads, width).transpose(1, 2)


def keeps(q: Tensor, save: bool) -> bool:
    """Whether the CPU's forward may keep more for its backward than out and lse."""
    return save and q.dtype == torch.bfloat16 and q.device.type == "cpu"


def _kept_rows(heads: int, kv_heads: int, length: int, keys: int) -> tuple[int, int]:
    """Of a group's probabilities: how many rows, and from a row to the next."""
    return heads // max(kv_heads, 1) * length, (keys + 15) // 16 * 16


def _kept_of(q: Tensor, v: Tensor, dropout_p: float, softcap: float) -> int:
    """By the rules of csrc/cpu/attention_args.h, on any CPU: of more than 192 keys what rounding takes from out, of fewer the
    probabilities where they take no more than q, k, v and out do. Nothing where a compiler does not know."""
    holds = torch.fx.experimental.symbolic_shapes.guard_or_false if torch.compiler.is_compiling() else bool
    (_, heads, length, depth), (_, kv_heads, keys, width) = q.shape, v.shape
    if holds(keys > 192):
        return REST
    if dropout_p > 0 or softcap > 0 or not holds(keys <= 192):
        return NOTHING
    rows, row = _kept_rows(heads, kv_heads, length, keys)
    fits = holds(rows >= 32) and holds(rows * row <= (rows + keys) * (depth + width))
    return PROBABILITIES if fits else NOTHING


def _new_kept(q: Tensor, k: Tensor, v: Tensor, *rest) -> Tensor:
    """An empty tensor for what the op is told to keep."""
    (batch, heads, length, _), (_, kv_heads, keys, width) = q.shape, v.shape
    if rest[-1] == REST:
        return q.new_empty(batch * heads, length, width, dtype=torch.int16)
    if rest[-1] == PROBABILITIES:
        return q.new_empty(batch * kv_heads, *_kept_rows(heads, kv_heads, length, keys), dtype=torch.float16)
    return q.new_empty(0)


def _complete(outputs: tuple, *args) -> tuple:
    """With a tensor of which the CPU's backward knows that nothing was kept: rounding took nothing, a probability is negative."""
    if len(outputs) == 3:
        return outputs
    kept = _new_kept(*args)
    if kept.dtype == torch.int16:
        kept.zero_()
    elif kept.numel() > 0:
        kept[0, 0, 0] = -1
    return *outputs, kept


def _fake_fwd(q, k, v, *rest):
    batch, heads, length, _ = q.shape
    return (
        heads_inside(q, batch, heads, length, v.shape[3]),
        q.new_empty(batch, heads, length, dtype=lse_dtype(q)),
        _new_kept(q, k, v, *rest),
    )


def _fake_bwd(grad_out, grad_lse, out, lse, kept, mask_grad, q, k, v, attn_mask, *rest):
    batch, heads, length, depth = q.shape
    kv_heads, k_length, width = v.shape[1:]
    return (
        heads_inside(q, batch, heads, length, depth),
        heads_inside(q, batch, kv_heads, k_length, depth),
        heads_inside(q, batch, kv_heads, k_length, width),
        attn_mask.new_empty(attn_mask.shape) if mask_grad else q.new_empty(0),
    )


def prefer(
    q, k, v, attn_mask, alibi_slopes, seed, scale, dropout_p, softcap, window_left, window_right, lower_right, return_lse,
    deterministic, save,
) -> tuple[str, ...]:  # fmt: skip
    """By the table of docs/decisions.md: "cpu" is ahead for every dtype and flag, in small plain calls by little.

    PyTorch multiplies bfloat16 on AMX tiles where the machine has any; there its kernel is kept for all but decoding, until
    `python -m bigmodel_kernels tune --cpu` has found ours faster.
    What masks anything out is never given to PyTorch's kernels: NaNs behind the mask would come through.
    """
    masked = attn_mask is not None or window_left >= 0 or window_right >= 0
    if masked or dropout_p > 0 or softcap > 0 or alibi_slopes is not None or return_lse or q.dtype != torch.bfloat16:
        return ("cpu", "torch")
    theirs = q.shape[2] >= 32 and torch.cpu._is_amx_tile_supported() and not _cpu.tiles_preferred("attention")
    return ("torch",) if theirs else ("cpu", "torch")


def _backward(op, args, outputs, grads, needs, backend):
    out, lse, kept = outputs if len(outputs) == 3 else (*outputs, None)
    grad_out = torch.zeros_like(out) if grads[0] is None else grads[0]
    mask_grad = bool(needs[3])
    dq, dk, dv, dmask = op.bwd(grad_out, grads[1], out, lse, kept, mask_grad, *args, backend)
    return [dq, dk, dv, dmask if mask_grad else None] + [None] * (len(args) - 4)


OP = Op(
    "attention",
    f"({SCHEMA}) -> (Tensor out, Tensor lse, Tensor kept)",
    f"(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor? kept, bool mask_grad, {SCHEMA})"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dmask)",
    fake_fwd=_fake_fwd,
    fake_bwd=_fake_bwd,
    prefer=prefer,
    backward=_backward,
    differentiable=reference.fwd,
    results=2,
    complete=_complete,
)
_PLANS = Plans(OP)
attention.prepare = prepare
attention.op = OP
