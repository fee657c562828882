"""LSTM and LSTMCell with the constructor, results, state_dict and errors of torch.nn's, and an LSTM with layer norm."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from bigmodel_kernels import _registry
from bigmodel_kernels.nn.choice import is_torchs, remembering
from bigmodel_kernels.nn.traced import refuse_script, traced, traced_whole
from bigmodel_kernels.ops.lstm import lstm
from bigmodel_kernels.ops.lstm_cell import lstm_cell
from bigmodel_kernels.ops.norm import layer_norm
from bigmodel_kernels.ops.norm_lstm import norm_lstm


class LSTM(nn.RNNBase):
    """torch.nn.LSTM on the kernels of this library; see there for arguments, inputs and outputs.

    Derives from RNNBase, not from torch.nn.LSTM, which torch.compile refuses to trace: it compiles with fullgraph=True, in
    training too, and its backward runs in eval mode and can be differentiated again on every device.
    """

    backend = "auto"  # may be set on the class or a layer
    __prepare_scriptable__ = refuse_script

    def __init__(self, *args, **kwargs):
        super().__init__("LSTM", *args, **kwargs)

    def _weights(self) -> list[Tensor]:
        # By name, not from _flat_weights: torch.func.functional_call and parametrizations replace what the names give.
        return [getattr(self, name) for name in self._flat_weights_names]

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        weight_dtype = self.weight_ih_l0.dtype
        if input.dtype != weight_dtype and not torch._C._is_any_autocast_enabled():
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight_dtype}). "
                f"Convert input: input.to({weight_dtype}), or convert model: model.to({input.dtype})"
            )
        expected_dim = 2 if batch_sizes is not None else 3
        if input.dim() != expected_dim:
            raise RuntimeError(f"input must have {expected_dim} dimensions, got {input.dim()}")
        if self.input_size != input.size(-1):
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.size(-1)}"
            )

    def check_forward_args(self, input: Tensor, hidden: tuple[Tensor, Tensor], batch_sizes: Tensor | None) -> None:
        self.check_input(input, batch_sizes)
        layers, batch, state = self.get_expected_hidden_size(input, batch_sizes)
        self.check_hidden_size(hidden[0], (layers, batch, state), "Expected hidden[0] size {}, got {}")
        self.check_hidden_size(hidden[1], (layers, batch, self.hidden_size), "Expected hidden[1] size {}, got {}")

    def permute_hidden(self, hx: tuple[Tensor, Tensor], permutation: Tensor | None) -> tuple[Tensor, Tensor]:
        if permutation is None:
            return hx
        return hx[0].index_select(1, permutation), hx[1].index_select(1, permutation)

    @traced_whole
    def forward(self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None):
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        if hx is not None:
            self._check_rank(hx, batched)
        if not batched:
            input = input.unsqueeze(0 if self.batch_first else 1)
            hx = None if hx is None else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        if hx is None:
            self.check_input(input, None)
        else:
            self.check_forward_args(input, hx, None)
        output, (h_n, c_n) = self._run(input, hx, batch_first=self.batch_first)
        if not batched:
            return output.squeeze(0 if self.batch_first else 1), (h_n.squeeze(1), c_n.squeeze(1))
        return output, (h_n, c_n)

    def _forward_packed(self, packed: PackedSequence, hx: tuple[Tensor, Tensor] | None):
        if hx is None:
            self.check_input(packed.data, packed.batch_sizes)
        else:
            hx = self.permute_hidden(hx, packed.sorted_indices)
            self.check_forward_args(packed.data, hx, packed.batch_sizes)
        data, states = self._run(packed.data, hx, batch_sizes=packed.batch_sizes)
        output = PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        return output, self.permute_hidden(states, packed.unsorted_indices)

    def _run(self, x: Tensor, hx: tuple[Tensor, Tensor] | None, **options):
        return lstm(
            x,
            hx,
            self._weights(),
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            dropout=self.dropout,
            training=self.training,
            backend=self.backend,
            **options,
        )

    @staticmethod
    def _check_rank(hx: tuple[Tensor, Tensor], batched: bool) -> None:
        kind, rank = ("batched 3-D", 3) if batched else ("unbatched 2-D", 2)
        if hx[0].dim() != rank or hx[1].dim() != rank:
            raise RuntimeError(
                f"For {kind} input, hx and cx should also be {rank}-D but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
            )


class LSTMCell(nn.LSTMCell):
    """torch.nn.LSTMCell on the kernels of this library; see there for arguments, inputs and outputs."""

    backend = "auto"  # may be set on the class or a layer
    __prepare_scriptable__ = refuse_script

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        if isinstance(input, Proxy):
            return traced(self, super().forward, input, hx)
        if input.dim() not in (1, 2):
            raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
        if hx is not None:
            for i, value in enumerate(hx):
                if value.dim() not in (1, 2):
                    raise ValueError(f"LSTMCell: Expected hx[{i}] to be 1D or 2D, got {value.dim()}D instead")
        batched = input.dim() == 2
        if not batched:
            input = input.unsqueeze(0)
            hx = None if hx is None else tuple(t.unsqueeze(0) for t in hx)
        if hx is None:
            hx = tuple(input.new_zeros(input.size(0), self.hidden_size) for _ in range(2))
        weights = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        torchs = is_torchs(self, input, weights[0])
        if torchs:
            h, c = torch.lstm_cell(input, hx, *weights)
        else:
            call = lstm_cell if torchs is False else partial(remembering(self, input, weights[0]), lstm_cell)
            h, c = call(input, hx, *weights, backend=self.backend)
        return (h, c) if batched else (h.squeeze(0), c.squeeze(0))


class LayerNormLSTM(nn.Module):
    """An LSTM whose pre-activations and cell state are normalised over the units (Ba, Kiros & Hinton 2016, section 3.1 and
    the supplement's equations 20 to 22):

        [i f g o] = LN_ih(W_ih x_t) + LN_hh(W_hh h_(t-1)) + b
        c_t = sigmoid(f) c_(t-1) + sigmoid(i) tanh(g)        h_t = sigmoid(o) tanh(LN_c(c_t))

    One direction, `num_layers` deep, dropout between the layers. x [T, B, I] ([B, T, I] with batch_first), or without B;
    hx as torch.nn.LSTM takes it. The products with W_ih are made for all steps at once, the steps by one op (bmk.norm_lstm).
    """

    backend = "auto"  # may be set on the class or a layer
    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        batch_first: bool = False,
        dropout: float = 0.0,
        eps: float = 1e-5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if input_size <= 0 or hidden_size <= 0 or num_layers <= 0:
            raise ValueError(
                f"input_size, hidden_size and num_layers must be positive, got {input_size}, {hidden_size}, {num_layers}"
            )
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be a probability in [0, 1], got {dropout}")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.batch_first, self.dropout = batch_first, dropout
        options = {"device": device, "dtype": dtype}
        sizes = [input_size] + [hidden_size] * (num_layers - 1)
        self.ih = nn.ModuleList(nn.Linear(size, 4 * hidden_size, bias=False, **options) for size in sizes)
        self.hh = nn.ModuleList(nn.Linear(hidden_size, 4 * hidden_size, bias=False, **options) for _ in sizes)
        self.norm_ih = nn.ModuleList(nn.LayerNorm(4 * hidden_size, eps, **options) for _ in sizes)  # its bias is b
        self.norm_hh = nn.ModuleList(nn.LayerNorm(4 * hidden_size, eps, bias=False, **options) for _ in sizes)
        self.norm_c = nn.ModuleList(nn.LayerNorm(hidden_size, eps, **options) for _ in sizes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (*self.ih, *self.hh):
            nn.init.uniform_(linear.weight, -(self.hidden_size**-0.5), self.hidden_size**-0.5)
        for norm in (*self.norm_ih, *self.norm_hh, *self.norm_c):
            norm.reset_parameters()

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, batch_first={self.batch_first}"

    @traced_whole
    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None):
        if input.dim() not in (2, 3):
            raise ValueError(f"LayerNormLSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        if input.size(-1) != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.size(-1)}"
            )
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(0 if self.batch_first else 1)
        x = x.transpose(0, 1) if self.batch_first else x
        if hx is None:
            zeros = x.new_zeros(self.num_layers, x.size(1), self.hidden_size)
            hx = (zeros, zeros)
        elif not batched:
            hx = (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        expected = [self.num_layers, x.size(1), self.hidden_size]
        for i, state in enumerate(hx):
            if list(state.shape) != expected:
                raise RuntimeError(f"Expected hidden[{i}] size {tuple(expected)}, got {list(state.shape)}")
        h_n, c_n = [], []
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout > 0:
                x = nn.functional.dropout(x, self.dropout, self.training)
            x, h, c = self._layer(layer, x, hx[0][layer], hx[1][layer])
            h_n.append(h)
            c_n.append(c)
        output, states = x.transpose(0, 1) if self.batch_first else x, (torch.stack(h_n), torch.stack(c_n))
        if not batched:
            return output.squeeze(0 if self.batch_first else 1), (states[0].squeeze(1), states[1].squeeze(1))
        return output, states

    def _layer(self, layer: int, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, norm_hh, norm_c = _normed(self.norm_ih[layer], self.ih[layer](x)), self.norm_hh[layer], self.norm_c[layer]
        output, (h, c) = norm_lstm(
            a,
            (h, c),
            self.hh[layer].weight,
            norm_hh.weight,
            norm_c.weight,
            norm_c.bias,
            eps=norm_hh.eps,
            eps_c=norm_c.eps,
            backend=self.backend,
        )
        return output, h, c


def _normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """norm(x), on the backend that use_backend or the environment names: by itself no other pays for the call of an op, which
    takes up to a fifth of a small step."""
    if torch.compiler.is_compiling() or _registry.wanted("auto") in ("auto", "torch"):
        return norm(x)
    return layer_norm(x, norm.weight, norm.bias, eps=norm.eps)
