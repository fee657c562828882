"""Drop-in layers: the constructor, forward, state_dict and errors of torch.nn, and fused blocks beside them."""

from bigmodel_kernels.nn.attention import MultiheadAttention as MultiheadAttention
from bigmodel_kernels.nn.conv import Conv1d as Conv1d
from bigmodel_kernels.nn.conv import Conv2d as Conv2d
from bigmodel_kernels.nn.conv import ConvTranspose1d as ConvTranspose1d
from bigmodel_kernels.nn.conv import ConvTranspose2d as ConvTranspose2d
from bigmodel_kernels.nn.conv_blocks import CausalConv1d as CausalConv1d
from bigmodel_kernels.nn.conv_blocks import ConvBlock1d as ConvBlock1d
from bigmodel_kernels.nn.conv_blocks import ConvBlock2d as ConvBlock2d
from bigmodel_kernels.nn.conv_blocks import GatedCausalConv1d as GatedCausalConv1d
from bigmodel_kernels.nn.conv_blocks import WaveNetLayer as WaveNetLayer
from bigmodel_kernels.nn.linear import Linear as Linear
from bigmodel_kernels.nn.lstm import LSTM as LSTM
from bigmodel_kernels.nn.lstm import LayerNormLSTM as LayerNormLSTM
from bigmodel_kernels.nn.lstm import LSTMCell as LSTMCell
from bigmodel_kernels.nn.norm import RMSNorm as RMSNorm
from bigmodel_kernels.nn.packed import pad_packed_sequence as pad_packed_sequence
from bigmodel_kernels.nn.transformer import Transformer as Transformer
from bigmodel_kernels.nn.transformer import TransformerDecoderLayer as TransformerDecoderLayer
from bigmodel_kernels.nn.transformer import TransformerEncoderLayer as TransformerEncoderLayer
