// Convolution of an image with few input channels, backward, with what followed it (d: conv_tail.cuh).
//
//     dweight[o, k] = sum over (n, h, w) d[n, o, h, w] window[n, h, w, k],  dshift[o] = sum over (n, h, w) d[n, o, h, w]
//     dx[n, c, y, x] = sum over (o, i, j) weight[o, c, i, j] d[n, o, h, w],  h s - p + i d = y, likewise w
//
// conv_stem_weights. Block: a run of tiles of convolution outputs, kChannels output channels, kStemColumns elements of the window. For
// each tile it keeps the part of x and d in shared memory; d is made there and never written out. Pixels are the depth of the product,
// output channels its rows and elements of the window its columns; a column of ones after the last element sums up d. Warp: all
// channels, every kWarps-th column of 8. Sums stay in float registers over the whole run; what the blocks found is added up in
// their order afterwards, so that the result does not depend on which came first.
// conv_stem_input. Thread: one pixel of x, up to four channels; d and the weights are read by vectors of output channels.
// Refuses what the forward kernel refuses.
// Floor: memory: x, the gradient, and the pool's index once; for the gradient of x, d and dx once.
#pragma once

#include "conv_stem_tile.cuh"
#include "conv_tail.cuh"

namespace bmk {

constexpr int kStemColumnTiles = 3;  // of 8 columns, of a warp
constexpr int kStemColumns = kStemWarps * kStemColumnTiles * 8;

template <class T>
struct StemWeights {
  StemInput<T> input;
  ConvWindow window;
  ConvTail<T> tail;
  float* partial;      // [splits, O, depth + 1]; the last column sums up d
  int tile_h, tile_w;  // of the convolution's output
};

struct StemWeightsTile : StemExtent {
  int pixels;

  template <class T>
  __host__ __device__ explicit StemWeightsTile(const StemWeights<T>& p)
      : StemExtent(p.input.channels, p.window, p.tile_h, p.tile_w), pixels(round_up(p.tile_h * p.tile_w, 16)) {}

