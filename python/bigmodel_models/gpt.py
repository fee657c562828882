"""GPT-2. Radford et al.: Language Models are Unsupervised Multitask Learners (2019).

Every parameter has the name and the shape that Hugging Face's GPT2LMHeadModel gives it; its linear layers keep their
weights as [in, out].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigmodel_kernels as bmk
from bigmodel_kernels.nn.fused import linear_block


@dataclass
class KVCache:
    """Keys and values of all layers so far: what `GPT.step` reads and extends."""

    keys: list[Tensor]  # of each layer [B, H, capacity, D]
    values: list[Tensor]  # of each layer [B, H, capacity, D]
    lengths: Tensor  # [B] int64: positions that are filled


class GPT(nn.Module):
    """Decoder-only Transformer with the norm before each block; its output layer is the embedding of the tokens.

    Args (the defaults are those of GPT-2 small):
        vocab_size: tokens of the vocabulary.
        embedding_dim: width of the model; divisible by `num_heads`.
        num_layers: decoder layers.
        num_heads: attention heads of each layer.
        max_length: the longest sequence.
        dropout: of the embeddings, the attention's weights and each block's output.
    """

    def __init__(
        self,
        vocab_size: int = 50257,
        embedding_dim: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        *,
        max_length: int = 1024,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embedding_dim % num_heads:
            raise ValueError(f"embedding_dim: expected a multiple of num_heads={num_heads}, got {embedding_dim}")
        self.max_length = max_length
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, embedding_dim),
                "wpe": nn.Embedding(max_length, embedding_dim),
                "h": nn.ModuleList(GPTBlock(embedding_dim, num_heads, dropout) for _ in range(num_layers)),
                "ln_f": nn.LayerNorm(embedding_dim),
            }
        )
        self.dropout = nn.Dropout(dropout)
        self.lm_head = bmk.nn.Linear(embedding_dim, vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # what ends up in the sum of all blocks is smaller the more blocks there are
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * num_layers) if "c_proj" in name else 1))

    def forward(
        self,
        tokens: Tensor,  # [B, S] int
    ) -> Tensor:  # [B, S, vocab_size], logits of the token after each position
        return linear_block(self.lm_head, self._hidden(tokens, None))

    def loss(
        self,
        tokens: Tensor,  # [B, S] int
        targets: Tensor,  # [B, S] int64: the token after each; -100 counts for nothing
    ) -> Tensor:  # []
        return bmk.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache for `capacity` positions."""
        if not 0 < capacity <= self.max_length:
            raise ValueError(f"capacity: expected 1 to max_length={self.max_length}, got {capacity}")
        weight, blocks = self.lm_head.weight, self.transformer["h"]
        heads = blocks[0].attn.num_heads
        shape = (batch_size, heads, capacity, weight.shape[1] // heads)
        return KVCache(
            *([weight.new_zeros(shape) for _ in blocks] for _ in range(2)),
            torch.zeros(batch_size, dtype=torch.int64, device=weight.device),
        )

    @torch.no_grad()
    def prefill(
        self,
        tokens: Tensor,  # [B, S] int
        cache: KVCache,  # empty
        lengths: Tensor | None = None,  # [B] int64: tokens of each prompt, 1..S; what follows them is padding
    ) -> Tensor:  # [B, vocab_size], logits of the token after each prompt
        """Reads the prompts, all at once."""
        batch, length = tokens.shape
        if lengths is None:
            lengths = torch.full((batch,), length, device=tokens.device)
        elif lengths.shape != (batch,) or not bool(((lengths >= 1) & (lengths <= length)).all()):
            raise ValueError(f"lengths: expected {batch} numbers from 1 to {length}, got {lengths.tolist()}")
        x = self._hidden(tokens, cache)
        cache.lengths = lengths.to(cache.lengths)
        return self.lm_head(x[torch.arange(batch, device=x.device), cache.lengths - 1])

    @torch.no_grad()
    def step(
        self,
        token: Tensor,  # [B] int
        cache: KVCache,
    ) -> Tensor:  # [B, vocab_size], logits of the token after it
        """One token more for every sequence."""
        parts = self.transformer
        x = parts["wte"](token)[:, None] + parts["wpe"](cache.lengths)[:, None]  # [B, 1, E]
        for block, keys, values in zip(parts["h"], cache.keys, cache.values):
            x = block.step(x, keys, values, cache.lengths)
        cache.lengths = cache.lengths + 1
        return self.lm_head(_norm(parts["ln_f"], x)[:, 0])

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,  # [B, S] int: the prompts
        max_new_tokens: int,
        *,
        lengths: Tensor | None = None,  # [B] int64: tokens of each prompt, 1..S
        temperature: float = 0.0,
        top_k: int | None = None,
        end_token: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # [B, n] int64, n <= max_new_tokens: the new tokens
        """Continues each prompt; keys and values are kept, so a token costs one position.

        Args:
            temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature).
            top_k: draw from the k likeliest only.
            end_token: after it a sequence repeats it until all have ended.
            generator: what the draws come from.
        """
        if temperature < 0:
            raise ValueError(f"temperature: expected 0 (the likeliest token) or above, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {top_k}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
        if self.training:
            raise RuntimeError("generate is for eval mode: call model.eval() first")
        cache = self.new_cache(tokens.shape[0], tokens.shape[1] + max_new_tokens)
        logits = self.prefill(tokens, cache, lengths)
        new: list[Tensor] = []
        ended = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
        while True:
            token = _choose(logits, temperature, top_k, generator)
            if end_token is not None:
                token = token.masked_fill(ended, end_token)
                ended = ended | (token == end_token)
            new.append(token)
            if len(new) == max_new_tokens or (end_token is not None and bool(ended.all())):
                return torch.stack(new, 1)
            logits = self.step(token, cache)

    def _hidden(self, tokens: Tensor, cache: KVCache | None) -> Tensor:  # [B, S, E]
        if tokens.dim() != 2 or not 0 < tokens.shape[1] <= self.max_length:
            raise ValueError(f"tokens: expected [B, S] with S from 1 to {self.max_length}, got {list(tokens.shape)}")
        length = tokens.shape[1]
        parts = self.transformer
        x = self.dropout(parts["wte"](tokens) + parts["wpe"].weight[:length])
        for i, block in enumerate(parts["h"]):
            x, k, v = block(x)
            if cache is not None:
                cache.keys[i][:, :, :length] = k
                cache.values[i][:, :, :length] = v
        return _norm(parts["ln_f"], x)


class GPTBlock(nn.Module):
    """Causal self-attention and a feed-forward block, each on the layer norm of its input and added to it."""

    def __init__(self, embedding_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(embedding_dim)
        self.attn = _Attention(embedding_dim, num_heads)
        self.ln_2 = nn.LayerNorm(embedding_dim)
        self.mlp = nn.ModuleDict(
            {"c_fc": _Linear(embedding_dim, 4 * embedding_dim), "c_proj": _Linear(4 * embedding_dim, embedding_dim)}
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,  # [B, S, E]
    ) -> tuple[Tensor, Tensor, Tensor]:  # [B, S, E]; keys and values [B, H, S, D]
        q, k, v = self.attn.project(_norm(self.ln_1, x))
        y = bmk.attention(q, k, v, is_causal=True, dropout_p=self.dropout.p if self.training else 0.0)
        return self._rest(x, y), k, v

    def step(
        self,
        x: Tensor,  # [B, 1, E]
        keys: Tensor,  # [B, H, capacity, D], written at `lengths`
        values: Tensor,  # [B, H, capacity, D], likewise
        lengths: Tensor,  # [B] int64
    ) -> Tensor:  # [B, 1, E]
        """One token more; without gradients, and without dropout."""
        attn, mlp, norms = self.attn, self.mlp, (self.ln_1, self.ln_2)
        linears = attn.c_attn, attn.c_proj, mlp["c_fc"], mlp["c_proj"]
        y = bmk.decoder_step(
            x[:, 0], keys, values, lengths, *(t for m in linears for t in (m.weight.t(), m.bias)),
            *(t for m in norms for t in (m.weight, m.bias)), num_heads=attn.num_heads, eps=self.ln_1.eps,
        )  # fmt: skip
        return y[:, None]

    def _rest(self, x: Tensor, attended: Tensor) -> Tensor:
        """What follows the attention, [B, H, S, D]."""
        y = self.dropout(self.attn.c_proj(attended.transpose(1, 2).flatten(2)))
        norm = self.ln_2
        y, x = bmk.layer_norm(y, norm.weight, norm.bias, residual=x, eps=norm.eps)
        y = F.gelu(self.mlp["c_fc"](y), approximate="tanh")
        return x + self.dropout(self.mlp["c_proj"](y))


class _Attention(nn.Module):
    def __init__(self, embedding_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.c_attn = _Linear(embedding_dim, 3 * embedding_dim)
        self.c_proj = _Linear(embedding_dim, embedding_dim)

    def project(
        self,
        x: Tensor,  # [B, S, E]
    ) -> tuple[Tensor, Tensor, Tensor]:  # q, k, v [B, H, S, D], views of one product
        packed = self.c_attn(x).unflatten(-1, (3, self.num_heads, -1))  # [B, S, 3, H, D]
        q, k, v = (t.transpose(1, 2) for t in packed.unbind(2))
        return q, k, v


class _Linear(nn.Module):
    """x W + b with W kept as [in, out]."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(
        self,
        x: Tensor,  # [.., in]
    ) -> Tensor:  # [.., out]
        return bmk.linear(x, self.weight.t(), self.bias)


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return bmk.layer_norm(x, norm.weight, norm.bias, eps=norm.eps)


def _choose(
    logits: Tensor,  # [B, vocab_size]
    temperature: float,
    top_k: int | None,
    generator: torch.Generator | None,
) -> Tensor:  # [B] int64
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    weights = torch.softmax(logits.float() / temperature, -1)
    return torch.multinomial(weights, 1, generator=generator)[:, 0]
