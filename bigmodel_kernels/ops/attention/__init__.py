from bigmodel_kernels.ops.attention.op import attention as attention
from bigmodel_kernels.ops.attention.varlen import attention_varlen as attention_varlen
