"""Deep Speech 2: from spectrograms to letters. Amodei et al.: Deep Speech 2 (2015), with LSTMs as its recurrent layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from bigmodel_kernels import nn as bnn
from bigmodel_kernels.nn.fused import conv_block

BLANK = 0  # the class that stands for no letter
CLIP = 20.0  # the paper's clipped ReLU: min(max(x, 0), 20)
# Kernel, stride and padding over (frequency, time): the paper's table 4, its networks with one to three convolutions.
CONVOLUTIONS = (
    ((41, 11), (2, 2), (20, 5)),
    ((21, 11), (2, 1), (10, 5)),
    ((21, 11), (2, 1), (10, 5)),
)
CHANNELS = (32, 32, 96)


class DeepSpeech(nn.Module):
    """Convolutions over frequency and time, bidirectional LSTMs whose directions are added up, and a linear layer, for CTC.

    Frames past a sequence's length, NaN included, reach no result: they are zero before each convolution, and the recurrent
    layers run on packed sequences. In training the batch norms of the convolutions count them, as zeros; those between the
    recurrent layers are the paper's sequence-wise ones, over the valid frames of the whole batch.

    Args:
        num_classes: letters and the blank, which is class 0.
        frequencies: of the spectrogram; 161 for windows of 20 ms at 16 kHz.
        hidden_size: units of each direction.
        num_layers: recurrent layers.
        convolutions: how many of the paper's, 1 to 3.
        channels: output channels of each convolution; the paper's by default.
        bidirectional: False for streams, where a layer sees the past only.
    """

    def __init__(
        self,
        num_classes: int,
        frequencies: int = 161,
        hidden_size: int = 800,
        num_layers: int = 5,
        *,
        convolutions: int = 2,
        channels: Sequence[int] = CHANNELS,
        bidirectional: bool = True,
    ) -> None:
        super().__init__()
        if not 1 <= convolutions <= len(CONVOLUTIONS) or len(channels) < convolutions:
            raise ValueError(f"convolutions: expected 1 to {len(CONVOLUTIONS)}, each with channels, got {convolutions}")
        if num_classes < 2:
            raise ValueError(f"num_classes: expected the blank and at least one letter, got {num_classes}")
        self.frequencies, self.hidden_size = frequencies, hidden_size
        self.convs, self.conv_norms = nn.ModuleList(), nn.ModuleList()
        depth, bands = 1, frequencies
        for width, (kernel, stride, padding) in zip(channels[:convolutions], CONVOLUTIONS):
            self.convs.append(bnn.Conv2d(depth, width, kernel, stride, padding, bias=False))
            self.conv_norms.append(nn.BatchNorm2d(width))
            depth, bands = width, (bands + 2 * padding[0] - kernel[0]) // stride[0] + 1
        sizes = [depth * bands] + [hidden_size] * (num_layers - 1)
        self.rnns = nn.ModuleList(bnn.LSTM(size, hidden_size, bidirectional=bidirectional) for size in sizes)
        self.rnn_norms = nn.ModuleList(nn.BatchNorm1d(hidden_size) for _ in sizes)  # each behind its layer
        self.fc = bnn.Linear(hidden_size, num_classes, bias=False)

    def forward(
        self,
        x: Tensor,  # [B, T, frequencies], log-spectrogram
        lengths: Tensor | None = None,  # [B] int64 on the CPU: valid frames of each, 1..T; T if None
    ) -> tuple[Tensor, Tensor]:  # [T', B, num_classes], log-probabilities; [B], valid frames of T' of each
        if x.dim() != 3 or x.shape[2] != self.frequencies:
            raise ValueError(f"x: expected [B, T, {self.frequencies}], got {list(x.shape)}")
        if lengths is None:
            lengths = torch.full((x.shape[0],), x.shape[1])
        elif lengths.shape != x.shape[:1] or not bool(((lengths >= 1) & (lengths <= x.shape[1])).all()):
            raise ValueError(f"lengths: expected {x.shape[0]} numbers from 1 to {x.shape[1]}, got {lengths.tolist()}")
        x = _silent(x.transpose(1, 2)[:, None], lengths)  # [B, 1, F, T]
        for layer, norm in zip(self.convs, self.conv_norms):
            x = conv_block(layer, x, norm, activation="relu").clamp(max=CLIP)
            lengths = (lengths + 2 * layer.padding[1] - layer.kernel_size[1]) // layer.stride[1] + 1
            x = _silent(x, lengths)
        x = x.flatten(1, 2).permute(2, 0, 1)  # [T', B, C F']
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        for rnn, norm in zip(self.rnns, self.rnn_norms):
            data = rnn(packed)[0].data  # [frames, directions H]
            data = norm(data.unflatten(1, (-1, self.hidden_size)).sum(1))
            packed = PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        logits, _ = bnn.pad_packed_sequence(
            PackedSequence(self.fc(packed.data), packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        )
        return F.log_softmax(
            logits, -1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32
        ), lengths

    def loss(
        self,
        x: Tensor,  # [B, T, frequencies]
        lengths: Tensor | None,  # [B] int64 on the CPU
        targets: Tensor,  # [B, U] int64: letters, 1..num_classes - 1
        target_lengths: Tensor,  # [B] int64
    ) -> Tensor:  # []
        """The CTC loss (Graves et al. 2006), each sequence's over its letters, then the mean; 0 for targets too long to say."""
        log_probs, frames = self(x, lengths)
        return F.ctc_loss(log_probs, targets, frames, target_lengths, blank=BLANK, zero_infinity=True)

    @torch.no_grad()
    def transcribe(
        self,
        x: Tensor,  # [B, T, frequencies]
        lengths: Tensor | None = None,  # [B] int64 on the CPU
    ) -> list[list[int]]:  # the letters of each sequence
        """The likeliest class of each frame, repetitions and blanks taken out."""
        log_probs, frames = self(x, lengths)
        best = log_probs.argmax(-1).t().cpu()  # [B, T']
        words = (torch.unique_consecutive(row[:n]).tolist() for row, n in zip(best, frames.tolist()))
        return [[letter for letter in word if letter != BLANK] for word in words]


def _silent(
    x: Tensor,  # [B, C, F, T]
    lengths: Tensor,  # [B]
) -> Tensor:
    """x with zeros past each sequence's length."""
    if bool((lengths >= x.shape[-1]).all()):
        return x
    past = torch.arange(x.shape[-1]) >= lengths[:, None]
    return x.masked_fill(past.to(x.device)[:, None, None], 0.0)
