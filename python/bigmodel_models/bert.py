"""BERT, with heads for masked words and for classes. Devlin et al.: BERT (2018).

Every parameter has the name that Hugging Face's BertModel, BertForMaskedLM and BertForSequenceClassification give it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import bigmodel_kernels as bmk
from bigmodel_kernels.nn.fused import linear_block

IGNORED = -100  # a label that counts for nothing


class BERT(nn.Module):
    """Embeddings of tokens, positions and segments, then encoder layers with the norm after each block.

    Args (the defaults are those of BERT base):
        vocab_size: tokens of the vocabulary.
        hidden_size: width of the model; divisible by `num_heads`.
        num_layers: encoder layers.
        num_heads: attention heads of each layer.
        intermediate_size: width of the feed-forward block of each layer.
        max_length: the longest sequence.
        segments: how many kinds of segments (token types) there are.
        dropout: of the embeddings, the attention's weights and each block's output.
        pooler: with the layer that `pooled` comes from.
    """

    def __init__(
        self,
        vocab_size: int = 30522,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        intermediate_size: int = 3072,
        *,
        max_length: int = 512,
        segments: int = 2,
        dropout: float = 0.1,
        pooler: bool = True,
    ) -> None:
        super().__init__()
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(f"hidden_size: expected a multiple of num_heads={num_heads}, got {hidden_size}")
        self.max_length = max_length
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(vocab_size, hidden_size, padding_idx=0),
                "position_embeddings": nn.Embedding(max_length, hidden_size),
                "token_type_embeddings": nn.Embedding(segments, hidden_size),
                "LayerNorm": nn.LayerNorm(hidden_size, eps=1e-12),
            }
        )
        self.dropout = nn.Dropout(dropout)
        layers = [BERTLayer(hidden_size, num_heads, intermediate_size, dropout) for _ in range(num_layers)]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        self.pooler = nn.ModuleDict({"dense": bmk.nn.Linear(hidden_size, hidden_size)}) if pooler else None
        self.apply(_initialise)

    def forward(
        self,
        tokens: Tensor,  # [B, S] int
        segments: Tensor | None = None,  # [B, S] int: 0 for the first sentence, 1 for the second
        padding_mask: Tensor | None = None,  # [B, S] bool; True: padding
    ) -> Tensor:  # [B, S, hidden_size]
        if tokens.dim() != 2 or tokens.shape[1] > self.max_length:
            raise ValueError(f"tokens: expected [B, S] with S up to {self.max_length}, got {list(tokens.shape)}")
        for name, t in (("segments", segments), ("padding_mask", padding_mask)):
            if t is not None and t.shape != tokens.shape:
                raise ValueError(f"{name}: expected [B, S] = {list(tokens.shape)}, got {list(t.shape)}")
        if padding_mask is not None and padding_mask.dtype != torch.bool:
            raise TypeError(f"padding_mask: expected torch.bool (True: padding), got {padding_mask.dtype}")
        tables = self.embeddings
        x = tables["word_embeddings"](tokens) + tables["position_embeddings"].weight[: tokens.shape[1]]
        kinds = tables["token_type_embeddings"]
        x = x + (kinds.weight[0] if segments is None else kinds(segments))
        x = self.dropout(_norm(tables["LayerNorm"], x))
        mask = None if padding_mask is None else ~padding_mask[:, None, None]  # True: attend
        for layer in self.encoder["layer"]:
            x = layer(x, mask)
        return x

    def pooled(
        self,
        x: Tensor,  # [B, S, hidden_size], what `forward` gave
    ) -> Tensor:  # [B, hidden_size]
        """What the first token's output says of the whole sequence."""
        if self.pooler is None:
            raise RuntimeError("this BERT was built with pooler=False")
        return linear_block(self.pooler["dense"], x[:, 0], "tanh")


