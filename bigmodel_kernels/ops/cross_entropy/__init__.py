from bigmodel_kernels.ops.cross_entropy.op import cross_entropy as cross_entropy
