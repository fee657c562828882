"""What torch.nn has no single layer for: convolution blocks that run as one call, and causal convolutions that stream."""

from __future__ import annotations

from torch import Tensor, nn

from bigmodel_kernels.nn.conv import Conv1d, Conv2d
from bigmodel_kernels.nn.fused import conv_block
from bigmodel_kernels.nn.traced import refuse_script, traced_whole
from bigmodel_kernels.ops.conv.op import POOLS, conv, parse_activation
from bigmodel_kernels.ops.conv_step.op import ConvState, conv_step
from bigmodel_kernels.ops.gated_conv.op import gated_conv


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

    __prepare_scriptable__ = refuse_script
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

    @traced_whole
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
    next state, see `bigmodel_kernels.ops.conv_step.ConvState`.
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

    @traced_whole
    def forward(
        self,
        x: Tensor,  # [N, Cin, L]
    ) -> Tensor:  # [N, Cout, L]
        return conv(
            x, self.weight, self.bias, padding="causal", dilation=self.dilation, groups=self.groups,
            activation=self.activation, backend=self.backend,
        )  # fmt: skip

    def initial_state(self, batch_size: int) -> ConvState:
        """The state before the first step: no input yet."""
        return ConvState.start(batch_size, self.in_channels, self.kernel_size[0], self.dilation[0], self.weight)

    def step(
        self,
        x_t: Tensor,  # [N, Cin]
        state: ConvState | None = None,
    ) -> tuple[Tensor, ConvState]:  # [N, Cout], next state
        """One time step. ``state=None`` starts a sequence; without gradients, the state given is written into and returned."""
        y, _, state = conv_step(
            x_t, self.initial_state(len(x_t)) if state is None else state, self.weight, self.bias,
            dilation=self.dilation[0], groups=self.groups, activation=self.activation, backend=self.backend,
        )  # fmt: skip
        return y, state


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


def _parameters(layer: nn.Module | None) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias: straight from where a module keeps them, since asking it for six takes as long as a step's kernel."""
    if layer is None:
        return None, None
    known = layer._parameters
    if "weight" in known and "bias" in known:
        return known["weight"], known["bias"]
    return layer.weight, layer.bias  # of a parametrized layer, computed anew


class WaveNetLayer(nn.Module):
    """One layer of WaveNet (van den Oord et al., 2016): the gated causal convolution, then a 1x1 convolution back onto its
    input and another onto the sum that all layers share, in one call.

    Args:
        channels: of the input and of the residual output.
        gate_channels: of the gate; `channels` by default.
        skip_channels: of the sum; `channels` by default.
        kernel_size, dilation, bias: of the gated convolution; the 1x1 convolutions have a bias too or not.
        residual: False leaves out the residual output, which a network's last layer has no use for; it is then None.

    The parameters are those of `conv` (the rows of tanh first), `out` and `skip`, three convolutions of torch.nn. Fastest with
    the channels innermost in memory: see `bigmodel_kernels.gated_conv`.
    """

    backend = "auto"
    __prepare_scriptable__ = refuse_script

    def __init__(
        self, channels, gate_channels=None, skip_channels=None, kernel_size=2, dilation=1, bias=True, residual=True,
        device=None, dtype=None,
    ) -> None:  # fmt: skip
        super().__init__()
        gates = channels if gate_channels is None else gate_channels
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.conv = GatedCausalConv1d(channels, gates, kernel_size, dilation, **options)
        self.register_module("out", nn.Conv1d(gates, channels, 1, **options) if residual else None)
        self.skip = nn.Conv1d(gates, channels if skip_channels is None else skip_channels, 1, **options)

    def _weights(self) -> tuple[Tensor | None, ...]:
        return *_parameters(self.conv), *_parameters(self.out), *_parameters(self.skip)

    @traced_whole
    def forward(
        self,
        x: Tensor,  # [N, C, T]
        skip: Tensor | None = None,  # [N, S, T], the sum of the layers before
    ) -> tuple[Tensor | None, Tensor]:  # [N, C, T], [N, S, T]
        return gated_conv(x, *self._weights(), skip=skip, dilation=self.conv.dilation[0], backend=self.backend)

    def initial_state(self, batch_size: int) -> ConvState:
        """The state before the first step."""
        return self.conv.initial_state(batch_size)

    def step(
        self,
        x_t: Tensor,  # [N, C]
        state: ConvState | None = None,
        skip: Tensor | None = None,  # [N, S]
    ) -> tuple[Tensor | None, Tensor, ConvState]:  # [N, C], [N, S], next state
        """One time step; the state as in `CausalConv1d.step`."""
        modules = self._modules
        conv, out = modules["conv"], modules["out"]
        y, total, state = conv_step(
            x_t, self.initial_state(len(x_t)) if state is None else state, *_parameters(conv), *_parameters(out),
            *_parameters(modules["skip"]), skip=skip, dilation=conv.dilation[0], activation="tanh_sigmoid",
            backend=self.backend,
        )  # fmt: skip
        return None if out is None else y, total, state
