"""bmk.attention_varlen: what it takes, what it gives, which backend runs it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bigmodel_kernels import _cpu, _registry
from bigmodel_kernels._arguments import flag, integer, number
from bigmodel_kernels._library import Op, autocast, needs_grad
from bigmodel_kernels.ops.attention.op import (
    check_floating,
    checked_dropout,
    checked_softcap,
    is_lower_right,
    keeps,
    lse_dtype,
    slopes_2d,
    window_sides,
)
from bigmodel_kernels.ops.attention_varlen import reference


def attention_varlen(
    q: Tensor,  # [total_q, Hq, D]
    k: Tensor,  # [total_k, Hkv, D]
    v: Tensor,  # [total_k, Hkv, Dv]
    cu_seqlens_q: Tensor,  # [B + 1]
    cu_seqlens_k: Tensor,  # [B + 1]
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
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
    """Attention within each of B sequences laid end to end: tokens cu_seqlens[b] .. cu_seqlens[b + 1] of q, and of k and v.

    No place is padded and nothing of the size of the scores is held; one launch for all sequences. On a CPU a call in bfloat16
    that records for a backward keeps what rounding takes from the results of sequences of more than 192 keys.

    Args:
        cu_seqlens_q, cu_seqlens_k: int32 or int64, rising from 0 to the total.
            Others raise, except by "triton" on a GPU, which would have to wait for it to look: there no other memory is
            read, and rows of no sequence hold anything.
        max_seqlen_q, max_seqlen_k: at least the longest sequence.
        The others: as bmk.attention.

    Returns:
        [total_q, Hq, Dv]; with return_lse also the log-sum-exp [Hq, total_q], float32 (float64 for float64 inputs).

    Raises:
        RuntimeError, ValueError, TypeError: as bmk.attention, and for cu_seqlens that do not fit the tokens.
    """
    args = prepare(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal=is_causal, alignment=alignment,
        scale=scale, dropout_p=dropout_p, enable_gqa=enable_gqa, window=window, softcap=softcap,
        alibi_slopes=alibi_slopes, return_lse=return_lse, deterministic=deterministic,
    )  # fmt: skip
    if dropout_p > 0 and (
        torch.compiler.is_compiling() or _registry.select(OP.name, backend, prefer, args) != "torch"
    ):  # PyTorch's own op draws its own numbers
        seed = torch.randint(0, 2**62, (1,), dtype=torch.int64, device=q.device)
        args = (*args[:6], seed, *args[7:])
    out, lse, *_ = OP(*args, backend=backend)
    return (out, lse) if return_lse else out


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
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
    """Validates a call of `attention_varlen`; returns the arguments of the op."""
    check_floating(q, k, v)
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 3:
            raise RuntimeError(f"{name} must have 3 dimensions [tokens, heads, features], got shape {list(t.shape)}")
    save = needs_grad(q, k, v)
    q, k, v = autocast(q, k, v)
    for name, t in (("k", k), ("v", v)):
        if t.dtype != q.dtype or t.device != q.device:
            raise RuntimeError(f"{name} must be {q.dtype} on {q.device} as q is, got {t.dtype} on {t.device}")
    for name, t in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(t, Tensor) or t.dtype not in (torch.int32, torch.int64) or t.dim() != 1 or t.numel() == 0:
            raise TypeError(
                f"{name} must be a one-dimensional int32 or int64 tensor with one element more than sequences"
            )
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise RuntimeError(
            f"cu_seqlens_k must have the length of cu_seqlens_q, {len(cu_seqlens_q)}, got {len(cu_seqlens_k)}"
        )
    if v.shape[0] != k.shape[0]:
        raise RuntimeError(f"v must have the {k.shape[0]} tokens of k, got {v.shape[0]}")
    if k.shape[2] != q.shape[2]:
        raise RuntimeError(f"k must have the head dimension of q, {q.shape[2]}, got {k.shape[2]}")
    left, right = window_sides(window)
    q = _check_heads(q, k, v, flag("enable_gqa", enable_gqa))
    if scale is None:
        scale = 1 / math.sqrt(q.shape[2]) if q.shape[2] else 1.0
    batch = cu_seqlens_q.shape[0] - 1
    return (
        q, k, v, cu_seqlens_q.to(q.device), cu_seqlens_k.to(q.device),
        None if alibi_slopes is None else slopes_2d(alibi_slopes, batch, q.shape[1], q.device),
        None, integer("max_seqlen_q", max_seqlen_q), integer("max_seqlen_k", max_seqlen_k), number("scale", scale),
        checked_dropout(dropout_p), checked_softcap(softcap), left,
        0 if flag("is_causal", is_causal) else right, is_lower_right(alignment), flag("return_lse", return_lse),
        torch.are_deterministic_algorithms_enabled() if deterministic is None else flag("deterministic", deterministic),
        save,
    )  # fmt: skip


def _check_heads(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> Tensor:
    """q, with as many heads as k where it has only one."""
    heads, kv_heads = q.shape[1], k.shape[1]
    if v.shape[1] != kv_heads:
        raise RuntimeError(f"v must have as many heads as k, {kv_heads}, got {v.shape[1]}")
    if heads == kv_heads or kv_heads == 1:
        return q
    if enable_gqa:
        if kv_heads == 0 or heads % kv_heads:
            raise RuntimeError(f"q must have a multiple of the {kv_heads} heads of k, got {heads} heads")
    elif heads == 1:
        return q.expand(-1, kv_heads, -1)
    else:
        raise RuntimeError(f"k must have the {heads} heads of q unless enable_gqa=True, got {kv_heads} heads")
    return q


SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? alibi_slopes, Tensor? seed, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, float dropout_p, float softcap, int window_left, int window_right, "
    "bool lower_right, bool return_lse, bool deterministic, bool save"
)


def _complete(outputs: tuple, q, k, v, *rest) -> tuple:
    """With what rounding took from out where a backend does not keep it: nothing."""
    if len(outputs) == 3:
        return outputs
    shape = (*q.shape[:2], v.shape[2]) if keeps(q, rest[-1]) else 0
    return *outputs, q.new_zeros(shape, dtype=torch.int16)


def _fake_fwd(q, k, v, *rest):
    total, heads, _ = q.shape
    results = q.new_empty(total, heads, v.shape[2]), q.new_empty(heads, total, dtype=lse_dtype(q))
    return _complete(results, q, k, v, *rest)


def _fake_bwd(grad_out, grad_lse, out, lse, kept, q, k, v, *rest):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def prefer(
    q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, seed, max_seqlen_q, max_seqlen_k, scale, dropout_p, softcap,
    window_left, window_right, lower_right, return_lse, deterministic, save,
) -> tuple[str, ...]:  # fmt: skip
    """By the table of docs/decisions.md: "cpu" is ahead of PyTorch's op on each sequence, which is what "torch" is, for all
    but bfloat16 on AMX tiles, where PyTorch keeps what bmk.attention leaves to it."""
    plain = not (dropout_p > 0 or softcap > 0 or return_lse) and window_left < 0 and alibi_slopes is None
    if q.dtype == torch.bfloat16 and plain and window_right < 0 and max_seqlen_q >= 32:
        theirs = torch.cpu._is_amx_tile_supported() and not _cpu.tiles_preferred("attention")
        return ("torch",) if theirs else ("cpu", "torch")
    return ("cpu", "torch")


def _backward(op, args, outputs, grads, needs, backend):
    out, lse, kept = outputs if len(outputs) == 3 else (*outputs, None)
    grad_out = torch.zeros_like(out) if grads[0] is None else grads[0]
    return [*op.bwd(grad_out, grads[1], out, lse, kept, *args, backend)] + [None] * (len(args) - 3)


OP = Op(
    "attention_varlen",
    f"({SCHEMA}) -> (Tensor out, Tensor lse, Tensor kept)",
    f"(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor? kept, {SCHEMA}) -> (Tensor dq, Tensor dk, Tensor dv)",
    fake_fwd=_fake_fwd,
    fake_bwd=_fake_bwd,
    prefer=prefer,
    backward=_backward,
    differentiable=reference.fwd,
    results=2,
    complete=_complete,
)
attention_varlen.prepare = prepare
attention_varlen.op = OP
