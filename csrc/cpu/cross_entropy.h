// The arguments of cross_entropy_kernel.h as plain data. Rows of the logits may lie apart; their columns are adjacent.
#pragma once

#include <cstdint>

namespace bmk {

struct CrossEntropyCall {
  int64_t rows, columns;
  const void* logits;
  int64_t logits_row;
  const int64_t* target;
  int64_t ignore_index;
  double smoothing;
  void* largest;  // m of every row
  void* log_sum;  // l of every row
};

// What one row's part of the gradient is multiplied by: the gradient of the loss over `share`, of the row or of them all.
struct CrossEntropyGradientCall {
  CrossEntropyCall of;
  const void* d_loss;
  bool d_loss_by_row;
  double share;
  void* d_logits;
};

}  // namespace bmk
