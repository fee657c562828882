// New CPU tensors, uninitialised. torch::stable::new_empty looks its operator up by name and boxes its arguments on every call, which
// takes 2 us; a small convolution takes as long.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace bmk {

inline torch::stable::Tensor new_strided(int64_t dims, const int64_t* sizes, const int64_t* strides,
                                         torch::headeronly::ScalarType dtype) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, to<int32_t>(from(dtype)), aoti_torch_device_type_cpu(), 0, &handle));
  return torch::stable::Tensor(handle);
}

inline constexpr int64_t kMostDims = 8;

// Contiguous.
inline torch::stable::Tensor new_contiguous(torch::headeronly::IntHeaderOnlyArrayRef sizes, torch::headeronly::ScalarType dtype) {
  int64_t strides[kMostDims], step = 1;
  for (int64_t i = static_cast<int64_t>(sizes.size()) - 1; i >= 0; --i) strides[i] = step, step *= sizes[i] > 0 ? sizes[i] : 1;
  return new_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides, dtype);
}

// Contiguous, of the sizes and dtype of t.
inline torch::stable::Tensor new_like(const torch::stable::Tensor& t) {
  STD_TORCH_CHECK(t.dim() <= kMostDims, "a tensor must have at most ", kMostDims, " dimensions, got ", t.dim());
  int64_t sizes[kMostDims];
  for (int64_t i = 0; i < t.dim(); ++i) sizes[i] = t.size(i);
  return new_contiguous({sizes, static_cast<size_t>(t.dim())}, t.scalar_type());
}

// [N, C, ..] with its channels innermost in memory.
inline torch::stable::Tensor new_channels_last(torch::headeronly::IntHeaderOnlyArrayRef sizes, torch::headeronly::ScalarType dtype) {
  int64_t strides[kMostDims], step = 1;
  const auto place = [&](int64_t i) { strides[i] = step, step *= sizes[i] > 0 ? sizes[i] : 1; };
  place(1);
  for (int64_t i = static_cast<int64_t>(sizes.size()) - 1; i > 1; --i) place(i);
  place(0);
  return new_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides, dtype);
}

}  // namespace bmk
