// Convolution of an image with few input channels, with what follows it, forward: the first layers of a network.
//
//     out = pool(activation(scale (sum over (c, i, j) weight[o, c, i, j] x[n, c, h s - p + i d, w s - p + j d] + bias) + shift))
//
// Block: a tile of the pooled output of one image, kChannels output channels. It keeps the part of x that its tile needs and its
// weights in shared memory; the window's elements (c, i, j) are the depth of a product, 16 to an instruction. Warp: every kWarps-th row
// of 16 convolution outputs, times all channels of the block; in float32 of 32 outputs, by IEEE multiply-adds. The outputs before
// pooling stay in shared memory: activated and rounded, or, for training (kSave), z in float32, since rounding makes ties, which
// would send gradients to other elements than the largest.
// Saved for backward: which element a max-pool took, a byte; z where the activation's derivative needs it.
// Refuses: groups, residuals, gates; windows and tiles that shared memory cannot hold.
// Floor: memory: x and out once, as long as there are few channels: 2 K FMA for each output, K elements to a window.
#pragma once

#include <type_traits>

#include "conv_stem_tile.cuh"

namespace bmk {

template <class T>
struct StemForward {
  StemInput<T> input;
  ConvWindow window;
  PoolWindow pool;
  const T* weight;  // [O, C, KH, KW]
  T* out;           // [N, O, PH, PW]
  uint8_t* index;   // likewise; null: not wanted, as the next one
  T* pre;           // z: after a max-pool of the elements it took, likewise, else [N, O, H, W]
  ConvEpilogue<T> epilogue;
  ImageStrides out_strides, index_strides, pre_strides;
  int out_channels, full_h, full_w, out_h, out_w;  // full: before pooling
  int tile_h, tile_w;                              // of the pooled output
};

// What stays in shared memory before pooling.
template <class T, bool kSave>
using StemFull = std::conditional_t<kSave, float, T>;

// Extents of a block's work, all in elements.
struct StemTile : StemExtent {
  int full_h, full_w;  // convolution outputs
  int padded_depth;

  template <class T>
  __host__ __device__ explicit StemTile(const StemForward<T>& p)
      : StemExtent(p.input.channels, p.window, (p.tile_h - 1) * p.pool.stride_h + p.pool.h, (p.tile_w - 1) * p.pool.stride_w + p.pool.w),
        full_h((p.tile_h - 1) * p.pool.stride_h + p.pool.h),
        full_w((p.tile_w - 1) * p.pool.stride_w + p.pool.w),
        padded_depth(round_up(depth, 16)) {}

  // In the order of shared memory: offsets of the window's elements, weights, outputs before pooling, input.
  __host__ __device__ int offsets_bytes() const { return padded_depth * 4; }
  __host__ __device__ int weight_elements(int channels) const { return channels * (padded_depth + kStemPad); }
  __host__ __device__ int full_elements(int channels) const { return full_h * full_w * (channels + kStemPad); }
  __host__ __device__ int shared_bytes(int channels, int element_size, int full_size) const {
    return offsets_bytes() + element_size * (weight_elements(channels) + elements) + full_size * full_elements(channels);
  }
};

// The block's weights, zeros past the last channel and the window: by output channel, or in float32 by element of the window; and where
// the window's elements lie in the input.
template <class T, int kChannels>
__device__ __forceinline__ void stem_load_weights(const StemForward<T>& p, const StemTile& tile, int first_channel, T* weights,
                                                  int* offsets) {
  for (int i = threadIdx.x; i < kChannels * tile.padded_depth; i += kStemThreads) {
    const int o = i / tile.padded_depth, k = i % tile.padded_depth;
    const bool inside = first_channel + o < p.out_channels && k < tile.depth;
    const int place = sizeof(T) == 4 ? k * kChannels + o : o * (tile.padded_depth + kStemPad) + k;
    weights[place] = inside ? p.weight[int64_t{first_channel + o} * tile.depth + k] : from_float<T>(0.0f);
  }
  for (int k = threadIdx.x; k < tile.padded_depth; k += kStemThreads) offsets[k] = k < tile.depth ? tile.offset(p.window, k) : -1;
}

// Two neighbours along the depth, of the window that begins at `window`; zero past its end, whatever the input holds.
template <class T>
__device__ __forceinline__ unsigned stem_pair(const T* window, const int* offsets) {
  const auto element = [&](int i) {
    return offsets[i] < 0 ? 0u : static_cast<unsigned>(__builtin_bit_cast(unsigned short, window[offsets[i]]));
  };
  return element(0) | element(1) << 16;
}

// The sums of two neighbouring channels of a convolution output, into shared memory.
template <class T, int kChannels, class Full>
__device__ __forceinline__ void stem_keep(const StemForward<T>& p, int first_channel, Full* full, int output, int column, float low,
                                          float high) {
  const int first = first_channel + column;
  if (first >= p.out_channels) return;
  low = p.epilogue.linear(low, first);
  high = p.epilogue.linear(high, min(first + 1, p.out_channels - 1));  // of an odd number of channels there is no second
  Full* const to = full + output * (kChannels + kStemPad) + column;
  if constexpr (sizeof(Full) == 4)
    *reinterpret_cast<float2*>(to) = make_float2(low, high);
  else
    *reinterpret_cast<unsigned*>(to) = pack2<T>(p.epilogue.activated(low), p.epilogue.activated(high));
}

// kRows windows of a thread, from `first` on, eight apart. Past the last output: the last one again, and dropped.
template <int kRows, class T>
__device__ __forceinline__ void stem_windows(const T* (&windows)[kRows], const ConvWindow& window, const StemTile& tile, const T* input,
                                             int first) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int output = min(first + 8 * r, tile.full_h * tile.full_w - 1);
    windows[r] = input + output / tile.full_w * window.stride_h * tile.in_w + output % tile.full_w * window.stride_w;
  }
}

