from bigmodel_kernels.ops.conv_step.op import ConvState as ConvState
from bigmodel_kernels.ops.conv_step.op import conv_step as conv_step
