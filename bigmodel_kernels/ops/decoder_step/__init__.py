from bigmodel_kernels.ops.decoder_step.op import decoder_step as decoder_step
