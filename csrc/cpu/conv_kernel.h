// Convolution, forward. Included by for_each_isa.h inside the namespace of each instruction set.
// clang-format off: each builds on those before it
#include "conv_block.h"
#include "conv_activation.h"
#include "conv_direct.h"
#include "conv_wgrad.h"
#include "conv_depthwise.h"
#include "conv_winograd.h"
#include "conv_pass.h"
#include "conv_epilogue.h"
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

template <class S>
void conv_forward(const ConvForward& given) {
  using T = compute_t<S>;
  constexpr int W = kLanes<T>;
  const ConvForward call = with_pixels_in_one_row(given);
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
    return [&sink](int64_t n, int64_t g, int64_t i, T* y, int64_t y_columns, int64_t y_stride) { sink(n, g, i, y, y_columns, y_stride); };
  });
}
