"""MultiheadAttention: torch.nn's, on bmk.attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bigmodel_kernels.nn.choice import is_torchs, remembering
from bigmodel_kernels.nn.traced import refuse_script, traced_whole
from bigmodel_kernels.ops.attention import attention, reference
from bigmodel_kernels.ops.linear import linear


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention: same constructor, parameters, results and errors.

    A query that may attend to nothing gets weights and an output (before out_proj) of exactly 0 in every mode, never NaN, and
    keys and values that are masked out never reach a result, whatever they hold. With need_weights=True, torch's default,
    the L x S weights have to be made; pass need_weights=False where they are not read.

    Shapes: query [L, N, E], key [S, N, kdim], value [S, N, vdim]; N first with batch_first; without N for one sequence.
    """

    backend = "auto"  # may be set on the class or a layer
    __prepare_scriptable__ = refuse_script

    @classmethod
    def from_torch(cls, module: torch.nn.MultiheadAttention) -> MultiheadAttention:
        """The layer that shares the parameters, hooks and settings of `module`."""
        layer = cls.__new__(cls)
        layer.__dict__.update(module.__dict__)
        return layer

    @traced_whole
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,  # [N, S]; True, or -inf, leaves a key out
        need_weights: bool = True,
        attn_mask: Tensor | None = None,  # [L, S] or [N H, L, S]
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Output like query, and the weights [N, L, S] ([N, H, L, S] unless average_attn_weights) or None.

        Args:
            is_causal: promises that attn_mask is the causal mask, which is then not read.

        Raises:
            AssertionError, RuntimeError: as torch.nn.MultiheadAttention.
        """
        if query.is_nested:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if key_padding_mask is None and attn_mask is None and not is_causal:
            others = (
                key is query,
                value is key,
                key.shape,
                value.shape,
                need_weights,
                average_attn_weights,
                self.training,
            )
            torchs = is_torchs(self, query, None, *others)
            if torchs:
                return super().forward(query, key, value, None, need_weights, None, average_attn_weights)
            if torchs is None:
                run = remembering(self, query, None, *others)
                return run(self._attend, query, key, value, None, need_weights, None, average_attn_weights, False)
        return self._attend(
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """`forward` on the ops of this library."""
        batched = F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint, got attn_mask=None")
        if not batched:
            key_is_value, query_is_key = key is value, query is key
            query = query.unsqueeze(0)
            key = query if query_is_key else key.unsqueeze(0)
            value = key if key_is_value else value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        length_first = batched and not self.batch_first
        batch, length = (query.shape[1], query.shape[0]) if length_first else query.shape[:2]
        self._check_sizes(query, key, value, 1 if length_first else 0)
        q, k, v = self._project(query, key, value, length_first)
        key_length = k.shape[2]
        mask = self._mask(attn_mask, key_padding_mask, (batch, length, key_length), q.dtype, is_causal)
        if self.bias_k is not None:
            k = torch.cat([k, self._heads(self.bias_k, False).expand(batch, -1, -1, -1)], 2)
            v = torch.cat([v, self._heads(self.bias_v, False).expand(batch, -1, -1, -1)], 2)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        dropout = self.dropout if self.training else 0.0
        # Added keys stand after the last column of the mask and are seen by every query: not what is_causal means.
        causal = is_causal and k.shape[2] == key_length
        weights = None
        if need_weights:
            scale = 1 / math.sqrt(self.head_dim)
            if mask is None and not causal:  # no row is without a key, which the general form looks for
                weights = torch.softmax((q * scale) @ k.mT, -1)
            else:
                weights, _ = reference.probabilities(q, k, mask, scale=scale, window_right=0 if causal else -1)
            weights = F.dropout(weights, dropout)
            out = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out = attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout, backend=self.backend)
        out = out.transpose(1, 2) if (batched and self.batch_first) or not batched else out.permute(2, 0, 1, 3)
        out = self._linear(out.flatten(-2), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out, weights

    def _check_sizes(self, query: Tensor, key: Tensor, value: Tensor, batch_dim: int) -> None:
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(f"query must have the embedding dimension {self.embed_dim}, got {query.shape[-1]}")
        if self._qkv_same_embed_dim and key.shape != value.shape:
            raise AssertionError(f"value must have the shape of key, {list(key.shape)}, got {list(value.shape)}")
        if key.shape[:2] != value.shape[:2]:
            raise AssertionError(
                f"value must have the batch and length of key, {list(key.shape[:2])}, got {list(value.shape[:2])}"
            )
        for name, t, size in (("key", key, self.kdim), ("value", value, self.vdim)):
            if t.shape[-1] != size:
                raise RuntimeError(f"{name} must have {size} features, got {t.shape[-1]}")
        if query.shape[batch_dim] != key.shape[batch_dim]:
            raise RuntimeError(
                f"key must have the batch size of query, {query.shape[batch_dim]}, got {key.shape[batch_dim]}"
            )

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, weight, bias, backend=self.backend)

    def _heads(self, t: Tensor, length_first: bool) -> Tensor:
        """[N, S, E] or [S, N, E] as [N, H, S, D]."""
        return _order(t.unflatten(-1, (self.num_heads, self.head_dim)), length_first)

    def _project(self, query: Tensor, key: Tensor, value: Tensor, length_first: bool) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as [N, H, S, D]: views of one product where the inputs are the same tensor."""
        bias, heads = self.in_proj_bias, (self.num_heads, self.head_dim)
        if not self._qkv_same_embed_dim:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        elif query is key and key is value:
            packed = self._linear(query, self.in_proj_weight, bias).unflatten(-1, (3, *heads))
            q, k, v = packed.unbind(-3)
            return _order(q, length_first), _order(k, length_first), _order(v, length_first)
        elif key is value:
            e, weight = self.embed_dim, self.in_proj_weight
            q = self._linear(query, weight[:e], None if bias is None else bias[:e])
            packed = self._linear(key, weight[e:], None if bias is None else bias[e:])
            k, v = packed.unflatten(-1, (2, *heads)).unbind(-3)
            return self._heads(q, length_first), _order(k, length_first), _order(v, length_first)
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        q, k, v = (self._linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases))
        return self._heads(q, length_first), self._heads(k, length_first), self._heads(v, length_first)

    def _mask(
        self,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        sizes: tuple[int, int, int],
        dtype: torch.dtype,
        is_causal: bool,
    ) -> Tensor | None:
        """Both masks as one for `attention`, where True attends: None or [N or 1, H or 1, L or 1, S + added keys]."""
        batch, length, key_length = sizes
        added = (self.bias_k is not None) + self.add_zero_attn
        if attn_mask is not None:
            _check_mask("attn_mask", attn_mask)
            full = (length, key_length) if attn_mask.dim() == 2 else (batch * self.num_heads, length, key_length)
            if tuple(attn_mask.shape) != full:
                raise RuntimeError(f"attn_mask must have shape {list(full)}, got {list(attn_mask.shape)}")
            if is_causal and not added:
                attn_mask = None
            elif attn_mask.dim() == 3:
                attn_mask = attn_mask.view(batch, self.num_heads, length, key_length)
        if key_padding_mask is not None:
            _check_mask("key_padding_mask", key_padding_mask)
            if tuple(key_padding_mask.shape) != (batch, key_length):
                raise AssertionError(
                    f"key_padding_mask must have shape {[batch, key_length]}, got {list(key_padding_mask.shape)}"
                )
            key_padding_mask = key_padding_mask[:, None, None]
        if attn_mask is None or key_padding_mask is None:
            mask = key_padding_mask if attn_mask is None else attn_mask
        elif attn_mask.dtype == torch.bool and key_padding_mask.dtype == torch.bool:
            mask = attn_mask | key_padding_mask
        else:
            mask = _additive(attn_mask, dtype) + _additive(key_padding_mask, dtype)
        if mask is None:
            return None
        mask = F.pad(mask, (0, added)) if added else mask
        return ~mask if mask.dtype == torch.bool else mask


def _order(t: Tensor, length_first: bool) -> Tensor:
    """[S, N, H, D] or [N, S, H, D] as [N, H, S, D]."""
    return t.permute(1, 2, 0, 3) if length_first else t.transpose(1, 2)


def _check_mask(name: str, mask: Tensor) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise AssertionError(f"only bool and floating types of {name} are supported, got {mask.dtype}")


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf) if mask.dtype == torch.bool else mask
