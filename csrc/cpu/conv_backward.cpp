// Gradients of conv.cpp's op. What is computed, and from what, is written in conv_backward_kernel.h.
#define KERNEL_SOURCE "conv_backward_kernel.h"
#include "conv_arguments.h"

#include "for_each_isa.h"

#include <torch/csrc/stable/library.h>

namespace bmk {

// `needs` says which of the gradients of x, weight, bias, scale, shift and residual are wanted; the others are empty tensors.
// out, index and pre are those of conv_fwd. dx is channels_last if the geometry says so, dresidual has its channels innermost.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_bwd(
    const Tensor& grad, const Tensor& out, const Tensor& index, const Tensor& pre, const std::vector<int64_t>& needs, const Tensor& x,
    const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& scale, const std::vector<int64_t>& geometry,
    const Text& activation, double slope) {
  const ConvCall call(x, weight, geometry, activation);
  call.check_channels(bias, x, "bias");
  call.check_channels(scale, x, "scale");
  STD_TORCH_CHECK(needs.size() == 6, "needs must have 6 entries, got ", needs.size());
  ConvCall::check_shape(grad, call.out_shape, "grad");
  ConvCall::check_shape(out, call.out_shape, "out");
  CHECK_SAME_DTYPE(grad, x);
  CHECK_SAME_DTYPE(out, x);
  if (call.window.kind == Pooling::max) {
    ConvCall::check_shape(index, call.out_shape, "index");
    CHECK_DTYPE_IS(index, torch::headeronly::ScalarType::Byte);
  }
  if (call.saves_pre()) {
    ConvCall::check_shape(pre, call.pre_shape(), "pre");
    CHECK_SAME_DTYPE(pre, x);
  }
  std::vector<int64_t> x_shape, weight_shape;
  for (int64_t i = 0; i < x.dim(); ++i) x_shape.push_back(x.size(i)), weight_shape.push_back(weight.size(i));
  const auto dtype = x.scalar_type();
  const std::vector<int64_t> none{0}, per_channel{call.output_channels};
  const auto vector = [&](bool wanted) { return new_contiguous(wanted ? per_channel : none, dtype); };
  Tensor dx = needs[0] && call.channels_last ? new_channels_last(x_shape, dtype) : new_contiguous(needs[0] ? x_shape : none, dtype);
  Tensor dweight = new_contiguous(needs[1] ? weight_shape : none, dtype);
  Tensor dbias = vector(needs[2]), dscale = vector(needs[3]), dshift = vector(needs[4]);
  Tensor dresidual = needs[5] ? new_channels_last(call.full, dtype) : new_contiguous(none, dtype);
  const auto pointer = [](Tensor& t, bool wanted) { return wanted ? t.mutable_data_ptr() : nullptr; };
  const ConvBackward arguments{call.conv,
                               call.transposed,
                               call.window,
                               call.activation,
                               slope,
                               image(x),
                               image(weight),
                               image(grad),
                               image(out),
                               call.saves_pre() ? image(pre) : AnyImage{},
                               call.window.kind == Pooling::max ? image(index) : AnyImage{},
                               needs[0] ? image(dx) : AnyImage{},
                               needs[1] ? image(dweight) : AnyImage{},
                               needs[5] ? image(dresidual) : AnyImage{},
                               data(bias),
                               data(scale),
                               pointer(dbias, needs[2]),
                               pointer(dscale, needs[3]),
                               pointer(dshift, needs[4])};
  DISPATCH_FLOATING(x.scalar_type(), "conv_bwd", [&] { ISA_CALL(conv_backward<scalar_t>, arguments); });
  return {dx, dweight, dbias, dscale, dshift, dresidual};
}

}  // namespace bmk

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_native, m) {
  m.def(
      "conv_bwd(Tensor grad, Tensor out, Tensor index, Tensor pre, int[] needs, Tensor x, Tensor weight, Tensor? bias, Tensor? scale, "
      "int[] geometry, str activation, float slope) -> "
      "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dscale, Tensor dshift, Tensor dresidual)");
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel_native, CPU, m) { m.impl("conv_bwd", TORCH_BOX(&bmk::conv_bwd)); }
