"""The ops, one line each."""

from bigmodel_kernels.ops.attention import attention as attention
from bigmodel_kernels.ops.attention_decode import attention_decode as attention_decode
from bigmodel_kernels.ops.attention_varlen import attention_varlen as attention_varlen
from bigmodel_kernels.ops.bias_act import bias_act as bias_act
from bigmodel_kernels.ops.conv import conv as conv
from bigmodel_kernels.ops.conv_step import ConvState as ConvState
from bigmodel_kernels.ops.conv_step import conv_step as conv_step
from bigmodel_kernels.ops.cross_entropy import cross_entropy as cross_entropy
from bigmodel_kernels.ops.decoder_step import decoder_step as decoder_step
from bigmodel_kernels.ops.encoder_layer import encoder_layer as encoder_layer
from bigmodel_kernels.ops.gated_conv import gated_conv as gated_conv
from bigmodel_kernels.ops.linear import linear as linear
from bigmodel_kernels.ops.lstm import lstm as lstm
from bigmodel_kernels.ops.lstm_cell import lstm_cell as lstm_cell
from bigmodel_kernels.ops.norm import layer_norm as layer_norm
from bigmodel_kernels.ops.norm import rms_norm as rms_norm
from bigmodel_kernels.ops.norm_lstm import norm_lstm as norm_lstm


def names() -> tuple[str, ...]:
    """The stems of all ops."""
    from importlib.resources import files

    return tuple(
        sorted(entry.name for entry in files(__name__).iterdir() if entry.is_dir() and not entry.name.startswith("_"))
    )
