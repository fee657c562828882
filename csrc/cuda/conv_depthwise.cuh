// Depthwise convolution, 1-d and 2-d, with everything that may follow it:
//
//     out[n, c, h, w] = activation(scale[c] * (bias[c] + sum over (i, j) weight[i, j, c] x[n, c, h s - p + i d, w s - p + j d])
//                                  + shift[c] + residual[n, c, h, w])
//
// Thread: kVector adjacent channels (channels_last; 16 bytes) or one (planes; neighbours of a warp are neighbours along w), and a run of
// outputs along h, so that a row of x is read once for all the rows of the kernel that see it. Columns that the kernel's width shares
// come from the first-level cache. A sequence is an image of height 1.
// The gradient of x is the same sum with the kernel turned about, over gradients that lie `spread` pixels apart, zeros between them.
// Saved for backward: z, the value before the activation, where its derivative needs that.
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
  T* pre;             // likewise; null: z is not wanted
  ImageStrides x_strides, residual_strides, out_strides, pre_strides;
  int channels, in_h, in_w, out_h, out_w;
  ConvWindow window;
  int spread_h, spread_w;  // how far the pixels of x lie apart, in steps of the kernel; 1 but for a gradient
  int per_image;           // threads of an image (channels_last) or of a plane, and the blocks they take
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
__device__ __forceinline__ Vector<T, kVector> depthwise_read(const T* channel, const ImageStrides& strides, int height, int width, int h,
                                                             int w) {
  if (h < 0 || h >= height || w < 0 || w >= width) return {};
  return load_vector<T, kVector>(channel + h * strides.h + w * strides.w);
}

// The pixel of x at a step of the kernel; -1 between two.
__device__ __forceinline__ int spread_pixel(int at, int spread) { return spread == 1 ? at : at % spread == 0 ? at / spread : -1; }

// kHeight > 0: the kernel's height, with stride, dilation and spread 1 along h.
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
  const auto read = [&](int row, int column) { return depthwise_read<T, kVector>(channel, p.x_strides, p.in_h, p.in_w, row, column); };
  for (int j = 0; j < p.window.kernel_w; ++j) {
    const int in_w = spread_pixel(w * p.window.stride_w - p.window.pad_w + j * p.window.dilation_w, p.spread_w);
    const auto weight = [&](int i) { return load_vector<T, kVector>(p.weight + int64_t{i * p.window.kernel_w + j} * p.channels + c); };
    if constexpr (kHeight > 0) {
      Vector<T, kVector> column[kHeight];
#pragma unroll
      for (int i = 0; i < kHeight; ++i) column[i] = weight(i);
#pragma unroll
      for (int row = 0; row < kRun + kHeight - 1; ++row) {
        const auto x = read(first_h - p.window.pad_h + row, in_w);
#pragma unroll
        for (int r = 0; r < kRun; ++r)
          if (row >= r && row - r < kHeight) sums.add(r, x, column[row - r]);
      }
    } else {
      for (int i = 0; i < p.window.kernel_h; ++i) {
        const int in_h = first_h * p.window.stride_h - p.window.pad_h + i * p.window.dilation_h;
        sums.add(0, read(spread_pixel(in_h, p.spread_h), in_w), weight(i));
      }
    }
  }

#pragma unroll
  for (int r = 0; r < kRun; ++r) {
    const int h = first_h + r;
    if (h >= p.out_h) break;
    Vector<T, kVector> residual{}, out, pre;
    if (p.residual) residual = load_vector<T, kVector>(p.residual + p.residual_strides.at(n, c, h, w));
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const float z = p.epilogue.linear(sums.sum[r][v], c + v, to_float(residual[v]));
      pre[v] = from_float<T>(z);
      out[v] = from_float<T>(p.epilogue.activated(z));
    }
    store_vector(p.out + p.out_strides.at(n, c, h, w), out);
    if (p.pre) store_vector(p.pre + p.pre_strides.at(n, c, h, w), pre);
  }
}

}  // namespace bmk
