// Convolution, forward. Included by for_each_isa.h inside the namespace of each instruction set.
// clang-format off: each builds on those before it
#include "conv_block.h"
#include "conv_activation.h"
#include "conv_direct.h"
#include "conv_winograd.h"
#include "conv_pass.h"
#include "conv_epilogue.h"
// clang-format on

template <class S>
void conv_forward(const ConvForward& call) {
  using T = compute_t<S>;
  constexpr int W = kLanes<T>;
  Pass pass = call.transposed ? scatter_pass(call.conv) : gather_pass(call.conv);
  if (call.transposed) pass.sum_length = kTransposedSumLength;
  const int64_t channels = pass.groups * pass.out_channels;
  if (call.out.height == 0 || call.out.width == 0 || pass.batch == 0 || channels == 0) return;

  // A group's channels are read in whole vectors, so the last group reads past the end.
  Scratch<T> alpha(channels + 2 * W), beta(channels + 2 * W);
  for (int64_t c = 0; c < channels + 2 * W; ++c) {
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
                      pass.out_channels};
  run_pass<T>(pass, call.window, weights, source, !call.transposed, [&](const Bands& bands) {
    sink.bands = &bands;
    return [&sink](int64_t n, int64_t g, int64_t i, T* y, int64_t y_columns, int64_t y_stride) { sink(n, g, i, y, y_columns, y_stride); };
  });
}
