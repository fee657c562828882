// Attention for one instruction set: out = softmax(softcap(scale q k^T) + bias) v, its log-sum-exp, and all gradients.
//
// Who owns what: a task is a block of rows (forward) or of keys (backward) of one batch entry and key/value head; see the
// two files. Saved for the backward: out and lse. Refused: nothing but other dtypes; any strides, sizes and head widths.
//
// Floor: 2 (D + Dv) operations per score forward and 2 (3 D + 2 Dv) backward at the machine's peak, halved where causal;
// on two Zen 5 cores 480 GFLOP/s, for B1 H8 S1024 D64 4.5 ms forward full, 2.2 ms causal, 11.2 and 5.6 ms backward.
// Predicted: of 64 + 13 cycles for 16 scores forward 64 are products, which with the part-filled tiles at the causal edge
// makes 80 % of the peak full and 72 % causal. Measured, useful operations over the peak: forward 63 to 71 % full and 57 to
// 65 % causal; forward and backward 66 to 74 % and 56 to 70 %. What is missing is packing, the start and end of tiles of
// depth 64, and second-level cache traffic of p. Against PyTorch's kernel: 2.0 to 2.9 times, bfloat16 1.7 to 3.
#include "tiles.h"

#include "attention_tile_kernel.h"

#include "attention_pairs_kernel.h"

#include "attention_mask_kernel.h"

#include "attention_forward_kernel.h"

#include "attention_backward_kernel.h"

#include "attention_dbias_kernel.h"
