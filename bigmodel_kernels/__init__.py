"""Fused attention, convolution and LSTM kernels that slot into PyTorch models. README.md has the first five minutes."""

from bigmodel_kernels import integrations, nn, ops, testing
from bigmodel_kernels._extension import build_info
from bigmodel_kernels._registry import backends, explain, use_backend
from bigmodel_kernels.ops import (
    ConvState,
    attention,
    attention_decode,
    attention_varlen,
    bias_act,
    conv,
    conv_step,
    cross_entropy,
    decoder_step,
    encoder_layer,
    gated_conv,
    layer_norm,
    linear,
    lstm,
    lstm_cell,
    norm_lstm,
    rms_norm,
)
from bigmodel_kernels.optimize import PatchReport, optimize

__version__ = "0.1.0"

__all__ = [
    "ConvState",
    "PatchReport",
    "attention",
    "attention_decode",
    "attention_varlen",
    "backends",
    "bias_act",
    "build_info",
    "conv",
    "conv_step",
    "cross_entropy",
    "decoder_step",
    "encoder_layer",
    "explain",
    "gated_conv",
    "integrations",
    "layer_norm",
    "linear",
    "lstm",
    "lstm_cell",
    "nn",
    "norm_lstm",
    "ops",
    "optimize",
    "rms_norm",
    "testing",
    "use_backend",
]
