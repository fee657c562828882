// What the launchers of convolution kernels share.
#pragma once

#include <string>

#include "conv_epilogue.cuh"
#include "host.h"

namespace bmk {

// A sequence [N, C, L] is an image [N, C, 1, L].
inline ImageStrides strides_of_image(const Tensor& t) {
  const bool image = t.dim() == 4;
  return {t.stride(0), t.stride(1), image ? t.stride(2) : 0, t.stride(image ? 3 : 2)};
}

inline Activation parse_activation(const std::string& name) {
  static const char* const kNames[] = {"none", "relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu"};
  for (int i = 0; i < 7; ++i)
    if (name == kNames[i]) return static_cast<Activation>(i);
  STD_TORCH_CHECK(false, "activation: unknown name ", name);
}

template <class T>
ConvEpilogue<T> epilogue_of(const std::optional<Tensor>& bias, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                            int64_t channels, ScalarType dtype, const std::string& activation, double slope) {
  for (const std::optional<Tensor>* t : {&bias, &scale, &shift})
    if (*t)
      STD_TORCH_CHECK((*t)->is_cuda() && (*t)->is_contiguous() && (*t)->scalar_type() == dtype && has_shape(**t, {channels}),
                      "bias, scale and shift must be contiguous CUDA tensors ", shape_string({channels}), " of the dtype of x, got ",
                      shape_string(**t));
  return {data<T>(bias), data<T>(scale), data<T>(shift), parse_activation(activation), static_cast<float>(slope)};
}

}  // namespace bmk
