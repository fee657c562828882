// Convolution of an image with few input channels, with what follows it, forward: the first layers of a network.
//
//     out = pool(activation(scale (sum over (c, i, j) weight[o, c, i, j] x[n, c, h s - p + i d, w s - p + j d] + bias) + shift))
//
// Block: a tile of the pooled output of one image, kChannels output channels. It keeps the part of x that its tile needs and its
// weights in shared memory; the window's elements (c, i, j) are the depth of a product, 16 to an instruction. Warp: every kWarps-th row
// of 16 convolution outputs, times all channels of the block. The outputs before pooling stay in shared memory.
// Saved for backward: nothing.
// Refuses: groups, residuals, gates; dtypes other than float16 and bfloat16; windows and tiles that shared memory cannot hold.
// Floor: memory: x and out once, as long as there are few channels: 2 K FMA for each output, K elements to a window.
#pragma once

#include "conv_epilogue.cuh"

namespace bmk {

enum class Pool { max, avg };

template <class T>
struct StemForward {
  const T* x;       // [N, C, H, W]
  const T* weight;  // [O, C, KH, KW]
  T* out;           // [N, O, PH, PW]
  ConvEpilogue<T> epilogue;
  ImageStrides x_strides, out_strides;
  int in_channels, in_h, in_w, out_channels, full_h, full_w, out_h, out_w;  // full: before pooling
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  Pool pool;
  int pool_h, pool_w, pool_stride_h, pool_stride_w, pool_pad_h, pool_pad_w;  // 1, 1, 1, 1, 0, 0: no pooling
  int tile_h, tile_w;                                                        // of the pooled output
};

constexpr int kStemWarps = 8, kStemThreads = kStemWarps * kWarpSize;
constexpr int kStemPad = 8;  // elements between rows of shared memory, so that lanes find theirs in different banks

// Extents of a block's work, all in elements.
struct StemTile {
  int full_h, full_w;  // convolution outputs
  int in_h, in_w;      // input
  int depth, padded_depth;

  template <class T>
  __host__ __device__ explicit StemTile(const StemForward<T>& p)
      : full_h((p.tile_h - 1) * p.pool_stride_h + p.pool_h),
        full_w((p.tile_w - 1) * p.pool_stride_w + p.pool_w),
        in_h((full_h - 1) * p.stride_h + (p.kernel_h - 1) * p.dilation_h + 1),
        in_w((full_w - 1) * p.stride_w + (p.kernel_w - 1) * p.dilation_w + 1),
        depth(p.in_channels * p.kernel_h * p.kernel_w),
        padded_depth(round_up(depth, 16)) {}

  // In the order of shared memory: offsets of the window's elements, weights, outputs before pooling, input.
  __host__ __device__ int offsets_bytes() const { return padded_depth * 4; }
  __host__ __device__ int weight_elements(int channels) const { return channels * (padded_depth + kStemPad); }
  __host__ __device__ int full_elements(int channels) const { return full_h * full_w * (channels + kStemPad); }
  __host__ __device__ int shared_bytes(int in_channels, int channels) const {
    return offsets_bytes() + 2 * (weight_elements(channels) + full_elements(channels) + in_channels * in_h * in_w);
  }
};

// The input that a tile needs; zeros outside the image.
template <class T>
__device__ __forceinline__ void stem_load_input(const StemForward<T>& p, const StemTile& tile, int n, int first_h, int first_w, T* to) {
  const int plane = tile.in_h * tile.in_w;
  for (int i = threadIdx.x; i < p.in_channels * plane; i += kStemThreads) {
    const int c = i / plane, h = first_h + i % plane / tile.in_w, w = first_w + i % tile.in_w;
    const bool inside = h >= 0 && h < p.in_h && w >= 0 && w < p.in_w;
    to[i] = inside ? p.x[n * p.x_strides.n + c * p.x_strides.c + h * p.x_strides.h + w * p.x_strides.w] : from_float<T>(0.0f);
  }
}

// The block's weights by output channel, zeros past the last channel and the window; and where the window's elements lie in the input.
template <class T, int kChannels>
__device__ __forceinline__ void stem_load_weights(const StemForward<T>& p, const StemTile& tile, int first_channel, T* weights,
                                                  int* offsets) {
  for (int i = threadIdx.x; i < kChannels * tile.padded_depth; i += kStemThreads) {
    const int o = i / tile.padded_depth, k = i % tile.padded_depth;
    const bool inside = first_channel + o < p.out_channels && k < tile.depth;
    weights[o * (tile.padded_depth + kStemPad) + k] = inside ? p.weight[int64_t{first_channel + o} * tile.depth + k] : from_float<T>(0.0f);
  }
  const int window = p.kernel_h * p.kernel_w;
  for (int k = threadIdx.x; k < tile.padded_depth; k += kStemThreads) {
    const int c = k / window, i = k % window / p.kernel_w, j = k % p.kernel_w;
    offsets[k] = k < tile.depth ? (c * tile.in_h + i * p.dilation_h) * tile.in_w + j * p.dilation_w : -1;
  }
}

// Two neighbours along the depth, of the window that begins at `window`; zero past its end, whatever the input holds.
template <class T>
__device__ __forceinline__ unsigned stem_pair(const T* window, const int* offsets) {
  const auto element = [&](int i) {
    return offsets[i] < 0 ? 0u : static_cast<unsigned>(__builtin_bit_cast(unsigned short, window[offsets[i]]));
  };
  return element(0) | element(1) << 16;
}

template <class T, int kChannels>
__device__ __forceinline__ void stem_multiply(const StemForward<T>& p, const StemTile& tile, int first_channel, const T* input,
                                              const T* weights, const int* offsets, T* full) {
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  const int outputs = tile.full_h * tile.full_w;
  for (int first = threadIdx.x / kWarpSize * 16; first < outputs; first += kStemWarps * 16) {
    const T* windows[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int output = min(first + g + 8 * half, outputs - 1);  // past the last one: the last one again, and dropped
      windows[half] = input + output / tile.full_w * p.stride_h * tile.in_w + output % tile.full_w * p.stride_w;
    }
    float sums[kChannels / 8][4] = {};
    for (int k = 2 * t; k < tile.padded_depth; k += 16) {
      const unsigned a[4] = {stem_pair(windows[0], offsets + k), stem_pair(windows[1], offsets + k), stem_pair(windows[0], offsets + k + 8),
                             stem_pair(windows[1], offsets + k + 8)};
#pragma unroll
      for (int c = 0; c < kChannels / 8; ++c) {
        const T* b = weights + (c * 8 + g) * (tile.padded_depth + kStemPad) + k;
        mma_m16n8k16<T>(sums[c], a, *reinterpret_cast<const unsigned*>(b), *reinterpret_cast<const unsigned*>(b + 8));
      }
    }
#pragma unroll
    for (int c = 0; c < kChannels / 8; ++c)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int output = first + g + 8 * half, column = c * 8 + 2 * t;
        if (output >= outputs || first_channel + column >= p.out_channels) continue;
        const int second = min(first_channel + column + 1, p.out_channels - 1);  // of an odd number of channels there is no second
        *reinterpret_cast<unsigned*>(full + output * (kChannels + kStemPad) + column) =
            pack2<T>(p.epilogue(sums[c][2 * half], first_channel + column), p.epilogue(sums[c][2 * half + 1], second));
      }
  }
}

