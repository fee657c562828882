from bigmodel_kernels.ops.norm_lstm.op import norm_lstm as norm_lstm
