from bigmodel_kernels.ops.lstm.op import lstm as lstm
