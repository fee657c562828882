// Attention for one instruction set: out = softmax(softcap(scale q k^T) + bias) v, its log-sum-exp, and all gradients.
#include "attention_tile_kernel.h"

#include "attention_mask_kernel.h"

#include "attention_forward_kernel.h"

#include "attention_backward_kernel.h"

#include "attention_dbias_kernel.h"
