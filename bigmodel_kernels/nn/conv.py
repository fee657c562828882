"""torch.nn's convolution layers on bmk.conv: same constructor, parameters, results and errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy

from bigmodel_kernels.nn.choice import is_torchs, remembering
from bigmodel_kernels.nn.traced import refuse_script, traced
from bigmodel_kernels.ops.conv.op import conv


class _Conv:
    """The forward of a convolution layer. `backend` may be set on the class or a layer; "auto" by default."""

    backend = "auto"
    __prepare_scriptable__ = refuse_script

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(input, Proxy):
            return traced(self, lambda x: super(_Conv, self)._conv_forward(x, weight, bias), input)
        torchs = is_torchs(self, input, weight)
        if torchs or self.padding_mode != "zeros":  # reflect, replicate and circular padding are PyTorch's own
            return super()._conv_forward(input, weight, bias)
        call = conv if torchs is False else partial(remembering(self, input, weight), conv)
        return call(
            input, weight, bias, stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups,
            backend=self.backend,
        )  # fmt: skip


class _ConvTranspose:
    backend = "auto"
    __prepare_scriptable__ = refuse_script
    _axes: int
    _transposed: Callable[..., Tensor]

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if isinstance(input, Proxy):
            return traced(self, super().forward, input, output_size)
        weight = self.weight  # asked for once: a parametrization computes it, and spectral_norm moves on every time
        torchs = None if output_size else is_torchs(self, input, weight)
        if self.padding_mode != "zeros":
            raise ValueError(f"Only `zeros` padding mode is supported for {type(self).__name__}")
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, self._axes, self.dilation
        )
        if torchs:
            sizes = self.stride, self.padding, output_padding, self.groups, self.dilation
            return self._transposed(input, weight, self.bias, *sizes)
        call = conv if torchs is False or output_size else partial(remembering(self, input, weight), conv)
        return call(
            input, weight, self.bias, stride=self.stride, padding=self.padding, dilation=self.dilation,
            groups=self.groups, transposed=True, output_padding=output_padding, backend=self.backend,
        )  # fmt: skip


class Conv1d(_Conv, torch.nn.Conv1d):
    """Drop-in for torch.nn.Conv1d."""


class Conv2d(_Conv, torch.nn.Conv2d):
    """Drop-in for torch.nn.Conv2d."""


class ConvTranspose1d(_ConvTranspose, torch.nn.ConvTranspose1d):
    """Drop-in for torch.nn.ConvTranspose1d."""

    _axes = 1
    _transposed = staticmethod(F.conv_transpose1d)


class ConvTranspose2d(_ConvTranspose, torch.nn.ConvTranspose2d):
    """Drop-in for torch.nn.ConvTranspose2d."""

    _axes = 2
    _transposed = staticmethod(F.conv_transpose2d)
