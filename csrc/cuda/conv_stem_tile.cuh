// What the forward and the backward kernels of few-channel convolutions share: a tile of the input in shared memory, and where the
// elements of a window lie in it.
#pragma once

#include "conv_epilogue.cuh"

namespace bmk {

constexpr int kStemWarps = 8, kStemThreads = kStemWarps * kWarpSize;
constexpr int kStemPad = 8;  // elements between rows of shared memory, so that lanes find theirs in different banks

template <class T>
struct StemInput {
  const T* x;  // [N, C, H, W]
  ImageStrides strides;
  int channels, h, w;
};

// The input of full_h x full_w convolution outputs.
struct StemExtent {
  int in_h, in_w, elements;
  int depth;  // elements of a window

  __host__ __device__ StemExtent(int channels, const ConvWindow& window, int full_h, int full_w)
      : in_h((full_h - 1) * window.stride_h + (window.kernel_h - 1) * window.dilation_h + 1),
        in_w((full_w - 1) * window.stride_w + (window.kernel_w - 1) * window.dilation_w + 1),
        elements(channels * in_h * in_w),
        depth(channels * window.kernel_h * window.kernel_w) {}

  // Where the k-th element of a window lies, counted from the window's first.
  __device__ __forceinline__ int offset(const ConvWindow& window, int k) const {
    const int taps = window.kernel_h * window.kernel_w, c = k / taps, i = k % taps / window.kernel_w, j = k % window.kernel_w;
    return (c * in_h + i * window.dilation_h) * in_w + j * window.dilation_w;
  }
};

// Zeros outside the image.
template <class T>
__device__ __forceinline__ void stem_load_input(const StemInput<T>& p, const StemExtent& tile, int n, int first_h, int first_w, T* to) {
  const int plane = tile.in_h * tile.in_w;
  for (int i = threadIdx.x; i < tile.elements; i += kStemThreads) {
    const int c = i / plane, h = first_h + i % plane / tile.in_w, w = first_w + i % tile.in_w;
    const bool inside = h >= 0 && h < p.h && w >= 0 && w < p.w;
    to[i] = inside ? p.x[p.strides.at(n, c, h, w)] : from_float<T>(0.0f);
  }
}

}  // namespace bmk