class BERTLayer(nn.Module):
    """Self-attention and a feed-forward block, each followed by the sum with its input and a layer norm."""

    def __init__(self, hidden_size: int, num_heads: int, intermediate_size: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        projections = {name: bmk.nn.Linear(hidden_size, hidden_size) for name in ("query", "key", "value")}
        self.attention = nn.ModuleDict(
            {"self": nn.ModuleDict(projections), "output": _output(hidden_size, hidden_size)}
        )
        self.intermediate = nn.ModuleDict({"dense": bmk.nn.Linear(hidden_size, intermediate_size)})
        self.output = _output(intermediate_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,  # [B, S, E]
        mask: Tensor | None,  # [B, 1, 1, S] bool; True: attend
    ) -> Tensor:  # [B, S, E]
        project = self.attention["self"]
        q, k, v = (
            linear_block(project[name], x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )  # [B, H, S, D]
        dropout = self.dropout.p if self.training else 0.0
        y = bmk.attention(q, k, v, attn_mask=mask, dropout_p=dropout).transpose(1, 2).flatten(2)
        x = self._add(self.attention["output"], y, x)
        return self._add(self.output, linear_block(self.intermediate["dense"], x, "gelu"), x)

    def _add(self, block: nn.ModuleDict, y: Tensor, x: Tensor) -> Tensor:
        return _norm(block["LayerNorm"], self.dropout(linear_block(block["dense"], y)), x)


class BERTForMaskedLM(nn.Module):
    """BERT and the head that says which word was masked: logits over the vocabulary, with the embedding's own weights.

    Takes the arguments of `BERT`, without `pooler`.
    """

    def __init__(self, *args, **options) -> None:
        super().__init__()
        self.bert = BERT(*args, **options, pooler=False)
        embedding = self.bert.embeddings["word_embeddings"].weight
        vocab_size, hidden_size = embedding.shape
        self.cls = nn.ModuleDict({"predictions": _Predictions(vocab_size, hidden_size)})
        self.cls.apply(_initialise)
        self.cls["predictions"].decoder.weight = embedding

    def forward(
        self,
        tokens: Tensor,  # [B, S] int
        segments: Tensor | None = None,  # [B, S] int
        padding_mask: Tensor | None = None,  # [B, S] bool; True: padding
    ) -> Tensor:  # [B, S, vocab_size], logits
        return self.cls["predictions"](self.bert(tokens, segments, padding_mask))

    def loss(
        self,
        tokens: Tensor,  # [B, S] int
        labels: Tensor,  # [B, S] int64: the masked words, -100 everywhere else
        **options,
    ) -> Tensor:  # []
        return bmk.cross_entropy(self(tokens, **options).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


class BERTForClassification(nn.Module):
    """BERT and a classifier of the whole sequence. Takes the arguments of `BERT` after `num_classes`."""

    def __init__(self, num_classes: int, *args, **options) -> None:
        super().__init__()
        self.bert = BERT(*args, **options)
        self.dropout = nn.Dropout(self.bert.dropout.p)
        self.classifier = bmk.nn.Linear(self.bert.embeddings["LayerNorm"].weight.shape[0], num_classes)
        self.classifier.apply(_initialise)

    def forward(
        self,
        tokens: Tensor,  # [B, S] int
        segments: Tensor | None = None,  # [B, S] int
        padding_mask: Tensor | None = None,  # [B, S] bool; True: padding
    ) -> Tensor:  # [B, num_classes], logits
        return self.classifier(self.dropout(self.bert.pooled(self.bert(tokens, segments, padding_mask))))


class _Predictions(nn.Module):
    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.transform = _output(hidden_size, hidden_size)
        self.decoder = bmk.nn.Linear(hidden_size, vocab_size)
        self.bias = self.decoder.bias

    def forward(
        self,
        x: Tensor,  # [B, S, E]
    ) -> Tensor:  # [B, S, vocab_size]
        x = linear_block(self.transform["dense"], x, "gelu")
        return linear_block(self.decoder, _norm(self.transform["LayerNorm"], x))


def _output(in_features: int, out_features: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {"dense": bmk.nn.Linear(in_features, out_features), "LayerNorm": nn.LayerNorm(out_features, eps=1e-12)}
    )


def _norm(norm: nn.LayerNorm, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """The layer norm of x, or of x + residual in one pass."""
    y = bmk.layer_norm(x, norm.weight, norm.bias, residual=residual, eps=norm.eps)
    return y if residual is None else y[0]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        module._fill_padding_idx_with_zero()
