// From tensors to the plain structs of conv_geometry.h: what conv.cpp and conv_backward.cpp check and set up alike.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>
#include <vector>

#include "../check.h"
#include "../text.h"
#include "conv_geometry.h"
#include "isa.h"
#include "new_tensor.h"

namespace bmk {

using torch::stable::Tensor;

// [N, C, L] is [N, C, 1, L].
inline AnyImage image(const Tensor& t) {
  AnyImage out;
  out.data = const_cast<void*>(t.const_data_ptr());
  const bool flat = t.dim() == 3;
  out.n = t.stride(0), out.c = t.stride(1), out.h = flat ? 0 : t.stride(2), out.w = t.stride(flat ? 2 : 3);
  out.channels = t.size(1), out.height = flat ? 1 : t.size(2), out.width = t.size(flat ? 2 : 3);
  return out;
}
inline AnyImage image(const std::optional<Tensor>& t) { return t ? image(*t) : AnyImage{}; }

inline const void* data(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

// The description of the call that forward and backward share. `geometry` is groups, transposed, the kind of the pool (0 none, 1 max,
// 2 avg), whether the result is channels_last, then for every spatial axis stride, padding before and after, dilation and output padding,
// and where there is a pool its size, stride and padding: one list, since an operator with twenty arguments costs as much as a small
// convolution to call.
struct ConvCall {
  Conv conv;
  Window window;
  Activation activation;
  bool transposed, channels_last;
  int64_t output_channels;               // before a gated activation
  std::vector<int64_t> full, out_shape;  // shape of the convolution, and of the result

  ConvCall(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& geometry, const std::string& activation_name)
      : activation(parse_activation(activation_name)) {
    CHECK_CPU(x);
    CHECK_CPU(weight);
    STD_TORCH_CHECK(x.dim() == 3 || x.dim() == 4, "x must have 3 or 4 dimensions, got shape ", shape_string(x));
    STD_TORCH_CHECK(weight.dim() == x.dim(), "weight must have as many dimensions as x, got shape ", shape_string(weight));
    CHECK_SAME_DTYPE(weight, x);
    const size_t axes = x.dim() - 2;
    constexpr size_t kHead = 4, kAxis = 5, kPool = 3;
    STD_TORCH_CHECK(geometry.size() >= kHead && geometry[2] >= 0 && geometry[2] <= 2, "geometry: unknown pool");
    const int64_t groups = geometry[0];
    transposed = geometry[1] != 0, channels_last = geometry[3] != 0;
    window.kind = geometry[2] == 1 ? Pooling::max : geometry[2] == 2 ? Pooling::avg : Pooling::none;
    const size_t per_axis = kAxis + (window.kind == Pooling::none ? 0 : kPool);
    STD_TORCH_CHECK(geometry.size() == kHead + axes * per_axis, "geometry must have ", per_axis, " entries per spatial axis");
    STD_TORCH_CHECK(groups > 0, "groups must be positive, got ", groups);
    const int64_t in_channels = x.size(1);
    output_channels = transposed ? weight.size(1) * groups : weight.size(0);
    STD_TORCH_CHECK(in_channels % groups == 0 && output_channels % groups == 0 &&
                        weight.size(transposed ? 0 : 1) == (transposed ? in_channels : in_channels / groups),
                    "weight must fit x ", shape_string(x), " with groups=", groups, ", got shape ", shape_string(weight));
    conv = {x.size(0),          groups, transposed ? output_channels : in_channels, transposed ? in_channels : output_channels,
            {1, 1, 1, 1, 1, 0}, {}};
    full = {x.size(0), output_channels};
    const bool gated = activation == Activation::tanh_sigmoid;
    STD_TORCH_CHECK(!gated || (groups == 1 && output_channels % 2 == 0), "tanh_sigmoid needs groups=1 and an even number of channels");
    out_shape = {x.size(0), gated ? output_channels / 2 : output_channels};
    for (size_t i = 0; i < axes; ++i) {
      const int64_t* of_axis = geometry.data() + kHead + i * per_axis;
      const int64_t pad_after = of_axis[2], output_padding = of_axis[4];
      Axis axis{0, 0, weight.size(i + 2), of_axis[0], of_axis[3], of_axis[1]};
      STD_TORCH_CHECK(axis.stride > 0 && axis.dilation > 0 && axis.pad >= 0 && pad_after >= 0 && axis.taps > 0,
                      "conv: kernel, stride and dilation must be positive and padding not negative");
      const int64_t size = x.size(i + 2), reach = (axis.taps - 1) * axis.dilation, pads = axis.pad + pad_after;
      const int64_t out =
          transposed ? (size - 1) * axis.stride - pads + reach + output_padding + 1 : (size + pads - reach - 1) / axis.stride + 1;
      STD_TORCH_CHECK((transposed || size + pads > reach) && out >= 0, "x is smaller than the kernel, got shape ", shape_string(x));
      axis.wide = transposed ? out : size, axis.narrow = transposed ? size : out;
      (i + 1 == axes ? conv.w : conv.h) = axis;
      full.push_back(out);
      if (window.kind == Pooling::none) {
        out_shape.push_back(out);
        continue;
      }
      const int64_t pool_size = of_axis[kAxis], pool_stride = of_axis[kAxis + 1], pool_pad = of_axis[kAxis + 2];
      STD_TORCH_CHECK(pool_size > 0 && pool_stride > 0 && pool_size <= out + 2 * pool_pad,
                      "pool must be positive and fit the output ", out, ", got ", pool_size);
      STD_TORCH_CHECK(pool_pad == 0 || (pool_pad > 0 && 2 * pool_pad <= pool_size && window.kind == Pooling::max),
                      "pool padding is for a max-pool, and at most half of its window, got ", pool_pad);
      (i + 1 == axes ? window.w : window.h) = pool_size;
      (i + 1 == axes ? window.stride_w : window.stride_h) = pool_stride;
      (i + 1 == axes ? window.pad_w : window.pad_h) = pool_pad;
      out_shape.push_back((out + 2 * pool_pad - pool_size) / pool_stride + 1);
    }
    STD_TORCH_CHECK(window.h * window.w < kNoGradient, "pool: a window holds at most ", kNoGradient - 1, " elements");
  }

  // Where the activation's derivative needs the value before it: the shape of `pre` (else empty). A max-pool keeps only the
  // chosen elements; the others are needed at every position, and so is the ReLU under an average.
  bool saves_pre() const {
    if (activation == Activation::none) return false;
    const bool from_output = activation != Activation::gelu && activation != Activation::silu && activation != Activation::tanh_sigmoid;
    return !from_output || window.kind == Pooling::avg;
  }
  std::vector<int64_t> pre_shape() const {
    std::vector<int64_t> shape = window.kind == Pooling::max ? out_shape : full;
    shape[1] = output_channels;
    return shape;
  }

  void check_channels(const std::optional<Tensor>& t, const Tensor& x, const char* name) const {
    if (!t) return;
    STD_TORCH_CHECK(
        t->is_cpu() && t->scalar_type() == x.scalar_type() && t->dim() == 1 && t->size(0) == output_channels && t->is_contiguous(), name,
        " must be a contiguous CPU tensor [", output_channels, "] of the dtype of x, got shape ", shape_string(*t));
  }
  static void check_shape(const Tensor& t, const std::vector<int64_t>& shape, const char* name) {
    bool same = t.is_cpu() && t.dim() == static_cast<int64_t>(shape.size());
    for (size_t i = 0; same && i < shape.size(); ++i) same = t.size(i) == shape[i];
    STD_TORCH_CHECK(same, name, " does not fit the call, got shape ", shape_string(t));
  }
};

}  // namespace bmk
