"""Additive attention, also called MLP attention.

Bahdanau, Cho, Bengio: Neural Machine Translation by Jointly Learning to Align and Translate (2015).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AdditiveAttention(nn.Module):
    """Attention whose score is a small network: ``score(q, k) = v^T tanh(W_q q + W_k k)``.

    Every query-key pair has its own hidden vector, so the memory is ``B * Sq * Sk * hidden_size`` values.

    Args:
        query_size: features of a query.
        key_size: features of a key.
        hidden_size: hidden units of the scoring network.
        dropout: dropout on the attention weights.
    """

    def __init__(self, query_size: int, key_size: int, hidden_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.W_q = nn.Linear(query_size, hidden_size, bias=False)
        self.W_k = nn.Linear(key_size, hidden_size, bias=False)
        self.v = nn.Linear(hidden_size, 1, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        query: Tensor,  # [B, Sq, query_size]
        key: Tensor,  # [B, Sk, key_size]
        value: Tensor,  # [B, Sk, Dv]
        padding_mask: Tensor | None = None,  # bool [B, Sk] or [B, Sq, Sk]; True: takes no part
    ) -> tuple[Tensor, Tensor]:  # output [B, Sq, Dv], weights [B, Sq, Sk]
        """The weighted sum of the values and the weights.

        A query whose keys are all masked gets weights and output of exactly 0 and passes no gradient. Whatever stands
        in a position that no query may see, NaN included, does not reach the result or a gradient.
        """
        self._check(query, key, value, padding_mask)
        if padding_mask is not None:
            if padding_mask.dim() == 2:
                padding_mask = padding_mask[:, None, :]
            unseen = padding_mask.all(dim=1)[..., None]  # [B, Sk, 1]
            # 0 * NaN is NaN: a weight of 0 does not silence a padded position, so it is emptied before any product
            key = key.masked_fill(unseen, 0.0)
            value = value.masked_fill(unseen, 0.0)
        hidden = torch.tanh(self.W_q(query)[:, :, None, :] + self.W_k(key)[:, None, :, :])  # [B, Sq, Sk, hidden_size]
        scores = self.v(hidden).squeeze(-1)  # [B, Sq, Sk]
        if padding_mask is None:
            weights = torch.softmax(scores, dim=-1)
        else:
            # the lowest finite number instead of -inf: a fully masked row stays finite in softmax and in its backward
            scores = scores.masked_fill(padding_mask, torch.finfo(scores.dtype).min)
            weights = torch.softmax(scores, dim=-1).masked_fill(padding_mask, 0.0)
        return torch.bmm(self.dropout(weights), value), weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor, padding_mask: Tensor | None) -> None:
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if tensor.dim() != 3 or tensor.shape[0] != query.shape[0]:
                raise ValueError(f"{name}: expected [B, S, D] with the batch of query, got {list(tensor.shape)}")
        if key.shape[1] != value.shape[1]:
            raise ValueError(f"value: expected {key.shape[1]} positions as key has, got {value.shape[1]}")
        if padding_mask is None:
            return
        if padding_mask.dtype != torch.bool:
            raise TypeError(f"padding_mask: expected torch.bool, got {padding_mask.dtype}")
        batch, queries, keys = query.shape[0], query.shape[1], key.shape[1]
        if tuple(padding_mask.shape) not in ((batch, keys), (batch, queries, keys)):
            raise ValueError(
                f"padding_mask: expected [{batch}, {keys}] or [{batch}, {queries}, {keys}], "
                f"got {list(padding_mask.shape)}"
            )
