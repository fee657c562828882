// The arguments of norm_kernel.h as plain data. Rows of x, residual, dy and dh may lie apart; their columns are adjacent.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace bmk {

struct NormCall {
  int64_t rows, columns;
  double eps;
  bool center;  // layer normalisation; else RMS
  const void* x;
  int64_t x_row;
  const void* residual;  // null: none
  int64_t residual_row;
  const void* weight;  // null: 1
  const void* bias;    // null: 0
  void* y;
  void* h;  // null without a residual
  void* mean;
  void* rstd;
};

void run_norm(const NormCall& call, torch::headeronly::ScalarType dtype);

struct NormGradientCall {
  int64_t rows, columns;
  bool center;
  const void* dy;
  int64_t dy_row;
  const void* dh;  // null: nothing comes to h itself
  int64_t dh_row;
  const void* h;
  int64_t h_row;
  const void* mean;
  const void* rstd;
  const void* weight;  // null: 1
  void* d_h;
  void* d_weight;  // null: not wanted
  void* d_bias;    // null: not wanted
};

}  // namespace bmk
