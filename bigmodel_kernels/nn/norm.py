"""RMSNorm: torch.nn's, on bmk.rms_norm."""

from __future__ import annotations

import torch
from torch import Tensor

from bigmodel_kernels.ops.norm import rms_norm


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm: same constructor, parameters, results and errors."""

    backend = "auto"  # may be set on the class or a layer

    def forward(
        self,
        x: Tensor,  # [.., *normalized_shape]
    ) -> Tensor:
        if not self._takes(x):
            return super().forward(x)
        return rms_norm(x, self.weight, eps=self.eps, backend=self.backend)

    def _takes(self, x: Tensor) -> bool:
        """Whether this is a normalisation of rows of one dtype. Torch has the rest, and words the errors; a compiler makes one
        kernel of torch's and its neighbours."""
        if torch.compiler.is_compiling() or x.is_nested or not x.is_floating_point() or len(self.normalized_shape) != 1:
            return False
        if x.dim() == 0 or x.shape[-1] != self.normalized_shape[0] or x.shape[-1] == 0:
            return False
        return self.weight is None or (self.weight.dtype == x.dtype and self.weight.device == x.device)
