// The arithmetic of one LSTM unit, in float32, which every LSTM kernel shares.
//
//     i, f, o = sigmoid(pre),  g = tanh(pre)        c = f c' + i g        h = o tanh(c)
//     dc = dc_after + dh o (1 - tanh(c)^2);  di = dc g i (1 - i), df = dc c' f (1 - f), dg = dc i (1 - g^2),
//     do = dh tanh(c) o (1 - o);  dc' = dc f
#pragma once

#include "common.cuh"

namespace bmk {

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

struct LstmGates {
  float i, f, g, o;
};

// From the four sums before activation to the gates; c becomes the state after the step, h is returned.
__device__ __forceinline__ float lstm_unit(LstmGates& gates, float& c) {
  gates = {sigmoid(gates.i), sigmoid(gates.f), tanhf(gates.g), sigmoid(gates.o)};
  c = gates.f * c + gates.i * gates.g;
  return gates.o * tanhf(c);
}

// The gradients of the four sums; d_c, the gradient of c from what follows, becomes that of the state before the step.
__device__ __forceinline__ LstmGates lstm_unit_gradient(const LstmGates& gates, float c, float c_before, float d_h, float& d_c) {
  const float tanh_c = tanhf(c);
  const float d = d_c + d_h * gates.o * (1.0f - tanh_c * tanh_c);
  d_c = d * gates.f;
  return {d * gates.g * gates.i * (1.0f - gates.i), d * c_before * gates.f * (1.0f - gates.f), d * gates.i * (1.0f - gates.g * gates.g),
          d_h * tanh_c * gates.o * (1.0f - gates.o)};
}

}  // namespace bmk
