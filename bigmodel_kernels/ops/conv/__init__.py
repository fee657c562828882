from bigmodel_kernels.ops.conv.op import conv as conv
