// Convolution, backward. Included by for_each_isa.h inside the namespace of each instruction set.
//
// With u the convolution and bias, out = pool(activation(scale * u + shift + residual)), and d the gradient of the
// activation's argument:
//   dresidual = d,  dshift = sum d,  dbias = scale * dshift
//   dx        = the pass in the other direction over d, weights times scale
//   dweight   = scale * dw,  dw the product of d and x
//   dscale    = sum d u = <weight, dw> + bias * dshift, so that u is neither stored nor computed again
// clang-format off: each builds on those before it
#include "tiles.h"
#include "conv_block.h"
#include "activation_kernel.h"
#include "conv_pairs.h"
#include "conv_direct.h"
#include "conv_wgrad.h"
#include "conv_wgrad_pairs.h"
#include "conv_depthwise.h"
#include "conv_depthwise_gradient.h"
#include "conv_winograd.h"
#include "conv_phases.h"
#include "conv_winograd_taps.h"
#include "conv_wgrad_winograd.h"
#include "conv_scatter.h"
#include "strips.h"
#include "conv_few_pixels.h"
#include "conv_pass.h"
#include "conv_gradient.h"
#include "conv_chosen_gradient.h"
#include "conv_planar_gradient.h"
// clang-format on

// dw [group][taps * wide channels][padded narrow channels] -> dweight (times scale), which is contiguous.
template <class T, class S>
inline void store_weight_gradient(const ConvBackward& call, const T* dw) {
  constexpr int64_t W = kLanes<T>;
  const Conv& conv = call.conv;
  const int64_t narrow = conv.narrow_channels / conv.groups, wide = conv.wide_channels / conv.groups, padded = padded_channels<T>(narrow);
  const int64_t taps = conv.h.taps * conv.w.taps, depth = taps * wide, pieces = (depth + W - 1) / W;
  constexpr int64_t kRun = 4 * W;  // of adjacent numbers of dw, so that its rows are not read a cache line at a time
  const int64_t runs = (padded + kRun - 1) / kRun;
  const auto dweight = call.dweight.as<S>();
  const S* scale = static_cast<const S*>(call.scale);
  torch::stable::parallel_for(0, conv.groups * runs * pieces, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = i / (runs * pieces), run = i / pieces % runs * kRun, k = i % pieces * W, count = std::min(W, depth - k);
      for (int64_t first = run; first < std::min(run + kRun, padded); first += W) {
        const int64_t lanes = std::min(W, narrow - first);
        const vec<T> factors = scale && !call.transposed ? read_lanes<T>(scale + g * narrow + first, lanes) : vec<T>{} + T(1);
        vec<T> m[W];
        int64_t c = k / taps, tap = k % taps;
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) {
          m[j] = vec<T>{};
          if (j >= count) continue;
          const vec<T> factor = scale && call.transposed ? broadcast(to_compute(scale[g * wide + c])) : factors;
          m[j] = load(dw + (g * depth + tap * wide + c) * padded + first) * factor;
          if (++tap == taps) tap = 0, ++c;
        }
        transpose<T>(m);
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j)
          if (j < lanes) write_lanes<T>(dweight.data + (g * narrow + first + j) * dweight.n + k, m[j], count);
      }
    }
  });
}

// dscale = <weight, dw> + bias * dshift.
template <class T, class S>
inline void scale_gradient(const ConvBackward& call, const T* dw, const T* dshift) {
  const Conv& conv = call.conv;
  const int64_t narrow = conv.narrow_channels / conv.groups, wide = conv.wide_channels / conv.groups;
  const int64_t padded = padded_channels<T>(narrow), taps_w = conv.w.taps, depth = conv.h.taps * taps_w * wide;
  const auto weight = call.weight.as<const S>();
  const S* bias = static_cast<const S*>(call.bias);
  const int64_t outputs = call.transposed ? wide : narrow, inputs = call.transposed ? narrow : wide;
  torch::stable::parallel_for(0, conv.groups * outputs, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {  // an output channel
      const int64_t g = i / outputs, o = i % outputs;
      T product = 0;
      for (int64_t c = 0; c < inputs; ++c) {
        const int64_t first = call.transposed ? c : o, second = call.transposed ? o : c;  // of the weight's two channel dimensions
        const S* of_channels = weight.data + (g * narrow + first) * weight.n + second * weight.c;
        const T* gradients = dw + (g * depth + second) * padded + first;
        T row = 0;
        for (int64_t kh = 0; kh < conv.h.taps; ++kh)
          for (int64_t kw = 0; kw < taps_w; ++kw)
            row += to_compute(of_channels[kh * weight.h + kw * weight.w]) * gradients[(kh * taps_w + kw) * wide * padded];
        product += row;
      }
      static_cast<S*>(call.dscale)[i] = from_compute<S>(product + (bias ? to_compute(bias[i]) : T(0)) * dshift[i]);
    }
  });
}

