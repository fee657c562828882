// The arguments of linear_kernel.h as plain data.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "activation.h"

namespace bmk {

struct LinearCall {
  int64_t rows, in, out;
  Activation activation;
  double slope;  // of the leaky ReLU
  const void* x;
  int64_t x_row, x_step;
  const void* weight;
  int64_t weight_row, weight_step;
  const void* bias;  // null: none
  const void* residual;
  int64_t residual_row;
  void* y;
  void* known;  // what the derivative of the activation is known from; null in a forward that does not keep it
};

void run_linear(const LinearCall& call, torch::headeronly::ScalarType dtype);

}  // namespace bmk
