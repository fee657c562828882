// What the kernels of conv_step are called with. Plain data, the same for every instruction set.
#pragma once

#include <cstdint>

#include "conv_geometry.h"

namespace bmk {

// One time step of N sequences. Everything but x is contiguous; what is left out is null.
template <class S>
struct ConvStep {
  int64_t batch, channels, rows;  // rows of the weight, before a gate halves them
  int64_t kernel, dilation, groups;
  int64_t out, skips;  // C, or 0 without out_weight; S, or 0
  Activation activation;
  double slope;
  const S* x;  // [N, C], with the strides of its rows and columns
  int64_t x_row, x_column;
  S* ring;              // [N, L, C], L = dilation * (K - 1): the inputs so far, that of step t at t mod L
  int64_t position;     // t
  const S* weight;      // [rows, C / groups, K]
  const S* bias;        // [rows]
  const S* out_weight;  // [C, D], D being the channels after the activation
  const S* out_bias;
  const S* skip_weight;  // [S, D]
  const S* skip_bias;
  const S* skip_sum;  // [N, S]
  S* y;               // [N, C] with out_weight, else [N, D]
  S* skip;            // [N, S]

  int64_t values() const { return activation == Activation::tanh_sigmoid ? rows / 2 : rows; }  // D
  int64_t delay() const { return dilation * (kernel - 1); }                                    // L
};

}  // namespace bmk
