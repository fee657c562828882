"""Linear: torch.nn's, on bmk.linear."""

from __future__ import annotations

import torch
from torch import Tensor

from bigmodel_kernels.ops.linear import linear


class Linear(torch.nn.Linear):
    """torch.nn.Linear: same constructor, parameters, results and errors."""

    backend = "auto"  # may be set on the class or a layer

    def forward(
        self,
        input: Tensor,  # [.., in_features]
    ) -> Tensor:  # [.., out_features]
        if not takes_linear(self, input):
            return super().forward(input)
        return linear(input, self.weight, self.bias, backend=self.backend)


LINEAR_LAYERS = (torch.nn.Linear, Linear)  # a subclass may compute anything


def takes_linear(layer: torch.nn.Linear, x: Tensor) -> bool:
    """Whether layer(x) is what `linear` computes: floating tensors that fit. Torch words the errors of others."""
    weight = layer.weight
    if x.is_nested or not weight.is_floating_point() or x.device != weight.device:
        return False
    fits = x.dim() > 0 and x.shape[-1] == weight.shape[-1]
    return fits and (x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type))


def has_hooks(m: torch.nn.Module) -> bool:
    """Whether something listens when the module is called."""
    return bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)
