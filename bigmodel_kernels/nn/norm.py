"""RMSNorm: torch.nn's, on bmk.rms_norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy

from bigmodel_kernels.nn.traced import refuse_script, traced
from bigmodel_kernels.ops.norm import rms_norm
from bigmodel_kernels.ops.norm.op import PLANS, prepare_rms


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm: same constructor, parameters, results and errors."""

    backend = "auto"  # may be set on the class or a layer
    __prepare_scriptable__ = refuse_script

    def forward(
        self,
        x: Tensor,  # [.., *normalized_shape]
    ) -> Tensor:
        if type(x) is not Tensor and isinstance(x, Proxy):
            return traced(self, super().forward, x)
        weight = self.weight  # asked for once: a parametrization computes it
        tensors = (x, None, weight, None)
        key, plan = PLANS.look_up(self.backend, tensors, (self.eps, False, self.normalized_shape))
        if plan is not None:
            try:
                return plan(*tensors)
            except RuntimeError:  # is raised below
                pass
        if not self._takes(x, weight):
            return F.rms_norm(x, self.normalized_shape, weight, self.eps)
        y = rms_norm(x, weight, eps=self.eps, backend=self.backend)
        if key is not None:
            PLANS.remember(key, prepare_rms(x, weight, eps=self.eps), save=False)
        return y

    def _takes(self, x: Tensor, weight: Tensor | None) -> bool:
        """Whether this is a normalisation of rows of one dtype. Torch has the rest, and words the errors; a compiler makes one
        kernel of torch's and its neighbours, and a trace is to be the same with and without gradients."""
        if (
            torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or not isinstance(x, Tensor)
            or x.is_nested
            or not x.is_floating_point()
        ):
            return False
        if (
            len(self.normalized_shape) != 1
            or x.dim() == 0
            or x.shape[-1] != self.normalized_shape[0]
            or x.shape[-1] == 0
        ):
            return False
        return weight is None or (weight.dtype == x.dtype and weight.device == x.device)
