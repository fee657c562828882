"""Fused attention, convolution and LSTM kernels that slot into PyTorch models. See README.md for the first five minutes."""

from bigmodel_kernels import nn as nn
from bigmodel_kernels import ops as ops
from bigmodel_kernels._extension import build_info as build_info
from bigmodel_kernels._registry import backends as backends
from bigmodel_kernels._registry import explain as explain
from bigmodel_kernels._registry import use_backend as use_backend
from bigmodel_kernels.ops import *  # noqa: F403
from bigmodel_kernels.optimize import PatchReport as PatchReport
from bigmodel_kernels.optimize import optimize as optimize

__version__ = "0.1.0"
