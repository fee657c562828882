// Argument checks of the native ops. Each message names the argument and the value it had.
// The contract (shapes, dtypes, meaning) is checked once in Python; what is checked here is what memory safety needs.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <sstream>
#include <string>

namespace bmk {

inline std::string shape_string(const torch::stable::Tensor& t) {
  std::ostringstream out;
  out << '[';
  for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.size(i);
  out << ']';
  return out.str();
}

inline std::string shape_string(std::initializer_list<int64_t> sizes) {
  std::ostringstream out;
  out << '[';
  const char* separator = "";
  for (int64_t size : sizes) out << separator << size, separator = ", ";
  out << ']';
  return out.str();
}

inline bool has_shape(const torch::stable::Tensor& t, std::initializer_list<int64_t> sizes) {
  if (t.dim() != static_cast<int64_t>(sizes.size())) return false;
  int64_t i = 0;
  for (int64_t size : sizes)
    if (t.size(i++) != size) return false;
  return true;
}

}  // namespace bmk

#define CHECK_DIM(t, n) STD_TORCH_CHECK((t).dim() == (n), #t " must have " #n " dimensions, got shape ", bmk::shape_string(t))

#define CHECK_SHAPE(t, ...)                                                                                                              \
  STD_TORCH_CHECK(bmk::has_shape(t, {__VA_ARGS__}),                                                                                      \
                  #t " must have shape (" #__VA_ARGS__ ") = ", bmk::shape_string(std::initializer_list<int64_t>{__VA_ARGS__}), ", got ", \
                  bmk::shape_string(t))

#define CHECK_DTYPE_IS(t, dtype) \
  STD_TORCH_CHECK((t).scalar_type() == (dtype), #t " must have the dtype of its op, got scalar type ", static_cast<int>((t).scalar_type()))

#define CHECK_SAME_DTYPE(t, like)                                                                                       \
  STD_TORCH_CHECK((t).scalar_type() == (like).scalar_type(), #t " must have the dtype of " #like ", got scalar types ", \
                  static_cast<int>((t).scalar_type()), " and ", static_cast<int>((like).scalar_type()))

#define CHECK_CPU(t) STD_TORCH_CHECK((t).is_cpu(), #t " must be a CPU tensor")

#define CHECK_CONTIGUOUS(t) STD_TORCH_CHECK((t).is_contiguous(), #t " must be contiguous, got shape ", bmk::shape_string(t))

// One case of a DISPATCH macro, and the macro around its cases: runs `...` (a lambda) with `scalar_t` set to the storage type of a dtype.
#define DISPATCH_CASE(scalar_type, type, ...)        \
  case torch::headeronly::ScalarType::scalar_type: { \
    using scalar_t = type;                           \
    return __VA_ARGS__();                            \
  }
#define DISPATCH_CASES(dtype, name, taken, ...)                                                         \
  [&] {                                                                                                 \
    switch (dtype) {                                                                                    \
      __VA_ARGS__                                                                                       \
      default: STD_TORCH_CHECK(false, name ": ", taken, ", got scalar type ", static_cast<int>(dtype)); \
    }                                                                                                   \
  }()

// For a floating dtype the CPU kernels compute in.
#define DISPATCH_FLOATING(dtype, name, ...)                                                          \
  DISPATCH_CASES(dtype, name, "the cpu kernels take float32, float64 and bfloat16",                  \
                 DISPATCH_CASE(Float, float, __VA_ARGS__) DISPATCH_CASE(Double, double, __VA_ARGS__) \
                     DISPATCH_CASE(BFloat16, bmk::bfloat16, __VA_ARGS__))
