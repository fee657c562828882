from bigmodel_kernels.ops.linear.op import linear as linear
