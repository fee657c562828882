"""Fused attention, convolution and LSTM kernels that slot into PyTorch models. See README.md for the first five minutes."""

from bigmodel_kernels import nn, ops
from bigmodel_kernels._extension import build_info
from bigmodel_kernels._registry import backends, explain, use_backend
from bigmodel_kernels.ops import *  # noqa: F403

__version__ = "0.1.0"
