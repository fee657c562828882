"""WaveNet: audio sample by sample, by stacks of gated causal convolutions whose dilation doubles from layer to layer.

After van den Oord et al. (2016), "WaveNet: a generative model for raw audio", arXiv 1609.03499, without conditioning.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bigmodel_kernels import ConvState
from bigmodel_kernels import nn as bnn


def mu_law_encode(
    audio: Tensor,  # in [-1, 1]
    num_classes: int = 256,
) -> Tensor:  # int64 in [0, num_classes)
    """Quantises audio so that quiet samples get finer steps (ITU-T G.711's mu-law with mu = num_classes - 1)."""
    mu = num_classes - 1
    audio = audio.clamp(-1, 1)
    companded = audio.sign() * torch.log1p(mu * audio.abs()) / math.log1p(mu)
    return ((companded + 1) / 2 * mu + 0.5).long()


def mu_law_decode(
    codes: Tensor,  # int64 in [0, num_classes)
    num_classes: int = 256,
) -> Tensor:  # float32 in [-1, 1]
    """The audio that `mu_law_encode` made these codes of, up to the quantisation."""
    mu = num_classes - 1
    companded = 2 * codes.to(torch.float32) / mu - 1
    return companded.sign() * torch.expm1(companded.abs() * math.log1p(mu)) / mu


class WaveNet(nn.Module):
    """Logits of the next sample from all samples so far.

    Args:
        num_classes: quantisation levels of a sample; see `mu_law_encode`.
        channels: of the residual stream and of the gates.
        skip_channels: of the sum of all layers' skip outputs.
        num_layers: layers of one stack, with dilations 1, 2, 4, ..
        num_stacks: stacks, one after the other.
        kernel_size: taps of each layer.

    The samples enter by an embedding, which is a 1x1 convolution of their one-hot vectors. Channels are innermost in memory
    from the first layer to the last.
    """

    def __init__(
        self,
        num_classes: int = 256,
        channels: int = 32,
        skip_channels: int = 64,
        num_layers: int = 8,
        num_stacks: int = 2,
        kernel_size: int = 2,
    ) -> None:
        super().__init__()
        for name, value in (("num_layers", num_layers), ("num_stacks", num_stacks)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.embedding = nn.Embedding(num_classes, channels)
        dilations = [2**i for _ in range(num_stacks) for i in range(num_layers)]
        last = len(dilations) - 1  # nothing reads the last layer's residual output
        self.layers = nn.ModuleList(
            bnn.WaveNetLayer(channels, channels, skip_channels, kernel_size, dilation, residual=i < last)
            for i, dilation in enumerate(dilations)
        )
        self.hidden = bnn.Linear(skip_channels, skip_channels)
        self.fc = bnn.Linear(skip_channels, num_classes)

    @property
    def receptive_field(self) -> int:
        """How many samples the prediction of the next one sees."""
        return 1 + sum(layer.conv.dilation[0] * (layer.conv.kernel_size[0] - 1) for layer in self.layers)

    def forward(
        self,
        codes: Tensor,  # [B, T] int64
    ) -> Tensor:  # [B, T, num_classes]: at t the logits of sample t + 1
        if codes.dim() != 2 or codes.is_floating_point():
            raise ValueError(f"codes: expected integers of shape [B, T], got {codes.dtype} {list(codes.shape)}")
        x, skip = self.embedding(codes).transpose(1, 2), None
        for layer in self.layers:
            x, skip = layer(x, skip)
        return self._logits(skip.transpose(1, 2))

    def _logits(self, skip: Tensor) -> Tensor:
        return self.fc(torch.relu(self.hidden(torch.relu(skip))))

    def initial_state(self, batch_size: int) -> list[ConvState]:
        """What the layers remember before the first sample."""
        return [layer.initial_state(batch_size) for layer in self.layers]

    def step(
        self,
        codes: Tensor,  # [B] int64
        states: list[ConvState],  # of all layers
    ) -> tuple[Tensor, list[ConvState]]:  # [B, num_classes], next states
        """The logits of the next sample, from one more sample: what `forward` gives at its last step. Without gradients the
        states given are written into."""
        x, skip, following = self.embedding(codes), None, []
        for layer, state in zip(self.layers, states, strict=True):
            x, skip, state = layer.step(x, state, skip)
            following.append(state)
        return self._logits(skip), following

    @torch.no_grad()
    def generate(
        self,
        length: int,
        start: Tensor | None = None,  # [B, T0] int64, T0 >= 1
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # [B, length]
        """Draws the samples that follow ``start`` (by default one sample of silence), one step of every layer each.

        Args:
            temperature: divides the logits; 0 takes the most likely sample.
            generator: of the draws.
        """
        if start is None:
            middle = self.embedding.num_embeddings // 2
            start = torch.full((1, 1), middle, dtype=torch.int64, device=self.fc.weight.device)
        if start.dim() != 2 or start.shape[1] < 1:
            raise ValueError(f"start: expected shape [B, T0] with at least one sample, got {list(start.shape)}")
        states, drawn = self.initial_state(len(start)), []
        for code in start.T:
            logits, states = self.step(code, states)
        while len(drawn) < length:
            if temperature == 0:
                code = logits.argmax(1)
            else:
                code = torch.softmax(logits / temperature, 1).multinomial(1, generator=generator).squeeze(1)
            drawn.append(code)
            if len(drawn) < length:
                logits, states = self.step(code, states)
        return torch.stack(drawn, 1) if drawn else start[:, :0]