  // In the order of shared memory: offsets of the window's elements, windows of the pixels, d, input.
  __host__ __device__ int tables_bytes() const { return (kStemColumns + pixels) * 4; }
  __host__ __device__ int gradient_elements(int channels) const { return channels * (pixels + kStemPad); }
  __host__ __device__ int shared_bytes(int channels, int element_size) const {
    return tables_bytes() + element_size * (gradient_elements(channels) + elements);
  }
};

constexpr int kZeroColumn = -1, kOnesColumn = -2;  // in the place of an offset

// The element of a window; negative: a pixel outside the image, or a column that is none of the input's.
template <class T>
__device__ __forceinline__ T stem_element(const T* input, int window, int offset) {
  if ((window | offset) >= 0) return input[window + offset];
  return from_float<T>(offset == kOnesColumn ? 1.0f : 0.0f);
}

template <class T>
__device__ __forceinline__ unsigned stem_pixels(const T* input, int first, int second, int offset) {
  return __builtin_bit_cast(unsigned short, stem_element(input, first, offset)) |
         static_cast<unsigned>(__builtin_bit_cast(unsigned short, stem_element(input, second, offset))) << 16;
}

// sums[m][i] += d of 16 channels times the columns of the warp's i-th tile, over the pixels of the block's tile.
template <class T, int kChannels>
__device__ __forceinline__ void stem_multiply_pixels(float (&sums)[kChannels / 16][kStemColumnTiles][4], int pixels, const T* d,
                                                     const T* input, const int* windows, const int* offsets) {
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4, warp = threadIdx.x / kWarpSize, stride = pixels + kStemPad;
  if constexpr (sizeof(T) == 4) {
    for (int first = 0; first < pixels; first += 4) {
      const auto window = load_vector<int, 4>(windows + first);
      float x[kStemColumnTiles][2][4];
#pragma unroll
      for (int i = 0; i < kStemColumnTiles; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int k = 0; k < 4; ++k) x[i][j][k] = stem_element(input, window[k], offsets[(i * kStemWarps + warp) * 8 + 2 * t + j]);
#pragma unroll
      for (int m = 0; m < kChannels / 16; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const auto a = load_vector<float, 4>(d + (m * 16 + r * 8 + g) * stride + first);
#pragma unroll
          for (int i = 0; i < kStemColumnTiles; ++i)
#pragma unroll
            for (int k = 0; k < 4; ++k)
#pragma unroll
              for (int j = 0; j < 2; ++j) sums[m][i][r * 2 + j] += a[k] * x[i][j][k];
        }
    }
  } else {
    for (int first = 2 * t; first < pixels; first += 16) {
      const auto low = load_vector<int, 2>(windows + first), high = load_vector<int, 2>(windows + first + 8);
      unsigned a[kChannels / 16][4];
#pragma unroll
      for (int m = 0; m < kChannels / 16; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m][i] = *reinterpret_cast<const unsigned*>(d + (m * 16 + i % 2 * 8 + g) * stride + first + i / 2 * 8);
#pragma unroll
      for (int i = 0; i < kStemColumnTiles; ++i) {
        const int offset = offsets[(i * kStemWarps + warp) * 8 + g];
        const unsigned b0 = stem_pixels(input, low[0], low[1], offset), b1 = stem_pixels(input, high[0], high[1], offset);
#pragma unroll
        for (int m = 0; m < kChannels / 16; ++m) mma_m16n8k16<T>(sums[m][i], a[m], b0, b1);
      }
    }
  }
}

template <class T, int kChannels>
__global__ void __launch_bounds__(kStemThreads, 2) conv_stem_weights(const __grid_constant__ StemWeights<T> p) {
  const StemWeightsTile tile(p);
  const ConvTail<T>& tail = p.tail;
  const int parts = ceil_div(tail.channels, kChannels);
  const int first_channel = blockIdx.y % parts * kChannels, first_column = blockIdx.y / parts * kStemColumns;
  int* const offsets = reinterpret_cast<int*>(dynamic_shared());
  int* const windows = offsets + kStemColumns;
  T* const d = reinterpret_cast<T*>(dynamic_shared() + tile.tables_bytes());
  T* const input = d + tile.gradient_elements(kChannels);
  for (int i = threadIdx.x; i < kStemColumns; i += kStemThreads) {
    const int k = first_column + i;
    offsets[i] = k < tile.depth ? tile.offset(p.window, k) : k == tile.depth ? kOnesColumn : kZeroColumn;
  }

  float sums[kChannels / 16][kStemColumnTiles][4] = {};
  const int tiles_h = ceil_div(tail.full_h, p.tile_h), tiles_w = ceil_div(tail.full_w, p.tile_w);
  const int64_t tiles = int64_t{tail.batch} * tiles_h * tiles_w, share = ceil_div<int64_t>(tiles, gridDim.x);
  const int64_t end = min(tiles, (blockIdx.x + 1) * share);
  for (int64_t at = blockIdx.x * share; at < end; ++at) {
    const int n = static_cast<int>(at / (tiles_h * tiles_w)), in_image = static_cast<int>(at % (tiles_h * tiles_w));
    const int first_h = in_image / tiles_w * p.tile_h, first_w = in_image % tiles_w * p.tile_w;
    __syncthreads();  // before the tile is overwritten
    stem_load_input(p.input, tile, n, first_h * p.window.stride_h - p.window.pad_h, first_w * p.window.stride_w - p.window.pad_w, input);
    const auto inside = [&](int pixel) {
      return pixel < p.tile_h * p.tile_w && first_h + pixel / p.tile_w < tail.full_h && first_w + pixel % p.tile_w < tail.full_w;
    };
    for (int i = threadIdx.x; i < tile.pixels; i += kStemThreads)
      windows[i] = inside(i) ? i / p.tile_w * p.window.stride_h * tile.in_w + i % p.tile_w * p.window.stride_w : -1;
    const bool channels_last = tail.grad_strides.c == 1;  // neighbouring threads read neighbours
    for (int i = threadIdx.x; i < kChannels * tile.pixels; i += kStemThreads) {
      const int o = channels_last ? i % kChannels : i / tile.pixels, pixel = channels_last ? i / kChannels : i % tile.pixels;
      float found = 0;
      if (inside(pixel) && first_channel + o < tail.channels)
        found = tail(n, first_channel + o, first_h + pixel / p.tile_w, first_w + pixel % p.tile_w);
      d[o * (tile.pixels + kStemPad) + pixel] = from_float<T>(found);
    }
    __syncthreads();  // input and gradients have come
    stem_multiply_pixels<T, kChannels>(sums, tile.pixels, d, input, windows, offsets);
  }

  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4, warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int m = 0; m < kChannels / 16; ++m)
#pragma unroll
    for (int i = 0; i < kStemColumnTiles; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int o = first_channel + m * 16 + j / 2 * 8 + g, k = first_column + (i * kStemWarps + warp) * 8 + 2 * t + j % 2;
        if (o < tail.channels && k <= tile.depth)
          p.partial[(int64_t{blockIdx.x} * tail.channels + o) * (tile.depth + 1) + k] = sums[m][i][j];
      }
}

