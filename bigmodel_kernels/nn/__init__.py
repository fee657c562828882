"""Drop-in layers: the constructor, forward, state_dict and errors of torch.nn, and fused blocks beside them."""

from bigmodel_kernels.nn.lstm import LSTM as LSTM
from bigmodel_kernels.nn.lstm import LayerNormLSTM as LayerNormLSTM
from bigmodel_kernels.nn.lstm import LSTMCell as LSTMCell
