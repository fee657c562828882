from bigmodel_kernels.ops.attention.op import attention as attention
