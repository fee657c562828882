"""What torch.nn has no single layer for: convolution blocks that run as one call, and causal convolutions that stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bigmodel_kernels.nn.conv import Conv1d, Conv2d
from bigmodel_kernels.nn.fused import conv_block
from bigmodel_kernels.ops.conv.op import POOLS, conv, parse_activation


class _ConvBlock(nn.Module):
    """Convolution, optional batch norm, activation and pool.

    In eval mode this is one call, the norm folded into a scale and a shift. In training the batch norm needs the statistics
    of the whole convolution first, so with a norm it is the convolution, then torch's batch norm, then the tail; without a
    norm it is one call as well.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in torch.nn.Conv2d. A gated
            activation ("tanh_sigmoid") halves `out_channels`.
        norm: None or "batch".
        activation, pool: as in `bigmodel_kernels.conv`.
    """

    _conv_type: type
    _norm_type: type

    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True, norm=None,
        activation=None, pool=None, device=None, dtype=None,
    ) -> None:  # fmt: skip
        super().__init__()
        if norm not in (None, "batch"):
            raise ValueError(f"norm must be None or 'batch', got {norm!r}")
        parse_activation(activation)
        if pool is not None and (not isinstance(pool, (tuple, list)) or pool[0] not in POOLS):
            raise ValueError(f"pool must be None or ('max' | 'avg', size[, stride]), got {pool!r}")
        options = {"device": device, "dtype": dtype}
        self.conv = self._conv_type(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, **options
        )
        self.norm = self._norm_type(out_channels, **options) if norm == "batch" else None
        self.activation, self.pool = activation, pool

    def forward(
        self,
        x: Tensor,  # [N, Cin, ..]
    ) -> Tensor:  # [N, Cout, ..], pooled
        return conv_block(self.conv, x, self.norm, activation=self.activation, pool=self.pool)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, pool={self.pool!r}"


class ConvBlock1d(_ConvBlock):
    __doc__ = _ConvBlock.__doc__
    _conv_type, _norm_type = Conv1d, nn.BatchNorm1d


class ConvBlock2d(_ConvBlock):
    __doc__ = _ConvBlock.__doc__
    _conv_type, _norm_type = Conv2d, nn.BatchNorm2d


class CausalConv1d(Conv1d):
    """A 1-d convolution whose output at t sees inputs up to t, with an optional activation, and a step for streaming.

    Args:
        in_channels, out_channels, kernel_size, dilation, groups, bias: as in torch.nn.Conv1d; the stride is 1.
        activation: as in `bigmodel_kernels.conv`.

    `forward` maps [N, Cin, L] to [N, Cout, L]. `step` maps one time step and the state to the same output column and the
    next state: the last dilation * (K - 1) inputs, oldest first, zeros at the start.
    """

    def __init__(
        self, in_channels, out_channels, kernel_size, dilation=1, groups=1, bias=True, activation=None, device=None,
        dtype=None,
    ) -> None:  # fmt: skip
        parse_activation(activation)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            dilation=dilation,
            groups=groups,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.activation = activation

    def forward(
        self,
        x: Tensor,  # [N, Cin, L]
    ) -> Tensor:  # [N, Cout, L]
        return self._causal(x, "causal")

    def _causal(self, x: Tensor, padding: str | int) -> Tensor:
        return conv(
            x, self.weight, self.bias, padding=padding, dilation=self.dilation, groups=self.groups,
            activation=self.activation, backend=self.backend,
        )  # fmt: skip

    def initial_state(self, batch_size: int) -> Tensor:  # [N, Cin, dilation * (K - 1)]
        """The state before the first step: no input yet."""
        return self.weight.new_zeros(batch_size, self.in_channels, self.dilation[0] * (self.kernel_size[0] - 1))

    def step(
        self,
        x_t: Tensor,  # [N, Cin]
        state: Tensor | None = None,  # [N, Cin, dilation * (K - 1)]
    ) -> tuple[Tensor, Tensor]:  # [N, Cout], next state
        """One time step. ``state=None`` starts a sequence."""
        if x_t.dim() != 2 or x_t.shape[1] != self.in_channels:
            raise RuntimeError(f"x_t must have shape [N, {self.in_channels}], got {list(x_t.shape)}")
        if state is None:
            state = self.initial_state(x_t.shape[0]).to(x_t.dtype)
        expected = (x_t.shape[0], self.in_channels, self.dilation[0] * (self.kernel_size[0] - 1))
        if state.shape != expected:
            raise RuntimeError(f"state must have shape {list(expected)}, got {list(state.shape)}")
        window = torch.cat([state, x_t.unsqueeze(-1)], -1)
        taps = window[..., :: self.dilation[0]]  # [N, Cin, K]: the inputs that this output sees
        y = conv(
            taps, self.weight, self.bias, groups=self.groups, activation=self.activation, backend=self.backend
        )  # fmt: skip
        return y.squeeze(-1), window[..., 1:]


class GatedCausalConv1d(CausalConv1d):
    """WaveNet's gate (van den Oord et al., 2016): tanh(W_f * x) * sigmoid(W_g * x), causal and dilated, in one call.

    Args:
        in_channels, out_channels, kernel_size, dilation, bias: as in `CausalConv1d`; the weight has 2 * out_channels rows, those
            of W_f first.
    """

    def __init__(self, in_channels, out_channels, kernel_size, dilation=1, bias=True, device=None, dtype=None) -> None:
        super().__init__(
            in_channels, 2 * out_channels, kernel_size, dilation=dilation, bias=bias, activation="tanh_sigmoid",
            device=device, dtype=dtype,
        )  # fmt: skip
