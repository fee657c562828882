"""torch.nn's convolution layers on bmk.conv: same constructor, parameters, results and errors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Proxy

from bigmodel_kernels.nn.traced import traced
from bigmodel_kernels.ops.conv.op import conv


class _Conv:
    """The forward of a convolution layer. `backend` may be set on the class or a layer; "auto" by default."""

    backend = "auto"

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(input, Proxy):
            return traced(self, lambda x: super(_Conv, self)._conv_forward(x, weight, bias), input)
        if self.padding_mode != "zeros":  # reflect, replicate and circular padding are PyTorch's own
            return super()._conv_forward(input, weight, bias)
        return conv(
            input, weight, bias, stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups,
            backend=self.backend,
        )  # fmt: skip


class _ConvTranspose:
    backend = "auto"
    _axes: int

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if isinstance(input, Proxy):
            return traced(self, super().forward, input, output_size)
        if self.padding_mode != "zeros":
            raise ValueError(f"Only `zeros` padding mode is supported for {type(self).__name__}")
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, self._axes, self.dilation
        )
        return conv(
            input, self.weight, self.bias, stride=self.stride, padding=self.padding, dilation=self.dilation,
            groups=self.groups, transposed=True, output_padding=output_padding, backend=self.backend,
        )  # fmt: skip


class Conv1d(_Conv, torch.nn.Conv1d):
    """Drop-in for torch.nn.Conv1d."""


class Conv2d(_Conv, torch.nn.Conv2d):
    """Drop-in for torch.nn.Conv2d."""


class ConvTranspose1d(_ConvTranspose, torch.nn.ConvTranspose1d):
    """Drop-in for torch.nn.ConvTranspose1d."""

    _axes = 1


class ConvTranspose2d(_ConvTranspose, torch.nn.ConvTranspose2d):
    """Drop-in for torch.nn.ConvTranspose2d."""

    _axes = 2
