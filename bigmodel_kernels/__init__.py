"""Fused attention, convolution and LSTM kernels that slot into PyTorch models. README.md has the first five minutes."""

from bigmodel_kernels import nn, ops, testing
from bigmodel_kernels._extension import build_info
from bigmodel_kernels._registry import backends, explain, use_backend
from bigmodel_kernels.ops import attention, attention_decode, attention_varlen, conv, lstm, lstm_cell
from bigmodel_kernels.optimize import PatchReport, optimize

__version__ = "0.1.0"

__all__ = [
    "PatchReport",
    "attention",
    "attention_decode",
    "attention_varlen",
    "backends",
    "build_info",
    "conv",
    "explain",
    "lstm",
    "lstm_cell",
    "nn",
    "ops",
    "optimize",
    "testing",
    "use_backend",
]
