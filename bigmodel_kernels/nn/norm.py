"""RMSNorm: torch.nn's, on bmk.rms_norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy

from bigmodel_kernels.nn.choice import is_torchs, remembering
from bigmodel_kernels.nn.traced import refuse_script, traced
from bigmodel_kernels.ops.norm import rms_norm


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm: same constructor, parameters, results and errors."""

    backend = "auto"  # may be set on the class or a layer
    __prepare_scriptable__ = refuse_script

    def forward(
        self,
        x: Tensor,  # [.., *normalized_shape]
    ) -> Tensor:
        if isinstance(x, Proxy):
            return traced(self, super().forward, x)
        weight = self.weight  # asked for once: a parametrization computes it
        torchs = is_torchs(self, x, weight)
        if torchs or not self._takes(x, weight):
            return F.rms_norm(x, self.normalized_shape, weight, self.eps)
        if torchs is None:
            return remembering(self, x, weight)(rms_norm, x, weight, eps=self.eps, backend=self.backend)
        return rms_norm(x, weight, eps=self.eps, backend=self.backend)

    def _takes(self, x: Tensor, weight: Tensor | None) -> bool:
        """Whether this is a normalisation of rows of one dtype. Torch has the rest, and words the errors; a compiler makes one
        kernel of torch's and its neighbours."""
        if torch.compiler.is_compiling() or not isinstance(x, Tensor) or x.is_nested or not x.is_floating_point():
            return False
        if (
            len(self.normalized_shape) != 1
            or x.dim() == 0
            or x.shape[-1] != self.normalized_shape[0]
            or x.shape[-1] == 0
        ):
            return False
        return weight is None or (weight.dtype == x.dtype and weight.device == x.device)
