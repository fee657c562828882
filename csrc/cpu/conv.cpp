// Convolution and transposed convolution of one or two axes, with bias, folded norm, residual, activation and pool in one
// pass over each band of the output. The formula and the floor of each kernel are in conv_direct.h and conv_winograd.h.
#define KERNEL_SOURCE "conv_kernel.h"
#include "conv_arguments.h"

#include "for_each_isa.h"

#include <torch/csrc/stable/library.h>

namespace bmk {

// Returns (out, index, pre). With `save`, index [as out] uint8 is the chosen element of each max-pool window, and pre the
// values before the activation, for conv_bwd; tensors that it does not need are empty. Both have their channels innermost.
std::tuple<Tensor, Tensor, Tensor> conv_fwd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                            const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                                            const std::optional<Tensor>& residual, const std::vector<int64_t>& stride,
                                            const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
                                            bool transposed, const std::vector<int64_t>& output_padding, const std::string& activation,
                                            const std::string& pool, const std::vector<int64_t>& pool_size,
                                            const std::vector<int64_t>& pool_stride, const std::vector<int64_t>& pool_padding, double slope,
                                            bool save, bool channels_last) {
  const ConvCall call(x, weight, stride, padding, dilation, groups, transposed, output_padding, activation, pool, pool_size, pool_stride,
                      pool_padding);
  call.check_channels(bias, x, "bias");
  call.check_channels(scale, x, "scale");
  call.check_channels(shift, x, "shift");
  if (residual) {
    ConvCall::check_shape(*residual, call.full, "residual");
    CHECK_SAME_DTYPE(*residual, x);
  }
  Tensor out = channels_last ? new_channels_last(x, call.out_shape, std::nullopt) : torch::stable::new_empty(x, call.out_shape);
  const bool save_index = save && call.window.kind == Pooling::max, save_pre = save && call.saves_pre();
  Tensor index = save_index ? new_channels_last(x, call.out_shape, torch::headeronly::ScalarType::Byte)
                            : torch::stable::new_empty(x, {0}, torch::headeronly::ScalarType::Byte);
  Tensor pre = save_pre ? new_channels_last(x, call.pre_shape(), std::nullopt) : torch::stable::new_empty(x, {0});
  // Pixels that no window of the pool covers are not computed, and their gradient, which is 0, must not meet a NaN.
  if (save_pre && call.window.kind == Pooling::avg) torch::stable::zero_(pre);
  const ConvForward arguments{call.conv,
                              transposed,
                              call.window,
                              call.activation,
                              slope,
                              image(x),
                              image(weight),
                              image(residual),
                              image(out),
                              save_pre ? image(pre) : AnyImage{},
                              save_index ? image(index) : AnyImage{},
                              data(bias),
                              data(scale),
                              data(shift)};
  DISPATCH_FLOATING(x.scalar_type(), "conv", [&] { ISA_CALL(conv_forward<scalar_t>, arguments); });
  return {out, index, pre};
}

}  // namespace bmk

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_native, m) {
  m.def(
      "conv_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? residual, int[] stride, int[] padding, "
      "int[] dilation, int groups, bool transposed, int[] output_padding, str activation, str pool, int[] pool_size, int[] pool_stride, "
      "int[] pool_padding, float slope, bool save, bool channels_last) -> (Tensor out, Tensor index, Tensor pre)");
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel_native, CPU, m) { m.impl("conv_fwd", TORCH_BOX(&bmk::conv_fwd)); }
