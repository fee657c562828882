"""The textbook's Transformers: an encoder that classifies, and the encoder-decoder with cross-attention.

Vaswani et al.: Attention Is All You Need (2017).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bigmodel_kernels import nn as bnn

INPUT_KINDS = ("tokens", "vectors")
POSITION_KINDS = ("sinusoidal", "learned")


class SinusoidalPositions(nn.Module):
    """Adds sines and cosines of geometrically spaced frequencies; holds nothing that a state_dict would carry."""

    def __init__(self, embedding_dim: int, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        position = torch.arange(max_length, dtype=torch.float64)[:, None]
        frequency = 10000.0 ** (-torch.arange(0, embedding_dim, 2, dtype=torch.float64) / embedding_dim)
        table = torch.zeros(max_length, embedding_dim)
        table[:, 0::2] = torch.sin(position * frequency)
        table[:, 1::2] = torch.cos(position * frequency[: embedding_dim // 2])
        self.register_buffer("table", table, persistent=False)

    def forward(
        self,
        x: Tensor,  # [B, S, E]
    ) -> Tensor:  # [B, S, E]
        _check_length(x, self.max_length)
        return x + self.table[: x.shape[1]].to(x.dtype)


class LearnedPositions(nn.Module):
    """Adds one trained vector per position."""

    def __init__(self, embedding_dim: int, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.weight = nn.Parameter(torch.empty(max_length, embedding_dim))
        nn.init.normal_(self.weight, std=0.02)

    def forward(
        self,
        x: Tensor,  # [B, S, E]
    ) -> Tensor:  # [B, S, E]
        _check_length(x, self.max_length)
        return x + self.weight[: x.shape[1]]


class Transformer(nn.Module):
    """Embedding, positions, encoder layers, the mean over the valid positions, and a linear classifier.

    The textbook calls its Transformer with a single argument, and its listing hands the number of layers to the
    encoder layer as the number of heads and the other way round. Here each argument is what its name says.

    Args:
        input_size: size of the vocabulary (``input_kind="tokens"``) or features of one position (``"vectors"``).
        embedding_dim: width of the model; divisible by ``num_heads``.
        hidden_dim: width of the feed-forward block in each layer.
        num_layers: encoder layers.
        num_heads: attention heads per layer.
        num_classes: how many classes.
        input_kind: ``"tokens"``: integers through a table; ``"vectors"``: real vectors through a linear layer.
        positions: ``"sinusoidal"`` or ``"learned"``.
        max_length: the longest sequence.
        dropout: dropout inside the layers.
        norm_first: LayerNorm before each block instead of after it (and once more after the last layer).
    """

    def __init__(
        self,
        input_size: int,
        embedding_dim: int,
        hidden_dim: int,
        num_layers: int,
        num_heads: int,
        num_classes: int,
        *,
        input_kind: str = "tokens",
        positions: str = "sinusoidal",
        max_length: int = 512,
        dropout: float = 0.1,
        norm_first: bool = False,
    ) -> None:
        super().__init__()
        _check_heads(embedding_dim, num_heads)
        self.input_size = input_size
        self.input_kind = input_kind
        self.embedding = _embedding(input_kind, input_size, embedding_dim)
        self.positions = _positions(positions, embedding_dim, max_length)
        layer = bnn.TransformerEncoderLayer(
            embedding_dim, num_heads, hidden_dim, dropout, batch_first=True, norm_first=norm_first
        )
        norm = nn.LayerNorm(embedding_dim) if norm_first else None
        self.encoder = nn.TransformerEncoder(layer, num_layers, norm=norm, enable_nested_tensor=False)
        self.fc = bnn.Linear(embedding_dim, num_classes)

    def forward(
        self,
        x: Tensor,  # [B, S] int tokens, or [B, S, input_size] real vectors
        padding_mask: Tensor | None = None,  # [B, S] bool; True: padding
    ) -> Tensor:  # [B, num_classes], logits
        _check_input(x, self.input_kind, self.input_size)
        if padding_mask is not None:
            _check_padding("padding_mask", padding_mask, x)
            if self.input_kind == "vectors":
                # what stands in a padded position must not matter, even if it is NaN
                x = x.masked_fill(padding_mask[..., None], 0.0)
        x = self.positions(self.embedding(x))  # [B, S, E]
        x = self.encoder(x, src_key_padding_mask=padding_mask)
        return self.fc(_mean_over_valid(x, padding_mask))


class Seq2SeqTransformer(nn.Module):
    """Encoder-decoder over tokens: the decoder attends to itself causally and to the encoder's output.

    Args:
        source_vocab: tokens of the source.
        target_vocab: tokens of the target.
        embedding_dim: width of the model; divisible by ``num_heads``.
        hidden_dim: width of the feed-forward blocks.
        num_layers: layers of the encoder, and of the decoder.
        num_heads: attention heads per layer.
        positions: ``"sinusoidal"`` or ``"learned"``.
        max_length: the longest source or target.
        dropout: dropout inside the layers.
        norm_first: LayerNorm before each block instead of after it.
    """

    def __init__(
        self,
        source_vocab: int,
        target_vocab: int,
        embedding_dim: int,
        hidden_dim: int,
        num_layers: int,
        num_heads: int,
        *,
        positions: str = "sinusoidal",
        max_length: int = 512,
        dropout: float = 0.1,
        norm_first: bool = False,
    ) -> None:
        super().__init__()
        _check_heads(embedding_dim, num_heads)
        self.source_vocab = source_vocab
        self.target_vocab = target_vocab
        self.source_embedding = nn.Embedding(source_vocab, embedding_dim)
        self.target_embedding = nn.Embedding(target_vocab, embedding_dim)
        self.source_positions = _positions(positions, embedding_dim, max_length)
        self.target_positions = _positions(positions, embedding_dim, max_length)
        self.transformer = bnn.Transformer(
            embedding_dim,
            num_heads,
            num_layers,
            num_layers,
            hidden_dim,
            dropout,
            batch_first=True,
            norm_first=norm_first,
        )
        self.fc = bnn.Linear(embedding_dim, target_vocab)

    def encode(
        self,
        source: Tensor,  # [B, Ss] int
        source_padding_mask: Tensor | None = None,  # [B, Ss] bool; True: padding
    ) -> Tensor:  # [B, Ss, E]
        _check_input(source, "tokens", self.source_vocab, name="source")
        if source_padding_mask is not None:
            _check_padding("source_padding_mask", source_padding_mask, source)
        x = self.source_positions(self.source_embedding(source))
        return self.transformer.encoder(x, src_key_padding_mask=source_padding_mask)

    def decode(
        self,
        target: Tensor,  # [B, St] int
        memory: Tensor,  # [B, Ss, E]
        source_padding_mask: Tensor | None = None,  # [B, Ss] bool
        target_padding_mask: Tensor | None = None,  # [B, St] bool
    ) -> Tensor:  # [B, St, target_vocab], logits of the token after each position
        _check_input(target, "tokens", self.target_vocab, name="target")
        if target_padding_mask is not None:
            _check_padding("target_padding_mask", target_padding_mask, target)
        x = self.target_positions(self.target_embedding(target))
        length = target.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=target.device).triu(1)  # True: not visible
        x = self.transformer.decoder(
            x,
            memory,
            tgt_mask=later,
            tgt_is_causal=True,
            tgt_key_padding_mask=target_padding_mask,
            memory_key_padding_mask=source_padding_mask,
        )
        return self.fc(x)

    def forward(
        self,
        source: Tensor,  # [B, Ss] int
        target: Tensor,  # [B, St] int: the target shifted right, beginning with the start token
        source_padding_mask: Tensor | None = None,  # [B, Ss] bool; True: padding
        target_padding_mask: Tensor | None = None,  # [B, St] bool; True: padding
    ) -> Tensor:  # [B, St, target_vocab], logits
        memory = self.encode(source, source_padding_mask)
        return self.decode(target, memory, source_padding_mask, target_padding_mask)

    @torch.no_grad()
    def generate(
        self,
        source: Tensor,  # [B, Ss] int
        start_token: int,
        max_new_tokens: int,
        *,
        end_token: int | None = None,
        source_padding_mask: Tensor | None = None,  # [B, Ss] bool
    ) -> Tensor:  # [B, 1 + n] int, n <= max_new_tokens, beginning with the start token
        """Greedy decoding; after ``end_token`` a sequence repeats it until all have ended."""
        memory = self.encode(source, source_padding_mask)
        target = torch.full((source.shape[0], 1), start_token, dtype=torch.long, device=source.device)
        ended = torch.zeros(source.shape[0], dtype=torch.bool, device=source.device)
        for _ in range(max_new_tokens):
            token = self.decode(target, memory, source_padding_mask)[:, -1].argmax(dim=-1)
            if end_token is not None:
                token = token.masked_fill(ended, end_token)
                ended = ended | (token == end_token)
            target = torch.cat([target, token[:, None]], dim=1)
            if end_token is not None and bool(ended.all()):
                break
        return target


def _mean_over_valid(
    x: Tensor,  # [B, S, E]
    padding_mask: Tensor | None,  # [B, S] bool
) -> Tensor:  # [B, E]; 0 where a sequence is all padding
    if padding_mask is None:
        return x.mean(dim=1)
    total = x.masked_fill(padding_mask[..., None], 0.0).sum(dim=1)
    count = padding_mask.logical_not().sum(dim=1, keepdim=True).clamp(min=1)
    return total / count.to(x.dtype)


def _embedding(kind: str, input_size: int, embedding_dim: int) -> nn.Module:
    if kind == "tokens":
        return nn.Embedding(input_size, embedding_dim)
    if kind == "vectors":
        return bnn.Linear(input_size, embedding_dim)
    raise ValueError(f"input_kind: expected one of {INPUT_KINDS}, got {kind!r}")


def _positions(kind: str, embedding_dim: int, max_length: int) -> nn.Module:
    if kind == "sinusoidal":
        return SinusoidalPositions(embedding_dim, max_length)
    if kind == "learned":
        return LearnedPositions(embedding_dim, max_length)
    raise ValueError(f"positions: expected one of {POSITION_KINDS}, got {kind!r}")


def _check_heads(embedding_dim: int, num_heads: int) -> None:
    if num_heads < 1 or embedding_dim % num_heads != 0:
        raise ValueError(f"embedding_dim: expected a multiple of num_heads={num_heads}, got {embedding_dim}")


def _check_length(x: Tensor, max_length: int) -> None:
    if x.shape[1] > max_length:
        raise ValueError(f"sequence length {x.shape[1]} is above max_length={max_length}: pass a larger max_length")


def _check_input(x: Tensor, kind: str, input_size: int, name: str = "x") -> None:
    if kind == "tokens":
        if x.dtype not in (torch.int64, torch.int32):
            raise TypeError(
                f"{name}: expected int64 or int32 tokens, got {x.dtype}; real vectors need input_kind='vectors'"
            )
        if x.dim() != 2:
            raise ValueError(f"{name}: expected tokens of shape [B, S], got {list(x.shape)}")
    else:
        if not x.is_floating_point():
            raise TypeError(f"{name}: expected real vectors, got {x.dtype}; integer tokens need input_kind='tokens'")
        if x.dim() != 3 or x.shape[-1] != input_size:
            raise ValueError(f"{name}: expected vectors of shape [B, S, {input_size}], got {list(x.shape)}")


def _check_padding(name: str, mask: Tensor, x: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: expected torch.bool (True: padding), got {mask.dtype}")
    if mask.shape != x.shape[:2]:
        raise ValueError(f"{name}: expected [B, S] = {list(x.shape[:2])}, got {list(mask.shape)}")
