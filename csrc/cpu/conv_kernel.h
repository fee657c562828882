// Convolution, forward. Included by for_each_isa.h inside the namespace of each instruction set.
// clang-format off: each builds on those before it
#include "tiles.h"
#include "conv_block.h"
#include "activation_kernel.h"
#include "conv_pairs.h"
#include "conv_direct.h"
#include "conv_wgrad.h"
#include "conv_depthwise.h"
#include "conv_winograd.h"
#include "conv_phases.h"
#include "conv_winograd_taps.h"
#include "conv_scatter.h"
#include "strips.h"
#include "conv_few_pixels.h"
#include "conv_pass.h"
#include "conv_epilogue.h"
#include "conv_planar.h"
// clang-format on

// A pointwise convolution without a pool is one product: the pixels of all images become one row, where memory allows it.
inline ConvForward with_pixels_in_one_row(const ConvForward& call) {
  ConvForward flat = call;
  Conv& conv = flat.conv;
  if (!gather_pass(conv).is_pointwise() || conv.groups > 1 || call.window.kind != Pooling::none) return call;
  for (AnyImage* t : {&flat.x, &flat.out, &flat.pre, &flat.residual})
    if (t->data && !flatten(*t, conv.batch)) return call;
  const int64_t pixels = conv.batch * conv.h.wide * conv.w.wide;
  conv.batch = 1, conv.h.wide = conv.h.narrow = 1, conv.w.wide = conv.w.narrow = pixels;
  return flat;
}

// A product of fewer pixels than output channels, both read along their input channels: the pixels take the part of the weights,
// which are repacked at every call, and the weights are read where they lie. The bias, one number a pixel then, is a residual.
template <class T, class S>
inline ConvForward with_smaller_side_packed(const ConvForward& call) {
  const Conv& conv = call.conv;
  const int64_t pixels = conv.w.wide, channels = conv.narrow_channels;
  const bool product = gather_pass(conv).is_pointwise() && conv.groups == 1 && conv.batch == 1 && conv.h.wide == 1;
  const bool plain = !call.scale && !call.shift && !call.residual.data && !call.pre.data && call.activation != Activation::tanh_sigmoid;
  if (!std::is_same_v<T, S> || !product || !plain || call.window.kind != Pooling::none) return call;
  if (call.x.c != 1 || call.weight.c != 1 || pixels < kLanes<T> || channels < 2 * pixels) return call;
  ConvForward swapped = call;
  swapped.conv.narrow_channels = pixels, swapped.conv.w.wide = swapped.conv.w.narrow = channels;
  swapped.x = {call.weight.data, 0, 1, 0, call.weight.n, conv.wide_channels, 1, channels};
  swapped.weight = {call.x.data, call.x.w, 1, 0, 0, conv.wide_channels, 1, 1};
  swapped.out = {call.out.data, 0, call.out.w, 0, call.out.c, pixels, 1, channels};
  if (call.bias) swapped.residual = {const_cast<void*>(call.bias), 0, 0, 0, 1, pixels, 1, channels};
  swapped.bias = nullptr;
  return swapped;
}

template <class S>
void conv_forward(const ConvForward& given) {
  using T = compute_t<S>;
  constexpr int W = kLanes<T>;
  const ConvForward call = with_smaller_side_packed<T, S>(with_pixels_in_one_row(given));
  Pass pass = call.transposed ? scatter_pass(call.conv) : gather_pass(call.conv);
  if (call.transposed) pass.sum_length = kTransposedSumLength;
  const int64_t channels = pass.groups * pass.out_channels;
  if (call.out.height == 0 || call.out.width == 0 || pass.batch == 0 || channels == 0) return;

  // The channels of a sink are read in whole vectors, so the last sink reads past the end.
  const int64_t readable = round_up(channels, channels_per_sink<T>(pass)) + 2 * W;
  Scratch<T> alpha(readable), beta(readable);
  for (int64_t c = 0; c < readable; ++c) {
    const bool real = c < channels;
    const T scale = real && call.scale ? to_compute(static_cast<const S*>(call.scale)[c]) : T(1);
    const T shift = real && call.shift ? to_compute(static_cast<const S*>(call.shift)[c]) : T(0);
    alpha[c] = scale;
    beta[c] = (real && call.bias ? to_compute(static_cast<const S*>(call.bias)[c]) : T(0)) * scale + shift;
  }

  if constexpr (std::is_same_v<T, float>)  // double precision is there to check the gradients, not for speed
    if (planar_applies<T>(call)) return planar_forward<T, S>(call, alpha, beta);
  const auto weights = weights_of<T>(pass, call.weight.as<const S>());
  const TensorSource<T, S> source{call.x.as<const S>()};
  Epilogue<T, S> sink{alpha,
                      beta,
                      call.activation,
                      static_cast<T>(call.slope),
                      call.residual.as<const S>(),
                      call.out.as<S>(),
                      call.pre.as<S>(),
                      call.index.as<uint8_t>(),
                      nullptr,
                      channels_per_sink<T>(pass)};
  run_pass<T>(pass, call.window, weights, source, !call.transposed, [&](const Bands& bands) {
    sink.bands = &bands;
    return sink;
  });
}
