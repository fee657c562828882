// Attention for one instruction set: out = softmax(softcap(scale q k^T) + bias) v, its log-sum-exp, and all gradients.
//
// Who owns what: a task is a block of rows (forward) or of keys (backward) of one batch entry and key/value head; see the
// two files. Saved for the backward: out and lse, and in bfloat16 the probabilities of few keys (attention_kept_kernel.h)
// or what rounding takes from out (attention_rest_kernel.h).
// Refused: nothing but other dtypes; any strides, sizes and head widths.
//
// Floor: 2 (D + Dv) operations per score forward and 2 (3 D + 2 Dv) backward at the machine's peak, halved where causal;
// on two Zen 5 cores 480 GFLOP/s, for B1 H8 S1024 D64 4.5 ms forward full, 2.2 ms causal, 11.2 and 5.6 ms backward; 831 where
// bfloat16 numbers are multiplied in pairs. Predicted: of 64 + 13 cycles for 16 scores forward 64 are products (32 in pairs),
// which with the part-filled tiles at the causal edge makes 80 % of the peak full and 72 % causal. Measured, useful operations
// over the peak, causal: 66 % forward, 67 % forward and backward; in pairs 61 % and 60 % (S2048: 69 % and 73 %). What is missing is
// packing, the start and end of tiles of depth 64 and, in pairs, the softmax, which does not get faster with the products.
#include "dots.h"

#include "tiles.h"

#include "tile_product.h"

#include "attention_tile_kernel.h"

#include "attention_pairs_kernel.h"

#include "attention_rounded_kernel.h"

#include "attention_rest_kernel.h"

#include "attention_mask_kernel.h"

#include "attention_few_kernel.h"

#include "attention_dbias_kernel.h"

#include "attention_kept_kernel.h"

#include "attention_softmax_kernel.h"

#include "attention_forward_kernel.h"

#include "attention_deltas_kernel.h"

#include "attention_weighed_kernel.h"

#include "attention_grad_block_kernel.h"

#include "attention_backward_kernel.h"
