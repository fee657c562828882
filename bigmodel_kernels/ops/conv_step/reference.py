"""One step of a causal convolution that streams, as its formula reads.

With L = dilation * (K - 1), the ring's slot t mod L holds the input of step t: tap k of step t sees slot
(t + k * dilation) mod L, which step t - L + k * dilation wrote, and the last tap sees x_t itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bigmodel_kernels.ops.conv.reference import activate


def window(
    x_t: Tensor,  # [N, C]
    ring: Tensor,  # [N, L, C]
    position: Tensor,  # [1] int64
    kernel: int,
    dilation: int,
) -> Tensor:  # [N, C, K]
    """The inputs that this step's output sees, oldest first."""
    if kernel == 1:
        return x_t.unsqueeze(-1)
    slots = (position + dilation * torch.arange(kernel - 1, device=x_t.device)) % ring.shape[1]
    return torch.cat([ring.index_select(1, slots), x_t.unsqueeze(1)], 1).transpose(1, 2)


def output(
    taps: Tensor,  # [N, C, K]
    weight: Tensor,  # [rows, C / groups, K]
    bias: Tensor | None,  # [rows]
    out_weight: Tensor | None,  # [C, D, 1]
    out_bias: Tensor | None,  # [C]
    skip_weight: Tensor | None,  # [S, D, 1]
    skip_bias: Tensor | None,  # [S]
    skip: Tensor | None,  # [N, S]
    groups: int,
    activation: str,
    slope: float,
) -> tuple[Tensor, Tensor]:
    """(y, skip_out) of the inputs that the step sees."""
    x_t = taps[..., -1]
    of_group = weight.unflatten(0, (groups, -1)).flatten(2)  # [groups, rows of one, C / groups * K]
    z = torch.einsum("ngk,grk->ngr", taps.unflatten(1, (groups, -1)).flatten(2), of_group).flatten(1)
    a = activate(z if bias is None else z + bias, activation, slope)
    y = a if out_weight is None else x_t + torch.nn.functional.linear(a, out_weight.squeeze(-1), out_bias)
    if skip_weight is None:
        return y, a.new_empty(0)
    total = torch.nn.functional.linear(a, skip_weight.squeeze(-1), skip_bias)
    return y, total if skip is None else skip + total
