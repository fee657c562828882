"""What goes with LSTMs on packed sequences."""

from __future__ import annotations

import torch
from torch import _VF, Tensor
from torch.nn.utils.rnn import PackedSequence

from bigmodel_kernels._library import is_plain_eager, needs_grad


def pad_packed_sequence(
    sequence: PackedSequence,
    batch_first: bool = False,
    padding_value: float = 0.0,
    total_length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """torch.nn.utils.rnn.pad_packed_sequence, whose gradient is one pass over the tokens.

    PyTorch's own backward makes a copy of the whole gradient for every run of steps with as many sequences.

    Returns:
        The padded sequences [T, B, ..] ([B, T, ..] with batch_first), and the length of each [B].

    Raises:
        ValueError: total_length is less than the longest sequence.
    """
    steps = sequence.batch_sizes.size(0)
    if total_length is not None and total_length < steps:
        raise ValueError(
            "Expected total_length to be at least the length of the longest sequence in input, "
            f"but got total_length={total_length} and max sequence length being {steps}"
        )
    args = (
        sequence.data,
        sequence.batch_sizes,
        batch_first,
        padding_value,
        steps if total_length is None else total_length,
    )
    by_hand = needs_grad(sequence.data) and is_plain_eager((0,), args)
    padded, lengths = _Pad.apply(*args) if by_hand else _VF._pad_packed_sequence(*args)
    if (order := sequence.unsorted_indices) is None:
        return padded, lengths
    return padded.index_select(0 if batch_first else 1, order), lengths[order.cpu()]


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, data, batch_sizes, batch_first, padding_value, total_length):
        padded, ctx.lengths = _VF._pad_packed_sequence(data, batch_sizes, batch_first, padding_value, total_length)
        ctx.batch_first = batch_first
        ctx.mark_non_differentiable(ctx.lengths)
        return padded, ctx.lengths

    @staticmethod
    def backward(ctx, d_padded, _):
        d_data, _ = _VF._pack_padded_sequence(d_padded, ctx.lengths, ctx.batch_first)
        return d_data, None, None, None, None
