"""One layer with what follows it, in one call and with the layer's own parameters.

The plain PyTorch twin of a model writes ``max_pool2d(relu(self.conv1(x)), 2)``. Here the same ``self.conv1`` hands its
parameters to `bigmodel_kernels.conv`, which does the three in one pass over the output; the state_dict is the twin's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import bigmodel_kernels as bmk


def linear_relu(
    layer: nn.Linear,
    x: Tensor,  # [B, in_features]
) -> Tensor:  # [B, out_features]
    """A linear layer and its ReLU: without gradients one call, a convolution of single pixels."""
    if torch.is_grad_enabled():
        return torch.relu(layer(x))
    return bmk.conv(x.unsqueeze(-1), layer.weight.unsqueeze(-1), layer.bias, activation="relu").squeeze(-1)


def conv_act_pool(
    layer: nn.Module,  # bmk.nn.Conv1d/2d or ConvTranspose1d/2d
    x: Tensor,  # [B, Cin, H, W]
    *,
    activation: str | None = None,
    pool: tuple[str, int] | None = None,
) -> Tensor:  # [B, Cout, H', W']
    """Convolution, bias, activation and pooling of ``x``, with the weights and geometry of ``layer``."""
    transposed = bool(getattr(layer, "transposed", False))
    return bmk.conv(
        x,
        layer.weight,
        layer.bias,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        transposed=transposed,
        output_padding=layer.output_padding if transposed else 0,
        activation=activation,
        pool=pool,
    )
