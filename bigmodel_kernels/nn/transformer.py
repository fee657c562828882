"""Transformer layers: torch.nn's, with attention on bmk.attention. They go into torch.nn's containers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bigmodel_kernels import _registry
from bigmodel_kernels._library import autocast_enabled, is_plain_eager
from bigmodel_kernels.nn.attention import MultiheadAttention
from bigmodel_kernels.nn.fused import linear_block
from bigmodel_kernels.nn.linear import Linear, has_hooks
from bigmodel_kernels.nn.traced import refuse_script, traced_whole
from bigmodel_kernels.ops.encoder_layer import encoder_layer
from bigmodel_kernels.ops.encoder_layer.op import is_faster
from bigmodel_kernels.ops.linear.op import prefer as linear_prefer

_ACTIVATIONS = {F.relu: "relu", F.gelu: "gelu"}
_FUSED_ACTIVATIONS = {F.relu: 1, F.gelu: 2}  # as torch.nn.TransformerEncoderLayer numbers them
_PLAIN_BLOCKS = {torch.nn.Linear, Linear, torch.nn.LayerNorm}
_MANY_SCORES = 1 << 19  # from which on holding them all costs more than the calls that are saved


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer: same constructor, parameters and results.

    Inference is one call of the whole layer, of ours or, without masks, of torch.nn's, where that is faster than call by call.
    """

    __prepare_scriptable__ = refuse_script

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._use_our_attention()

    def _use_our_attention(self) -> None:
        self.self_attn = MultiheadAttention.from_torch(self.self_attn)
        # What torch.nn.TransformerEncoder asks before it takes the fast path, past this layer's forward.
        self.activation_relu_or_gelu = 0

    @classmethod
    def from_torch(cls, module: torch.nn.TransformerEncoderLayer) -> TransformerEncoderLayer:
        """The layer that shares the parameters, hooks and settings of `module`."""
        layer = _share(cls, module)
        layer._use_our_attention()
        return layer

    @traced_whole
    def forward(
        self,
        src: Tensor,  # [S, N, E], [N, S, E] with batch_first, or [S, E]
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Output like src. is_causal promises that src_mask is the causal mask."""
        if self._is_one_call(src) and (src_mask is not None or not is_causal):
            if self._is_ours(src):
                return self._in_one_call(src, src_mask, src_key_padding_mask, is_causal)
            if src_mask is None and src_key_padding_mask is None and self._is_torchs(src):
                _registry.announce("transformer_encoder_layer", "one call of PyTorch's for the whole layer", src)
                twin = _share(torch.nn.TransformerEncoderLayer, self)
                twin.activation_relu_or_gelu = _FUSED_ACTIVATIONS[self.activation]
                return twin.forward(src)  # which goes on by blocks where PyTorch sees anything against it

        def attend(x: Tensor) -> Tensor:
            return self._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal)

        if self.norm_first:
            x = src + attend(self.norm1(src))
            return self._plus_ff_block(x, self.norm2(x))
        x = self.norm1(src + attend(src))
        return self.norm2(self._plus_ff_block(x, x))

    def _is_one_call(self, src: Tensor) -> bool:
        """Whether the layer is set up to compute what one call of all of it does."""
        if self.training or torch.is_grad_enabled() or torch._C._is_any_autocast_enabled():
            return False
        if not is_plain_eager(range(1), (src,)) or not src.is_cpu or src.is_nested or src.dim() != 3:
            return False
        if type(self) is not TransformerEncoderLayer or self.activation not in _FUSED_ACTIVATIONS:
            return False
        return _PLAIN_BLOCKS.issuperset(map(type, self._blocks()))

    def _blocks(self) -> list[torch.nn.Module]:
        parts = self._modules  # a module looks its attributes up three times before it comes to these
        return [parts["linear1"], parts["linear2"], parts["norm1"], parts["norm2"]]

    def _is_ours(self, src: Tensor) -> bool:
        """Whether that call is `encoder_layer`: nobody looks at the parts, which are those of an inference."""
        attention, blocks = self._modules["self_attn"], self._blocks()
        if type(attention) is not MultiheadAttention or attention.training:
            return False
        wanted, weight = _registry.wanted(attention.backend), attention.in_proj_weight
        if wanted != "cpu" and (wanted != "auto" or not is_faster(src, blocks[0].out_features)):
            return False
        if weight is None or attention.bias_k is not None or attention.add_zero_attn:
            return False
        if src.shape[2] != attention.embed_dim or src.dtype != weight.dtype:  # torch.nn words the errors
            return False
        norm1, norm2 = blocks[2:]
        if norm1.eps != norm2.eps or not norm1.normalized_shape == norm2.normalized_shape == (attention.embed_dim,):
            return False
        for name in ("dropout", "dropout1", "dropout2"):
            if not _is_idle(self._modules[name]):
                return False
        return not any([has_hooks(m) for m in (attention, *blocks)])

    def _in_one_call(self, src: Tensor, src_mask: Tensor | None, padding: Tensor | None, is_causal: bool) -> Tensor:
        attention, mask = self._modules["self_attn"], None
        x = (src if attention.batch_first else src.transpose(0, 1)).contiguous()
        if src_mask is not None or padding is not None:
            mask = attention._mask(src_mask, padding, (x.shape[0], x.shape[1], x.shape[1]), x.dtype, is_causal)
            mask = mask[None, None] if mask is not None and mask.dim() == 2 else mask
        out = attention.out_proj
        y = encoder_layer(
            x, attention.in_proj_weight, attention.in_proj_bias, out.weight, out.bias,
            *[t for m in self._blocks() for t in (m.weight, m.bias)], num_heads=attention.num_heads, attn_mask=mask,
            is_causal=is_causal, activation=_ACTIVATIONS[self.activation], norm_first=self.norm_first,
            eps=self._modules["norm1"].eps, backend=attention.backend,
        )  # fmt: skip
        return y if attention.batch_first else y.transpose(0, 1).contiguous()

    def _is_torchs(self, src: Tensor) -> bool:
        """By the table "Transformer layers" in docs/decisions.md: PyTorch's one call of the whole layer saves a dozen others, and
        loses where it holds many scores, and where its products are slow."""
        attention = self.self_attn
        if _registry.wanted(attention.backend) != "auto" or not attention.batch_first:
            return False
        batch, length, width = src.shape
        if 2 * length > width and batch * attention.num_heads * length**2 >= _MANY_SCORES:
            return False
        return linear_prefer(src, self.linear1.weight, False)[0] == "torch"

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout2(_feed_forward(self, x))

    def _plus_ff_block(self, x: Tensor, inner: Tensor) -> Tensor:
        """x + _ff_block(inner), the sum by the last linear layer where nothing stands between them."""
        if type(self) is not TransformerEncoderLayer or not _is_idle(self.dropout2) or autocast_enabled(x.device.type):
            return x + self._ff_block(inner)
        return _feed_forward(self, inner, residual=x)


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer: same constructor, parameters and results."""

    forward = traced_whole(torch.nn.TransformerDecoderLayer.forward)
    __prepare_scriptable__ = refuse_script

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._use_our_attention()

    def _use_our_attention(self) -> None:
        self.self_attn = MultiheadAttention.from_torch(self.self_attn)
        self.multihead_attn = MultiheadAttention.from_torch(self.multihead_attn)

    @classmethod
    def from_torch(cls, module: torch.nn.TransformerDecoderLayer) -> TransformerDecoderLayer:
        """The layer that shares the parameters, hooks and settings of `module`."""
        layer = _share(cls, module)
        layer._use_our_attention()
        return layer

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout3(_feed_forward(self, x))


class Transformer(torch.nn.Transformer):
    """torch.nn.Transformer: same constructor, parameters and results. A custom encoder or decoder stays as it is."""

    forward = traced_whole(torch.nn.Transformer.forward)
    __prepare_scriptable__ = refuse_script

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for stack in (self.encoder, self.decoder):
            _convert_layers(stack)

    @classmethod
    def from_torch(cls, module: torch.nn.Transformer) -> Transformer:
        """The model that shares the parameters, hooks and settings of `module`."""
        model = _share(cls, module)
        for name in ("encoder", "decoder"):
            stack = _share(type(getattr(model, name)), getattr(model, name))
            if hasattr(stack, "layers"):
                stack.layers = torch.nn.ModuleList(stack.layers)
            setattr(model, name, stack)
            _convert_layers(stack)
        return model


def _is_idle(dropout: torch.nn.Module) -> bool:
    """Whether it returns what it is given, and nobody is told."""
    return type(dropout) is torch.nn.Dropout and not (dropout.training and dropout.p > 0) and not has_hooks(dropout)


def _feed_forward(layer: torch.nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Both linear layers of a Transformer layer, the first with its activation in one call; plus the residual."""
    name = _ACTIVATIONS.get(layer.activation)
    inner = layer.activation(layer.linear1(x)) if name is None else linear_block(layer.linear1, x, name)
    return linear_block(layer.linear2, layer.dropout(inner), residual=residual)


def _share(cls: type, module: torch.nn.Module) -> torch.nn.Module:
    """A module of class `cls` with the parameters of `module`, but a list of children of its own."""
    layer = cls.__new__(cls)
    layer.__dict__.update(module.__dict__)
    layer._modules = dict(module._modules)
    return layer


def _convert_layers(stack: torch.nn.Module) -> None:
    if type(stack) not in (torch.nn.TransformerEncoder, torch.nn.TransformerDecoder):
        return
    stack.use_nested_tensor = False  # torch's own layers would take the fast path with it
    for i, layer in enumerate(stack.layers):
        if type(layer) is torch.nn.TransformerEncoderLayer:
            stack.layers[i] = TransformerEncoderLayer.from_torch(layer)
        elif type(layer) is torch.nn.TransformerDecoderLayer:
            stack.layers[i] = TransformerDecoderLayer.from_torch(layer)
