"""Other libraries that can run on the ops of this one: one file each. Nothing of them is imported before it is asked for."""

from bigmodel_kernels.integrations import transformers as transformers
