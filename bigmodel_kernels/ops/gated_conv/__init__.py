from bigmodel_kernels.ops.gated_conv.op import gated_conv as gated_conv
