from bigmodel_kernels.ops.norm.op import layer_norm as layer_norm
from bigmodel_kernels.ops.norm.op import rms_norm as rms_norm