template <class T, int kChannels, class Full>
__device__ __forceinline__ void stem_multiply(const StemForward<T>& p, const StemTile& tile, int first_channel, const T* input,
                                              const T* weights, const int* offsets, Full* full) {
  constexpr int kRows = sizeof(T) == 4 ? 4 : 2;  // of a thread
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  const int outputs = tile.full_h * tile.full_w;
  for (int first = threadIdx.x / kWarpSize * 8 * kRows + g; first - g < outputs; first += kStemWarps * 8 * kRows) {
    const T* windows[kRows];
    stem_windows(windows, p.window, tile, input, first);
    float sums[kChannels / 8][kRows * 2] = {};
    if constexpr (sizeof(T) == 4) {
      for (int k = 0; k < tile.depth; ++k) {
        const int offset = offsets[k];
        float x[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) x[r] = windows[r][offset];
#pragma unroll
        for (int c = 0; c < kChannels / 8; ++c) {
          const auto w = load_vector<float, 2>(weights + k * kChannels + c * 8 + 2 * t);
#pragma unroll
          for (int i = 0; i < kRows * 2; ++i) sums[c][i] += x[i / 2] * w[i % 2];
        }
      }
    } else {
      for (int k = 2 * t; k < tile.padded_depth; k += 16) {
        const unsigned a[4] = {stem_pair(windows[0], offsets + k), stem_pair(windows[1], offsets + k),
                               stem_pair(windows[0], offsets + k + 8), stem_pair(windows[1], offsets + k + 8)};
#pragma unroll
        for (int c = 0; c < kChannels / 8; ++c) {
          const T* b = weights + (c * 8 + g) * (tile.padded_depth + kStemPad) + k;
          mma_m16n8k16<T>(sums[c], a, *reinterpret_cast<const unsigned*>(b), *reinterpret_cast<const unsigned*>(b + 8));
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kChannels / 8; ++c)
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (first + 8 * r < outputs)
          stem_keep<T, kChannels>(p, first_channel, full, first + 8 * r, c * 8 + 2 * t, sums[c][2 * r], sums[c][2 * r + 1]);
  }
}

// What a window of the pool comes to, and, of a maximum, which element it is and its z.
struct StemPooled {
  float value, z;
  int element;
};

// The window of the pool at (row, column) of the tile, as far as it lies inside the convolution's output.
template <class T, class Full>
__device__ __forceinline__ StemPooled stem_pool(const StemForward<T>& p, const StemTile& tile, const Full* channel, int stride, int first_h,
                                                int first_w, int row, int column) {
  StemPooled most{-INFINITY, -INFINITY, 0};
  float sum = 0;
  for (int i = 0; i < p.pool.h; ++i)
    for (int j = 0; j < p.pool.w; ++j) {
      const int h = row * p.pool.stride_h + i, w = column * p.pool.stride_w + j;
      if (first_h + h < 0 || first_h + h >= p.full_h || first_w + w < 0 || first_w + w >= p.full_w) continue;
      const float z = to_float(channel[(h * tile.full_w + w) * stride]), value = sizeof(Full) == 4 ? p.epilogue.activated(z) : z;
      if (value > most.value || value != value) most = {value, z, i * p.pool.w + j};  // NaN wins
      sum += value;
    }
  if (p.pool.kind == Pool::avg) most.value = sum / static_cast<float>(p.pool.h * p.pool.w);
  return most;
}

constexpr int kNoGradient = 255;  // in the index of a max-pool: the ReLU of this window is off

template <class T, int kChannels, bool kSave>
__global__ void __launch_bounds__(kStemThreads, 2) conv_stem(const __grid_constant__ StemForward<T> p) {
  using Full = StemFull<T, kSave>;
  const StemTile tile(p);
  const int tiles_w = ceil_div(p.out_w, p.tile_w), tiles = ceil_div(p.out_h, p.tile_h) * tiles_w;
  const int n = blockIdx.x / tiles, in_image = blockIdx.x % tiles, first_channel = blockIdx.y * kChannels;
  const int out_h = in_image / tiles_w * p.tile_h, out_w = in_image % tiles_w * p.tile_w;
  const int full_h = out_h * p.pool.stride_h - p.pool.pad_h, full_w = out_w * p.pool.stride_w - p.pool.pad_w;

  int* const offsets = reinterpret_cast<int*>(dynamic_shared());
  T* const weights = reinterpret_cast<T*>(dynamic_shared() + tile.offsets_bytes());
  Full* const full = reinterpret_cast<Full*>(weights + tile.weight_elements(kChannels));
  T* const input = reinterpret_cast<T*>(full + tile.full_elements(kChannels));
  stem_load_input(p.input, tile, n, full_h * p.window.stride_h - p.window.pad_h, full_w * p.window.stride_w - p.window.pad_w, input);
  stem_load_weights<T, kChannels>(p, tile, first_channel, weights, offsets);
  __syncthreads();  // input and weights have come
  stem_multiply<T, kChannels>(p, tile, first_channel, input, weights, offsets, full);
  __syncthreads();  // all outputs before pooling are there

  const int channels = min(kChannels, p.out_channels - first_channel), outputs = p.tile_h * p.tile_w;
  const bool channels_last = p.out_strides.c == 1;  // neighbouring threads write neighbours
  for (int i = threadIdx.x; i < channels * outputs; i += kStemThreads) {
    const int o = channels_last ? i % channels : i / outputs, at = channels_last ? i / channels : i % outputs;
    const int row = at / p.tile_w, column = at % p.tile_w, h = out_h + row, w = out_w + column, c = first_channel + o;
    if (h >= p.out_h || w >= p.out_w) continue;
    const StemPooled found = stem_pool(p, tile, full + o, kChannels + kStemPad, full_h, full_w, row, column);
    const T rounded = from_float<T>(found.value);
    p.out[p.out_strides.at(n, c, h, w)] = rounded;
    if constexpr (kSave) {
      const bool is_off = p.epilogue.activation == Activation::relu && to_float(rounded) <= 0;
      if (p.index) p.index[p.index_strides.at(n, c, h, w)] = static_cast<uint8_t>(is_off ? kNoGradient : found.element);
      if (p.pre && p.pool.kind != Pool::avg) p.pre[p.pre_strides.at(n, c, h, w)] = from_float<T>(found.z);
    }
  }
  if constexpr (kSave) {
    if (!p.pre || p.pool.kind != Pool::avg) return;
    // z of every convolution output that a window holds, each from one tile where windows overlap.
    const int own_h = out_h + p.tile_h < p.out_h ? p.tile_h * p.pool.stride_h : tile.full_h;
    const int own_w = out_w + p.tile_w < p.out_w ? p.tile_w * p.pool.stride_w : tile.full_w;
    for (int i = threadIdx.x; i < channels * tile.full_h * tile.full_w; i += kStemThreads) {
      const int o = i % channels, at = i / channels, row = at / tile.full_w, column = at % tile.full_w;
      if (row >= own_h || column >= own_w || full_h + row >= p.full_h || full_w + column >= p.full_w) continue;
      p.pre[p.pre_strides.at(n, first_channel + o, full_h + row, full_w + column)] = from_float<T>(full[at * (kChannels + kStemPad) + o]);
    }
  }
}

}  // namespace bmk
