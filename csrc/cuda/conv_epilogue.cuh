// What follows a convolution's sums, in float32, for every convolution kernel: bias, a folded normalisation, activation.
#pragma once

#include "common.cuh"

namespace bmk {

enum class Activation { none, relu, gelu, silu, tanh, sigmoid, leaky_relu };

__device__ __forceinline__ float activate(float z, Activation activation, float slope) {
  switch (activation) {
    case Activation::relu: return z < 0 ? 0.0f : z;  // NaN stays NaN
    case Activation::gelu: return 0.5f * z * (1.0f + erff(z * 0.70710678f));
    case Activation::silu: return z / (1.0f + expf(-z));
    case Activation::tanh: return tanhf(z);
    case Activation::sigmoid: return 1.0f / (1.0f + expf(-z));
    case Activation::leaky_relu: return z < 0 ? z * slope : z;
    default: return z;
  }
}

template <class T>
struct ConvEpilogue {
  const T* bias;   // [C]; null: none, as the next two
  const T* scale;  // [C]
  const T* shift;  // [C]
  Activation activation;
  float slope;  // of the leaky ReLU

  __device__ __forceinline__ float operator()(float sum, int channel, float residual = 0.0f) const {
    if (bias) sum += to_float(bias[channel]);
    if (scale) sum *= to_float(scale[channel]);
    if (shift) sum += to_float(shift[channel]);
    return activate(sum + residual, activation, slope);
  }
};

struct ImageStrides {
  int64_t n, c, h, w;  // in elements
};

}  // namespace bmk
