// The gradient of a depthwise convolution's weights, 1-d and 2-d, and the sums of d, the gradient of its output:
//
//     dweight[i, j, c] = sum over (n, h, w) d[n, c, h, w] x[n, c, h s - p + i d, w s - p + j d]
//
// Thread: kVector adjacent channels, kDepthwiseTaps elements of the kernel; after its last element comes one whose x is 1. A block has
// kChannelLanes vectors of channels side by side and a run of pixels, over which its other threads take turns; they add up what they
// have at its end. Blocks of other runs leave partial sums, which are added up in their order, whichever came first.
// Refuses several channels to a group.
// Floor: memory: x and d once for each kDepthwiseTaps elements of the kernel.
#pragma once

#include "conv_depthwise.cuh"

namespace bmk {

template <class T>
struct DepthwiseWeights {
  const T* x;      // [N, C, H, W]
  const T* d;      // [N, C, OH, OW]
  float* partial;  // [splits, KH KW + 1, C]
  ImageStrides x_strides, d_strides;
  int channels, in_h, in_w, out_h, out_w;
  ConvWindow window;
  int pixels;  // N OH OW, below 2^30
};

constexpr int kDepthwiseTaps = 10;  // a 3x3 kernel and the sum of d

constexpr int depthwise_channel_lanes(bool channels_last) { return channels_last ? 16 : 1; }

template <class T, int kVector, bool kChannelsLast>
__global__ void __launch_bounds__(kDepthwiseThreads, 3) depthwise_weights(const __grid_constant__ DepthwiseWeights<T> p) {
  constexpr int kChannelLanes = depthwise_channel_lanes(kChannelsLast), kPixelLanes = kDepthwiseThreads / kChannelLanes;
  constexpr int kChannels = kChannelLanes * kVector, kWarps = kDepthwiseThreads / kWarpSize;
  const int groups = ceil_div(p.channels, kChannels), taps = p.window.kernel_h * p.window.kernel_w;
  const int first_channel = blockIdx.x % groups * kChannels, first_tap = blockIdx.x / groups * kDepthwiseTaps;
  const int lane = threadIdx.x % kChannelLanes, c = first_channel + lane * kVector;
  const int share = ceil_div(p.pixels, static_cast<int>(gridDim.y)), first = blockIdx.y * share, end = min(p.pixels, first + share);

  float sums[kDepthwiseTaps][kVector] = {};
  for (int pixel = first + threadIdx.x / kChannelLanes; c < p.channels && pixel < end; pixel += kPixelLanes) {
    const int w = pixel % p.out_w, h = pixel / p.out_w % p.out_h, n = pixel / p.out_w / p.out_h;
    const auto d = load_vector<T, kVector>(p.d + p.d_strides.at(n, c, h, w));
    const T* const channel = p.x + p.x_strides.at(n, c, 0, 0);
    int i = first_tap / p.window.kernel_w, j = first_tap % p.window.kernel_w;
#pragma unroll
    for (int tap = 0; tap < kDepthwiseTaps; ++tap) {
      if (i < p.window.kernel_h) {
        const int in_h = h * p.window.stride_h - p.window.pad_h + i * p.window.dilation_h;
        const int in_w = w * p.window.stride_w - p.window.pad_w + j * p.window.dilation_w;
        const auto x = depthwise_read<T, kVector>(channel, p.x_strides, p.in_h, p.in_w, in_h, in_w);
#pragma unroll
        for (int v = 0; v < kVector; ++v) sums[tap][v] += to_float(d[v]) * to_float(x[v]);
      } else if (first_tap + tap == taps) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) sums[tap][v] += to_float(d[v]);
      }
      if (++j == p.window.kernel_w) j = 0, ++i;
    }
  }

  // The lanes of a warp that have the same channels, then the warps.
  SHARED(float, of_warp, [kWarps][kDepthwiseTaps][kChannels]);
#pragma unroll
  for (int tap = 0; tap < kDepthwiseTaps; ++tap)
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      float sum = sums[tap][v];
#pragma unroll
      for (int offset = kWarpSize / 2; offset >= kChannelLanes; offset /= 2) sum += __shfl_xor_sync(kFullWarp, sum, offset);
      if (threadIdx.x % kWarpSize < kChannelLanes) of_warp[threadIdx.x / kWarpSize][tap][lane * kVector + v] = sum;
    }
  __syncthreads();  // every warp's sums are there
  for (int i = threadIdx.x; i < kDepthwiseTaps * kChannels; i += kDepthwiseThreads) {
    const int tap = i / kChannels, channel = first_channel + i % kChannels;
    if (first_tap + tap > taps || channel >= p.channels) continue;
    float sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += of_warp[warp][tap][i % kChannels];
    p.partial[(int64_t{blockIdx.y} * (taps + 1) + first_tap + tap) * p.channels + channel] = sum;
  }
}

}  // namespace bmk
