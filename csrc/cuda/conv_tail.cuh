// The gradient of z, the value before activation and pool, for every convolution kernel.
//
//     d[n, c, h, w] = activation'(z) * (sum of the gradients of the pooled outputs that took (h, w))
//
// A pixel gathers from the pool's windows that hold it: nothing is added up in an order that depends on the scheduler. A max-pool's
// forward pass left one byte for each of its outputs: which element of the window it took.
#pragma once

#include "conv_epilogue.cuh"

namespace bmk {

template <class T>
struct ConvTail {
  const T* grad;         // [N, C, PH, PW]
  const T* out;          // likewise; read for activations whose derivative it tells
  const uint8_t* index;  // likewise; of a max-pool
  const T* pre;          // z: after a max-pool of the chosen elements, likewise, else [N, C, H, W]; read where `out` does not do
  ImageStrides grad_strides, out_strides, index_strides, pre_strides;
  Activation activation;
  float slope;
  PoolWindow pool;
  int batch, channels, full_h, full_w, out_h, out_w;  // full: before pooling

  __device__ __forceinline__ float derivative(float g, int n, int c, int h, int w) const {
    const bool from_z = activation == Activation::gelu || activation == Activation::silu;
    const bool from_out = !from_z && activation != Activation::none;
    const float z = from_z ? to_float(pre[pre_strides.at(n, c, h, w)]) : 0.0f;
    return activation_gradient(g, from_out ? to_float(out[out_strides.at(n, c, h, w)]) : 0.0f, z, activation, slope);
  }

  __device__ __forceinline__ float operator()(int n, int c, int h, int w) const {
    if (pool.kind == Pool::none) return derivative(to_float(grad[grad_strides.at(n, c, h, w)]), n, c, h, w);
    const int row = h + pool.pad_h, column = w + pool.pad_w;  // counted from the first window's corner
    const int first_h = row < pool.h ? 0 : (row - pool.h) / pool.stride_h + 1, end_h = min(row / pool.stride_h + 1, out_h);
    const int first_w = column < pool.w ? 0 : (column - pool.w) / pool.stride_w + 1, end_w = min(column / pool.stride_w + 1, out_w);
    float sum = 0;
    for (int i = first_h; i < end_h; ++i)
      for (int j = first_w; j < end_w; ++j) {
        if (pool.kind == Pool::max) {
          // A window whose ReLU is off has an index that is no element.
          const int element = (row - i * pool.stride_h) * pool.w + column - j * pool.stride_w;
          if (index[index_strides.at(n, c, i, j)] != element) continue;
        }
        const float g = to_float(grad[grad_strides.at(n, c, i, j)]);
        sum += pool.kind == Pool::max && activation != Activation::relu ? derivative(g, n, c, i, j) : g;
      }
    if (pool.kind == Pool::max) return sum;
    sum /= static_cast<float>(pool.h * pool.w);
    if (activation == Activation::none || first_h >= end_h || first_w >= end_w) return sum;
    const float z = to_float(pre[pre_strides.at(n, c, h, w)]);
    return activation_gradient(sum, activate(z, activation, slope), z, activation, slope);
  }
};

template <class T>
struct ConvSpread {
  ConvTail<T> tail;
  T* d;  // [N, C, H, W]
  ImageStrides d_strides;
  int64_t elements;
};

constexpr int kSpreadThreads = 256;

// d, written out: for the gradients of a residual and of the input. Neighbouring threads have neighbours in memory.
template <class T>
__global__ void __launch_bounds__(kSpreadThreads) conv_spread(const __grid_constant__ ConvSpread<T> p) {
  const ConvTail<T>& tail = p.tail;
  const bool channels_last = p.d_strides.c == 1;
  for (int64_t i = int64_t{blockIdx.x} * kSpreadThreads + threadIdx.x; i < p.elements; i += int64_t{gridDim.x} * kSpreadThreads) {
    int64_t rest = i;
    const auto take = [&rest](int size) {
      const int found = static_cast<int>(rest % size);
      rest /= size;
      return found;
    };
    int c = 0;
    if (channels_last) c = take(tail.channels);
    const int w = take(tail.full_w), h = take(tail.full_h);
    if (!channels_last) c = take(tail.channels);
    const int n = static_cast<int>(rest);
    p.d[p.d_strides.at(n, c, h, w)] = from_float<T>(tail(n, c, h, w));
  }
}

}  // namespace bmk
