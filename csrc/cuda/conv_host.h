// What the launchers of convolution kernels share. All tensors are images [N, C, H, W], all lists have an entry for h and one for w.
#pragma once

#include <initializer_list>
#include <string>
#include <vector>

#include "conv_tail.cuh"
#include "host.h"

namespace bmk {

constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1, kMostBlocksYZ = 65535;  // of a grid: in its first dimension, in the others

// A CUDA image of this dtype whose sizes fit in 32 bits; sizes of -1 may be any.
inline void check_image(const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> sizes, const char* name) {
  STD_TORCH_CHECK(t.is_cuda() && t.dim() == 4 && t.scalar_type() == dtype, name,
                  " must be a CUDA tensor of 4 dimensions and of scalar type ", static_cast<int>(dtype), ", got ", shape_string(t), " of ",
                  static_cast<int>(t.scalar_type()));
  int64_t i = 0;
  for (int64_t size : sizes) {
    STD_TORCH_CHECK((size < 0 || t.size(i) == size) && t.size(i) <= kMostBlocks, name, " must have shape ", shape_string(sizes), ", got ",
                    shape_string(t));
    ++i;
  }
}

// Sums that several blocks leave: [splits, rows, columns].
inline void check_partial(const Tensor& t, int64_t rows, int64_t columns) {
  CHECK_CUDA(t);
  CHECK_CONTIGUOUS(t);
  CHECK_DTYPE_IS(t, ScalarType::Float);
  STD_TORCH_CHECK(t.dim() == 3 && t.size(1) == rows && t.size(2) == columns && t.size(0) <= kMostBlocks,
                  "partial must have shape [splits, ", rows, ", ", columns, "], got ", shape_string(t));
}

inline ImageStrides strides_of_image(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }
inline ImageStrides strides_of_image(const std::optional<Tensor>& t) { return t ? strides_of_image(*t) : ImageStrides{}; }

// Whether every vector of `elements` channels lies at a multiple of its size.
inline bool has_vectors(const Tensor& t, int64_t elements) {
  bool aligned = t.stride(1) == 1 && t.size(1) % elements == 0 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t i = 0; i < t.dim(); ++i) aligned = aligned && (i == 1 || t.size(i) == 1 || t.stride(i) % elements == 0);
  return aligned;
}

inline int size_of(const Tensor& t, int64_t axis) { return static_cast<int>(t.size(axis)); }

struct Pair {
  int h, w;
};
inline Pair pair_of(const std::vector<int64_t>& list, const char* name, int64_t least) {
  STD_TORCH_CHECK(list.size() == 2 && list[0] >= least && list[1] >= least && list[0] < 65536 && list[1] < 65536, name,
                  " must have 2 entries from ", least, " to 65535");
  return {static_cast<int>(list[0]), static_cast<int>(list[1])};
}

// padding is that before the first element; that of a gradient may be negative.
inline ConvWindow window_of(Pair kernel, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                            const std::vector<int64_t>& dilation) {
  const Pair strides = pair_of(stride, "stride", 1), pads = pair_of(padding, "padding", -65535), steps = pair_of(dilation, "dilation", 1);
  return {kernel.h, kernel.w, strides.h, strides.w, pads.h, pads.w, steps.h, steps.w};
}

// `sizes`: window, stride and padding of the pool, two entries each.
inline PoolWindow pool_of(const std::string& kind, const std::vector<int64_t>& sizes) {
  STD_TORCH_CHECK(kind == "none" || kind == "max" || kind == "avg", "pool: unknown name ", kind);
  STD_TORCH_CHECK(sizes.size() == 6, "pool must have 6 sizes, got ", sizes.size());
  const Pair window = pair_of({sizes[0], sizes[1]}, "pool size", 1), steps = pair_of({sizes[2], sizes[3]}, "pool stride", 1);
  const Pair rim = pair_of({sizes[4], sizes[5]}, "pool padding", 0);
  return {kind == "none" ? Pool::none : kind == "max" ? Pool::max : Pool::avg, window.h, window.w, steps.h, steps.w, rim.h, rim.w};
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

// What conv_tail.cuh reads of a forward pass that gave `full_h` x `full_w` outputs before its pool.
template <class T>
ConvTail<T> tail_of(const Tensor& grad, const std::optional<Tensor>& out, const std::optional<Tensor>& index,
                    const std::optional<Tensor>& pre, const std::string& activation, double slope, const PoolWindow& pool, Pair full) {
  const ScalarType dtype = grad.scalar_type();
  check_image(grad, dtype, {-1, -1, -1, -1}, "grad");
  const bool before_pool = pool.kind != Pool::max;
  if (out) check_image(*out, dtype, {grad.size(0), grad.size(1), grad.size(2), grad.size(3)}, "out");
  if (index) check_image(*index, ScalarType::Byte, {grad.size(0), grad.size(1), grad.size(2), grad.size(3)}, "index");
  if (pre)
    check_image(*pre, dtype, {grad.size(0), grad.size(1), before_pool ? full.h : grad.size(2), before_pool ? full.w : grad.size(3)}, "pre");
  const Activation kind = parse_activation(activation);
  const bool from_z = kind == Activation::gelu || kind == Activation::silu || (kind != Activation::none && pool.kind == Pool::avg);
  const bool from_out = !from_z && kind != Activation::none && !(kind == Activation::relu && pool.kind == Pool::max);
  STD_TORCH_CHECK(index.has_value() || pool.kind != Pool::max, "index must be given after a max-pool");
  STD_TORCH_CHECK((pre.has_value() || !from_z) && (out.has_value() || !from_out), "pre or out must be given for the derivative of ",
                  activation);
  return {data<T>(grad),
          data<T>(out),
          data<uint8_t>(index),
          data<T>(pre),
          strides_of_image(grad),
          strides_of_image(out),
          strides_of_image(index),
          strides_of_image(pre),
          kind,
          static_cast<float>(slope),
          pool,
          size_of(grad, 0),
          size_of(grad, 1),
          full.h,
          full.w,
          size_of(grad, 2),
          size_of(grad, 3)};
}

}  // namespace bmk
