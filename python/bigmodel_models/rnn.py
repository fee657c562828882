"""The textbook's recurrent classifier: an LSTM whose last step is classified."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from bigmodel_kernels import nn as bnn


class RNN(nn.Module):
    """LSTM over a sequence of vectors, then a linear classifier on the top layer's last hidden state.

    Args:
        input_size: features of one step.
        hidden_size: hidden units of each layer.
        num_layers: layers of the LSTM.
        num_classes: how many classes.
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int, num_classes: int) -> None:
        super().__init__()
        self.lstm = bnn.LSTM(input_size, hidden_size, num_layers, batch_first=True)
        self.fc = bnn.Linear(hidden_size, num_classes)

    def forward(
        self,
        x: Tensor,  # [B, T, input_size]
        lengths: Tensor | None = None,  # [B] int64 on the CPU: valid steps of each sequence, 1..T
    ) -> Tensor:  # [B, num_classes], logits
        if lengths is not None:
            x = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            _, (h, _) = self.lstm(x)
            return self.fc(h[-1])  # a packed sequence ends at its own length: h_n is its last valid step
        out, _ = self.lstm(x)  # [B, T, hidden_size]
        return self.fc(out[:, -1])
