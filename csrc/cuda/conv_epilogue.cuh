// What follows a convolution's sums, in float32, for every convolution kernel: bias, a folded normalisation, activation, and the
// derivative of the last.
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

// g times the derivative, known from the activation's value `out` or from z, the value before it.
__device__ __forceinline__ float activation_gradient(float g, float out, float z, Activation activation, float slope) {
  switch (activation) {
    case Activation::relu: return out <= 0 ? 0.0f : g;
    case Activation::gelu: return g * (0.5f * (1.0f + erff(z * 0.70710678f)) + z * expf(-0.5f * z * z) * 0.39894228f);
    case Activation::silu: {
      const float s = 1.0f / (1.0f + expf(-z));
      return g * s * (1.0f + z * (1.0f - s));
    }
    case Activation::tanh: return g * (1.0f - out * out);
    case Activation::sigmoid: return g * out * (1.0f - out);
    case Activation::leaky_relu: return out > 0 ? g : g * slope;
    default: return g;
  }
}

template <class T>
struct ConvEpilogue {
  const T* bias;   // [C]; null: none, as the next two
  const T* scale;  // [C]
  const T* shift;  // [C]
  Activation activation;
  float slope;  // of the leaky ReLU

  // z, the value before the activation.
  __device__ __forceinline__ float linear(float sum, int channel, float residual = 0.0f) const {
    if (bias) sum += to_float(bias[channel]);
    if (scale) sum *= to_float(scale[channel]);
    if (shift) sum += to_float(shift[channel]);
    return sum + residual;
  }
  __device__ __forceinline__ float activated(float z) const { return activate(z, activation, slope); }
};

struct ImageStrides {
  int64_t n, c, h, w;  // in elements

  __device__ __forceinline__ int64_t at(int image, int channel, int row, int column) const {
    return image * n + channel * c + row * h + column * w;
  }
};

// Where a kernel's element (i, j) meets the input of output (h, w): at h stride - pad + i dilation, likewise along w.
struct ConvWindow {
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

enum class Pool { none, max, avg };
struct PoolWindow {
  Pool kind;
  int h, w, stride_h, stride_w, pad_h, pad_w;  // without a pool 1, 1, 1, 1, 0, 0
};

}  // namespace bmk