template <class T>
struct StemInputGradient {
  const T* d;       // [N, H, W, O], of the convolution's output
  const T* weight;  // [KH, KW, C, O]
  T* dx;            // [N, C, in_h, in_w]
  ImageStrides dx_strides;
  ConvWindow window;
  int64_t pixels;  // of x, in all
  int channels, in_h, in_w, out_channels, full_h, full_w;
};

constexpr int kStemInputChannels = 4;  // of a thread

// The output that meets position `at` of the padded input through a tap: negative if none does.
__device__ __forceinline__ int meeting_output(int at, int stride, int outputs) {
  return at < 0 || at % stride != 0 || at / stride >= outputs ? -1 : at / stride;
}

template <class T, int kVector>
__global__ void __launch_bounds__(kStemThreads) conv_stem_input(const __grid_constant__ StemInputGradient<T> p) {
  const int64_t pixel = int64_t{blockIdx.x} * kStemThreads + threadIdx.x;
  if (pixel >= p.pixels) return;
  const int x = static_cast<int>(pixel % p.in_w), y = static_cast<int>(pixel / p.in_w % p.in_h);
  const int n = static_cast<int>(pixel / p.in_w / p.in_h), first_channel = blockIdx.y * kStemInputChannels;
  float sums[kStemInputChannels] = {};
  for (int i = 0; i < p.window.kernel_h; ++i) {
    const int h = meeting_output(y + p.window.pad_h - i * p.window.dilation_h, p.window.stride_h, p.full_h);
    if (h < 0) continue;
    for (int j = 0; j < p.window.kernel_w; ++j) {
      const int w = meeting_output(x + p.window.pad_w - j * p.window.dilation_w, p.window.stride_w, p.full_w);
      if (w < 0) continue;
      const T* const d = p.d + ((int64_t{n} * p.full_h + h) * p.full_w + w) * p.out_channels;
      const T* const weight = p.weight + (int64_t{i * p.window.kernel_w + j} * p.channels + first_channel) * p.out_channels;
      float sums_of_tap[kStemInputChannels] = {};  // sums of sums round less
      for (int o = 0; o < p.out_channels; o += kVector) {
        const auto gradient = load_vector<T, kVector>(d + o);
#pragma unroll
        for (int c = 0; c < kStemInputChannels; ++c) {
          if (first_channel + c >= p.channels) break;
          const auto weights = load_vector<T, kVector>(weight + int64_t{c} * p.out_channels + o);
#pragma unroll
          for (int v = 0; v < kVector; ++v) sums_of_tap[c] += to_float(gradient[v]) * to_float(weights[v]);
        }
      }
#pragma unroll
      for (int c = 0; c < kStemInputChannels; ++c) sums[c] += sums_of_tap[c];
    }
  }
#pragma unroll
  for (int c = 0; c < kStemInputChannels; ++c)
    if (first_channel + c < p.channels) p.dx[p.dx_strides.at(n, first_channel + c, y, x)] = from_float<T>(sums[c]);
}

}  // namespace bmk
