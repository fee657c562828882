"""The textbook's multilayer perceptron for regression."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from bigmodel_kernels import nn as bnn
from bigmodel_kernels.nn.fused import linear_block


class BigModel(nn.Module):
    """Fully connected layers ``fc1``, ``fc2``, ... for regression with a mean squared error.

    Args:
        layer_sizes: widths from input to output; `WIDE` (1000-2000-1000-1, the default) and `NARROW` (1000-500-100-1)
            are the textbook's.
        relu: a ReLU between the layers. Without it the model is one linear map in several factors, which the textbook
            also shows.

    The last layer has no activation: a ReLU there, as one listing has it, could never predict a negative value.
    """

    WIDE = (1000, 2000, 1000, 1)
    NARROW = (1000, 500, 100, 1)

    def __init__(self, layer_sizes: Sequence[int] = WIDE, relu: bool = True) -> None:
        super().__init__()
        if len(layer_sizes) < 2 or any(size < 1 for size in layer_sizes):
            raise ValueError(f"layer_sizes: expected at least two positive widths, got {tuple(layer_sizes)}")
        self.layer_sizes = tuple(layer_sizes)
        self.relu = relu
        self.num_layers = len(layer_sizes) - 1
        for index in range(self.num_layers):
            self.add_module(f"fc{index + 1}", bnn.Linear(layer_sizes[index], layer_sizes[index + 1]))

    def forward(
        self,
        x: Tensor,  # [B, layer_sizes[0]]
    ) -> Tensor:  # [B, layer_sizes[-1]]
        for index in range(1, self.num_layers):
            x = linear_block(getattr(self, f"fc{index}"), x, "relu" if self.relu else None)
        return getattr(self, f"fc{self.num_layers}")(x)
