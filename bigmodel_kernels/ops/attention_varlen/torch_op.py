"""PyTorch's own attention of one sequence after the other: the fallback, and the baseline of the other backends."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from bigmodel_kernels.ops.attention import torch_op as attention
from bigmodel_kernels.ops.attention_varlen import reference


def supports(*args) -> str | None:
    return None


def check_lengths(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, seed, max_seqlen_q, max_seqlen_k, *rest):
    """The lengths of the sequences, of q and of k; raises RuntimeError for those that do not fit. Waits for a GPU."""
    return _lengths("q", cu_seqlens_q, q.shape[0], max_seqlen_q), _lengths("k", cu_seqlens_k, k.shape[0], max_seqlen_k)


def _lengths(name: str, cu_seqlens: Tensor, total: int, longest: int) -> list[int]:
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != total or any(b < a for a, b in pairwise(ends)):
        raise RuntimeError(f"cu_seqlens_{name} must rise from 0 to the {total} tokens, got {ends}")
    if any(b - a > longest for a, b in pairwise(ends)):
        raise RuntimeError(f"max_seqlen_{name} must be at least the longest sequence, got {longest} with {ends}")
    return [b - a for a, b in pairwise(ends)]


def _split(t: Tensor | None, lengths: list[int], heads_first: bool = False) -> list[Tensor | None]:
    """Each sequence as [1, H, S, ..] of [tokens, H, ..]; of [H, tokens] as [1, H, S]."""
    if t is None:
        return [None] * len(lengths)
    if heads_first:
        return [part[None] for part in t.split(lengths, 1)]
    return [part.transpose(0, 1)[None] for part in t.split(lengths)]


def _join(parts: list[Tensor], heads_first: bool = False) -> Tensor:
    """The reverse of _split."""
    return torch.cat([p[0] for p in parts], 1) if heads_first else torch.cat([p[0].transpose(0, 1) for p in parts])


def _sequences(args: tuple):
    """(q, k, v, None, alibi_slopes) of each sequence, the arguments that follow the seed, and the lengths of q."""
    q, k, v, _, _, alibi_slopes, *_ = args
    q_lengths, k_lengths = check_lengths(*args)
    if not q_lengths:
        q_lengths, k_lengths, alibi_slopes = [0], [0], None  # one of no tokens gives what none gives
    slopes = [None] * len(q_lengths) if alibi_slopes is None else alibi_slopes.expand(len(q_lengths), -1).split(1)
    parts = (_split(q, q_lengths), _split(k, k_lengths), _split(v, k_lengths), [None] * len(q_lengths), slopes)
    return list(zip(*parts)), args[9:], q_lengths


def call(*args):
    """(out, lse or None), differentiable by PyTorch's own autograd."""
    sequences, options, _ = _sequences(args)
    out, lse = zip(*[attention.call(*tensors, None, *options) for tensors in sequences])
    return _join(out), None if lse[0] is None else _join(lse, True)


def fwd(*args):
    dropout_p = args[10]
    if dropout_p > 0:  # by the one seed that the backward gets as well
        return tuple(t.contiguous() for t in reference.fwd(*args))
    sequences, options, _ = _sequences(args)
    out, lse = zip(*[attention.fwd(*tensors, None, *options) for tensors in sequences])
    return _join(out), _join(lse, True)


def bwd(grad_out, grad_lse, out, lse, kept, *args):
    dropout_p = args[10]
    if dropout_p > 0:
        return tuple(t.contiguous() for t in reference.bwd(grad_out, grad_lse, out, lse, *args))
    sequences, options, lengths = _sequences(args)
    saved = zip(
        _split(grad_out, lengths), _split(grad_lse, lengths, True), _split(out, lengths), _split(lse, lengths, True)
    )
    grads = [
        attention.bwd(*of_one, None, False, *tensors, None, *options)[:3] for of_one, tensors in zip(saved, sequences)
    ]
    return tuple(_join(of_all) for of_all in zip(*grads))
