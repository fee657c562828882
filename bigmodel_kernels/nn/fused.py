"""A layer of torch.nn and what follows it, in as few calls as the mode allows, with the layers' own parameters.

The layers stay where they are, and so do their names in the state_dict: models, blocks and `optimize` share these functions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigmodel_kernels._library import autocast_enabled
from bigmodel_kernels.nn.linear import LINEAR_LAYERS, has_hooks, takes_linear
from bigmodel_kernels.ops.conv.op import conv, convolved_shape, parse_activation
from bigmodel_kernels.ops.conv.reference import activate
from bigmodel_kernels.ops.linear import linear

_POOLS = {  # by the rank of the layer's weight
    3: {"max": F.max_pool1d, "avg": F.avg_pool1d},
    4: {"max": F.max_pool2d, "avg": F.avg_pool2d},
}


def conv_block(
    layer: nn.Module,  # Conv1d, Conv2d, ConvTranspose1d or ConvTranspose2d, torch's or ours
    x: Tensor,  # [N, Cin, ..], or without N
    norm: nn.Module | None = None,  # its BatchNorm
    *,
    residual: Tensor | None = None,  # [N, Cout, ..], added before the activation
    activation: str | tuple[str, float] | None = None,
    pool: tuple | None = None,
    backend: str | None = None,
) -> Tensor:  # [N, Cout, ..], pooled
    """pool(activation(norm(layer(x)) + residual)).

    One call where there is no norm or the norm is in eval mode, folded into a scale and a shift. A norm that is training needs
    the statistics of the whole convolution first: then it is the convolution, torch's batch norm, and the tail.

    Args:
        activation, pool: as in `bigmodel_kernels.conv`.
        backend: that of the layer if None.
    """
    transposed, weight = bool(layer.transposed), layer.weight  # asked for once: a parametrization computes it
    batched = x.dim() == weight.dim()
    training = norm is not None and norm.training
    scale, shift = (None, None) if norm is None or training else folded_norm(norm)
    out = conv(
        x if batched else x.unsqueeze(0),
        weight,
        layer.bias,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        transposed=transposed,
        output_padding=layer.output_padding if transposed else 0,
        scale=scale,
        shift=shift,
        residual=None if training else residual,
        activation=None if training else activation,
        pool=None if training else pool,
        backend=backend or getattr(layer, "backend", "auto"),
    )
    if training:
        out = norm(out)
        out = _tail(out if residual is None else out + residual, weight.dim(), activation, pool)
    return out if batched else out.squeeze(0)


def conv_sum_block(
    layer: nn.Module,  # Conv1d or Conv2d, torch's or ours
    x: Tensor,  # [N, Cin, ..], or without N
    norm: nn.Module | None,
    summand: Tensor | float,
    *,
    activation: str | tuple[str, float] | None = None,
    pool: tuple | None = None,
    backend: str | None = None,
) -> Tensor:
    """pool(activation(norm(layer(x)) + summand)) as it stands in a forward: a summand of another shape or dtype than the
    convolution's output is added on its own, as PyTorch broadcasts and promotes it."""
    if _is_residual(layer, x, summand):
        return conv_block(layer, x, norm, residual=summand, activation=activation, pool=pool, backend=backend)
    return _tail(conv_block(layer, x, norm, backend=backend) + summand, layer.weight.dim(), activation, pool)


def _is_residual(layer: nn.Module, x: Tensor, summand: Tensor | float) -> bool:
    if not isinstance(summand, Tensor) or summand.dim() != x.dim() or x.dim() != layer.weight.dim():
        return False
    if not summand.dtype == x.dtype == layer.weight.dtype or summand.device != x.device:
        return False
    if autocast_enabled(x.device.type):
        return False
    shape = convolved_shape(x, layer.weight, layer.stride, layer.padding, layer.dilation, layer.groups)
    return all(a == b for a, b in zip(summand.shape, shape))


def _tail(y: Tensor, rank: int, activation: str | tuple[str, float] | None, pool: tuple | None) -> Tensor:
    y = activate(y, *parse_activation(activation))
    return y if pool is None else _POOLS[rank][pool[0]](y, *pool[1:])


def linear_block(
    layer: nn.Module,  # a linear layer
    x: Tensor,  # [.., in_features]
    activation: str | tuple[str, float] | None = None,
    *,
    residual: Tensor | None = None,  # [.., out_features], added last
    backend: str | None = None,
) -> Tensor:  # [.., out_features]
    """activation(layer(x)) + residual, in one call.

    A layer of another class than torch.nn's or ours, or one with hooks, is called as it is.

    Args:
        backend: that of the layer if None.
    """
    if type(layer) not in LINEAR_LAYERS or has_hooks(layer) or not takes_linear(layer.weight, x):
        y = activate(layer(x), *parse_activation(activation))
        return y if residual is None else y + residual
    backend = backend or getattr(layer, "backend", "auto")
    return linear(x, layer.weight, layer.bias, activation=activation, residual=residual, backend=backend)


def folded_norm(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The scale and shift, [C] each, that a batch norm in eval mode applies."""
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    if norm.bias is None:
        return scale, -norm.running_mean * scale
    return scale, torch.addcmul(norm.bias, norm.running_mean, scale, value=-1)