template <class T, class WideSource, class NarrowSource>
inline void weight_gradient_of(const Conv& conv, bool gated, const WideSource& wide, const NarrowSource& narrow, T* dw, T* sums) {
  if (is_depthwise(gather_pass(conv))) {
    depthwise_weight_gradient<T>(conv, wide, narrow, dw, sums, padded_channels<T>(1));
    return;
  }
#if ISA_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<typename WideSource::Stored, bfloat16>)
    if (paired_gradient_applies(conv)) {
      paired_weight_gradient_of(conv, gated, wide, narrow, dw, sums);
      return;
    }
#endif
  if constexpr (std::is_same_v<T, float>) {
    const FilteredGradient kind = filtered_gradient<T>(conv);
    if (kind.taps > 0 && !gated && filtered_weight_gradient<T>(conv, kind, wide, narrow, dw, sums)) return;
  }
  weight_gradient<T>(conv, wide, narrow, dw, sums);
}

// By the chosen elements of a max-pool alone, where that can be. False: nothing is computed.
template <class T, class S>
inline bool pooled_weight_gradient(const ConvBackward& call, const TensorSource<T, S>& input, const GradientSource<T, S>& gradient, T* dw,
                                   T* sums) {
  if constexpr (std::is_same_v<T, float>) {
    if (planar_gradient_applies<T>(call) && planar_weight_gradient<T, S>(call, dw, sums)) return true;
    return chosen_gradient_applies<T>(call) && chosen_weight_gradient<T>(call.conv, input, gradient, dw, sums);
  }
  return false;
}

template <class S>
void conv_backward(const ConvBackward& call) {
  using T = compute_t<S>;
  const Conv& conv = call.conv;
  const Pass forward = call.transposed ? scatter_pass(conv) : gather_pass(conv);
  const Pass backward = call.transposed ? gather_pass(conv) : scatter_pass(conv);
  const int64_t channels = conv.groups * forward.out_channels, height = forward.h.outputs(), width = forward.w.outputs();
  const GradientSource<T, S> gradient{call.grad.as<const S>(),
                                      call.out.as<const S>(),
                                      call.pre.as<const S>(),
                                      call.index.as<const uint8_t>(),
                                      call.activation,
                                      static_cast<T>(call.slope),
                                      call.window,
                                      channels,
                                      height,
                                      width};
  const TensorSource<T, S> input{call.x.as<const S>()};

  if (call.dx.data) {
    bool done = false;
#if ISA_VECTOR_BYTES == 64
    if constexpr (std::is_same_v<T, float>) done = chosen_gradient_applies<T>(call) && chosen_input_gradient<S>(call, gradient);
#endif
    if (!done) {
      TensorSink<T, S> sink{call.dx.as<S>(), nullptr, channels_per_sink<T>(backward)};
      const auto weights = weights_of<T, S>(backward, call.weight.as<const S>(), static_cast<const S*>(call.scale));
      run_pass<T>(backward, Window{}, weights, gradient, true, [&](const Bands& bands) {
        sink.bands = &bands;
        return sink;
      });
    }
  }
  if (call.dresidual.data) {
    const int64_t padded = padded_channels<T>(channels);
    const Bands bands = make_bands(height, width, Window{}, conv.batch, padded * sizeof(T), 192 << 10);
    torch::stable::parallel_for(0, conv.batch * bands.count(), 1, [&](int64_t begin, int64_t end) {
      Scratch<T> block(bands.rows * bands.columns * padded);
      for (int64_t unit = begin; unit < end; ++unit) {
        const Band band = bands.full(unit % bands.count());
        gradient.load(block.get(), padded, bands.columns, unit / bands.count(), 0, channels, band.top, band.rows(), band.left,
                      band.columns());
        store_block<T>(block.get(), padded, bands.columns, call.dresidual.as<S>(), unit / bands.count(), 0, channels, band.top, band.rows(),
                       band.left, band.columns());
      }
    });
  }

  const bool want_weights = call.dweight.data || call.dscale;
  const bool want_sums = call.dshift || call.dbias || (call.dscale && call.bias);
  Scratch<T> sums(channels + kLanes<T>);
  if (want_weights) {
    const int64_t narrow = conv.narrow_channels / conv.groups, padded = padded_channels<T>(narrow);
    Scratch<T> dw(conv.groups * gather_pass(conv).depth() * padded), group_sums(conv.groups * padded);
    if (call.transposed) {
      weight_gradient_of<T>(conv, gradient.gated(), gradient, input, dw.get(), nullptr);
      if (want_sums) channel_sums<T>(gradient, conv.batch, channels, height, width, sums.get());
    } else {
      T* all_sums = want_sums ? group_sums.get() : nullptr;
      if (!pooled_weight_gradient<T, S>(call, input, gradient, dw.get(), all_sums))
        weight_gradient_of<T>(conv, gradient.gated(), input, gradient, dw.get(), all_sums);
      for (int64_t c = 0; want_sums && c < channels; ++c) sums[c] = group_sums[c / narrow * padded + c % narrow];
    }
    if (call.dweight.data) store_weight_gradient<T, S>(call, dw.get());
    if (call.dscale) scale_gradient<T, S>(call, dw.get(), sums.get());
  } else if (want_sums) {
    channel_sums<T>(gradient, conv.batch, channels, height, width, sums.get());
  }
  for (int64_t c = 0; c < channels; ++c) {
    if (call.dshift) static_cast<S*>(call.dshift)[c] = from_compute<S>(sums[c]);
    const T scale = call.scale ? to_compute(static_cast<const S*>(call.scale)[c]) : T(1);
    if (call.dbias) static_cast<S*>(call.dbias)[c] = from_compute<S>(scale * sums[c]);
  }
}
