from bigmodel_kernels.ops.bias_act.op import bias_act as bias_act
