"""Linear: torch.nn's, on bmk.linear."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy
from torch.nn.modules.module import _has_any_global_hook

from bigmodel_kernels._library import autocast_enabled
from bigmodel_kernels.nn.choice import is_torchs, remembering
from bigmodel_kernels.nn.traced import refuse_script, traced
from bigmodel_kernels.ops.linear import linear


class Linear(torch.nn.Linear):
    """torch.nn.Linear: same constructor, parameters, results and errors."""

    backend = "auto"  # may be set on the class or a layer
    __prepare_scriptable__ = refuse_script

    def forward(
        self,
        input: Tensor,  # [.., in_features]
    ) -> Tensor:  # [.., out_features]
        if isinstance(input, Proxy):
            return traced(self, super().forward, input)
        weight = self.weight  # asked for once: a parametrization computes it, and spectral_norm moves on every time
        torchs = is_torchs(self, input, weight)
        if torchs or not takes_linear(weight, input):
            return F.linear(input, weight, self.bias)
        if torchs is None:
            return remembering(self, input, weight)(linear, input, weight, self.bias, backend=self.backend)
        return linear(input, weight, self.bias, backend=self.backend)


LINEAR_LAYERS = (torch.nn.Linear, Linear)  # a subclass may compute anything


def takes_linear(weight: Tensor, x: Tensor) -> bool:
    """Whether a layer of this weight is what `linear` computes: floating tensors that fit. Torch words the errors of others."""
    if not isinstance(x, Tensor) or x.is_nested or not weight.is_floating_point() or x.device != weight.device:
        return False
    fits = x.dim() > 0 and x.shape[-1] == weight.shape[-1]
    return fits and (x.dtype == weight.dtype or autocast_enabled(x.device.type))


def has_hooks(m: torch.nn.Module) -> bool:
    """Whether something listens when the module is called."""
    own = m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
    return bool(own) or _has_any_global_hook()
