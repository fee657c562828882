// Depthwise convolution, 1-d and 2-d, with everything that may follow it, forward only:
//
//     out[n, c, h, w] = activation(scale[c] * (bias[c] + sum over (i, j) weight[i, j, c] x[n, c, h s - p + i d, w s - p + j d])
//                                  + shift[c] + residual[n, c, h, w])
//
// Thread: kVector adjacent channels (channels_last; 16 bytes) or one (planes; neighbours of a warp are neighbours along w), and a run of
// outputs along h, so that a row of x is read once for all the rows of the kernel that see it. Columns that the kernel's width shares
// come from the first-level cache. A sequence is an image of height 1.
// Saved for backward: nothing.
// Refuses: several channels to a group; the rest is the launcher's choice of a variant.
// Floor: memory: x, residual and out once.
#pragma once

#include "conv_epilogue.cuh"

namespace bmk {

template <class T>
struct DepthwiseForward {
  const T* x;       // [N, C, H, W]
  const T* weight;  // [KH, KW, C]
  ConvEpilogue<T> epilogue;
  const T* residual;  // [N, C, OH, OW]; null: none
  T* out;             // [N, C, OH, OW]
  ImageStrides x_strides, residual_strides, out_strides;
  int channels, in_h, in_w, out_h, out_w;
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int per_image;  // threads of an image (channels_last) or of a plane, and the blocks they take
  int blocks_per_image;
};

constexpr int kDepthwiseThreads = 128;

// How many outputs along h a thread makes: a kernel of height 0 is one whose height, stride and dilation are known only at run time.
constexpr int depthwise_run(int height) { return height > 0 ? 4 : 1; }

// The sums of a run of outputs, of kVector channels each.
template <class T, int kVector, int kRun>
struct DepthwiseSums {
  float sum[kRun][kVector] = {};

  __device__ __forceinline__ void add(int r, const Vector<T, kVector>& x, const Vector<T, kVector>& weight) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) sum[r][v] += to_float(x[v]) * to_float(weight[v]);
  }
};

// Zeros outside the image.
template <class T, int kVector>
__device__ __forceinline__ Vector<T, kVector> depthwise_read(const DepthwiseForward<T>& p, const T* channel, int h, int w) {
  if (h < 0 || h >= p.in_h || w < 0 || w >= p.in_w) return {};
  return load_vector<T, kVector>(channel + h * p.x_strides.h + w * p.x_strides.w);
}

// kHeight > 0: the kernel's height, with stride and dilation 1 along h.
template <class T, int kVector, bool kChannelsLast, int kHeight>
__global__ void __launch_bounds__(kDepthwiseThreads, kHeight > 3 ? 3 : 4) depthwise_forward(const __grid_constant__ DepthwiseForward<T> p) {
  constexpr int kRun = depthwise_run(kHeight);
  const int image = blockIdx.x / p.blocks_per_image;
  int at = blockIdx.x % p.blocks_per_image * kDepthwiseThreads + threadIdx.x;
  if (at >= p.per_image) return;
  int n, c;
  if constexpr (kChannelsLast) {
    const int vectors = p.channels / kVector;
    n = image;
    c = at % vectors * kVector;
    at /= vectors;
  } else {
    n = image / p.channels;
    c = image % p.channels;
  }
  const int w = at % p.out_w, first_h = at / p.out_w * kRun;
  const T* const channel = p.x + n * p.x_strides.n + c * p.x_strides.c;

  DepthwiseSums<T, kVector, kRun> sums;
  for (int j = 0; j < p.kernel_w; ++j) {
    const int in_w = w * p.stride_w - p.pad_w + j * p.dilation_w;
    const auto weight = [&](int i) { return load_vector<T, kVector>(p.weight + int64_t{i * p.kernel_w + j} * p.channels + c); };
    if constexpr (kHeight > 0) {
      Vector<T, kVector> column[kHeight];
#pragma unroll
      for (int i = 0; i < kHeight; ++i) column[i] = weight(i);
#pragma unroll
      for (int row = 0; row < kRun + kHeight - 1; ++row) {
        const auto x = depthwise_read<T, kVector>(p, channel, first_h - p.pad_h + row, in_w);
#pragma unroll
        for (int r = 0; r < kRun; ++r)
          if (row >= r && row - r < kHeight) sums.add(r, x, column[row - r]);
      }
    } else {
      for (int i = 0; i < p.kernel_h; ++i) {
        const int in_h = first_h * p.stride_h - p.pad_h + i * p.dilation_h;
        sums.add(0, depthwise_read<T, kVector>(p, channel, in_h, in_w), weight(i));
      }
    }
  }

#pragma unroll
  for (int r = 0; r < kRun; ++r) {
    const int h = first_h + r;
    if (h >= p.out_h) break;
    Vector<T, kVector> residual{}, out;
    if (p.residual)
      residual = load_vector<T, kVector>(p.residual + n * p.residual_strides.n + c * p.residual_strides.c + h * p.residual_strides.h +
                                         w * p.residual_strides.w);
#pragma unroll
    for (int v = 0; v < kVector; ++v) out[v] = from_float<T>(p.epilogue(sums.sum[r][v], c + v, to_float(residual[v])));
    store_vector(p.out + n * p.out_strides.n + c * p.out_strides.c + h * p.out_strides.h + w * p.out_strides.w, out);
  }
}

}  // namespace bmk
