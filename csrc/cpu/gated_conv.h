// What the kernels of gated_conv are called with. Plain data, the same for every instruction set.
#pragma once

#include <cstdint>

namespace bmk {

struct GatedConvShape {
  int64_t batch, length;
  int64_t channels;  // C, of x
  int64_t gates;     // D
  int64_t kernel, dilation;
  int64_t out;    // C, or 0 where there is no residual output
  int64_t skips;  // S, or 0

  // How far back tap k looks.
  int64_t shift(int64_t tap) const { return dilation * (kernel - 1 - tap); }
};

// Numbers of 16 bits that a training step in bfloat16 keeps of one time step: see gated_conv_gate.h.
inline int64_t kept_row(int64_t gates) { return 2 * ((gates + 15) / 16 * 16); }

// [N, channels, T], either the channels or the steps adjacent; strides in elements. Without data it counts as 0.
template <class S>
struct Signal {
  S* data = nullptr;
  int64_t n = 0, c = 0, t = 0;

  Signal at(int64_t sample, int64_t step) const { return {data ? data + sample * n + step * t : nullptr, n, c, t}; }
  Signal channel(int64_t i) const { return {data ? data + i * c : nullptr, n, c, t}; }
};

// The parameters, or their gradients, as torch.nn.Conv1d lays them out; null where they are left out.
template <class S>
struct GatedConvWeights {
  S* weight;  // [2 D, C, K]: the rows of the filter, then those of the gate
  S* bias;    // [2 D]
  S* out;     // [C, D]
  S* out_bias;
  S* skip;  // [S, D]
  S* skip_bias;
};

template <class S>
struct GatedConvForward {
  GatedConvShape shape;
  GatedConvWeights<const S> weights;
  Signal<const S> x;
  Signal<const S> skip_sum;  // what the skip output is added to
  Signal<S> out, skip;
  uint16_t* gates;  // what the backward gets, of bfloat16; null where it is not wanted
};

template <class S>
struct GatedConvBackward {
  GatedConvShape shape;
  GatedConvWeights<const S> weights;
  Signal<const S> x;
  Signal<const S> d_out, d_skip;
  const uint16_t* gates;          // of bfloat16, what the forward kept
  Signal<S> d_x;                  // without data where it is not wanted
  GatedConvWeights<S> d_weights;  // all null where they are not wanted
  bool need_weights;
};

}  // namespace bmk
