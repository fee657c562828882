from bigmodel_kernels.ops.encoder_layer.op import encoder_layer as encoder_layer