// One output: the window of the pool at (row, column) of the tile, as far as it lies inside the convolution's output.
template <class T>
__device__ __forceinline__ float stem_pool(const StemForward<T>& p, const StemTile& tile, const T* channel, int stride, int first_h,
                                           int first_w, int row, int column) {
  float most = -INFINITY, sum = 0;
  for (int i = 0; i < p.pool_h; ++i)
    for (int j = 0; j < p.pool_w; ++j) {
      const int h = row * p.pool_stride_h + i, w = column * p.pool_stride_w + j;
      if (first_h + h < 0 || first_h + h >= p.full_h || first_w + w < 0 || first_w + w >= p.full_w) continue;
      const float value = to_float(channel[(h * tile.full_w + w) * stride]);
      most = value > most || value != value ? value : most;  // NaN wins
      sum += value;
    }
  return p.pool == Pool::max ? most : sum / static_cast<float>(p.pool_h * p.pool_w);
}

template <class T, int kChannels>
__global__ void __launch_bounds__(kStemThreads) conv_stem(const __grid_constant__ StemForward<T> p) {
  const StemTile tile(p);
  const int tiles_w = ceil_div(p.out_w, p.tile_w), n = blockIdx.z, first_channel = blockIdx.y * kChannels;
  const int out_h = blockIdx.x / tiles_w * p.tile_h, out_w = blockIdx.x % tiles_w * p.tile_w;
  const int full_h = out_h * p.pool_stride_h - p.pool_pad_h, full_w = out_w * p.pool_stride_w - p.pool_pad_w;

  int* const offsets = reinterpret_cast<int*>(dynamic_shared());
  T* const weights = reinterpret_cast<T*>(dynamic_shared() + tile.offsets_bytes());
  T* const full = weights + tile.weight_elements(kChannels);
  T* const input = full + tile.full_elements(kChannels);
  stem_load_input(p, tile, n, full_h * p.stride_h - p.pad_h, full_w * p.stride_w - p.pad_w, input);
  stem_load_weights<T, kChannels>(p, tile, first_channel, weights, offsets);
  __syncthreads();  // input and weights have come
  stem_multiply<T, kChannels>(p, tile, first_channel, input, weights, offsets, full);
  __syncthreads();  // all outputs before pooling are there

  const int channels = min(kChannels, p.out_channels - first_channel), outputs = p.tile_h * p.tile_w;
  const bool channels_last = p.out_strides.c == 1;  // neighbouring threads write neighbours
  for (int i = threadIdx.x; i < channels * outputs; i += kStemThreads) {
    const int o = channels_last ? i % channels : i / outputs, at = channels_last ? i / channels : i % outputs;
    const int row = at / p.tile_w, column = at % p.tile_w, h = out_h + row, w = out_w + column;
    if (h >= p.out_h || w >= p.out_w) continue;
    p.out[n * p.out_strides.n + (first_channel + o) * p.out_strides.c + h * p.out_strides.h + w * p.out_strides.w] =
        from_float<T>(stem_pool(p, tile, full + o, kChannels + kStemPad, full_h, full_w, row, column));
  }
}

}  // namespace bmk
