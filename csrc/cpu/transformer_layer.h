// What a whole layer of a Transformer is made of, in one call and without gradients:
//
//   attended(t) = out_proj(attention of in_proj(t))    fed(t) = linear2(activation(linear1(t)))
//   norm_first: h = x + attended(norm1(x)), y = h + fed(norm2(h));    else h = norm1(x + attended(x)), y = norm2(h + fed(h))
//
// The kernels are those of linear, attention and norm, one after the other. What lies between them is in working memory that stays from
// call to call, not in seven new tensors, and nothing returns to Python on the way, which takes longer than a short sequence does.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <utility>

#include "../check.h"
#include "../text.h"
#include "linear.h"
#include "norm.h"
#include "scratch.h"

namespace bmk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// gelu by its formula with tanh, in place.
void gelu_tanh(void* numbers, int64_t count, ScalarType dtype);

// In the order of the operators' arguments.
struct LayerWeights {
  const Tensor& in_proj_weight;  // [queries, keys and values, E]
  const Optional& in_proj_bias;
  const Tensor& out_proj_weight;  // [E, values of all heads]
  const Optional& out_proj_bias;
  const Tensor& linear1_weight;  // [F, E]
  const Optional& linear1_bias;
  const Tensor& linear2_weight;  // [E, F]
  const Optional& linear2_bias;
  const Optional &norm1_weight, &norm1_bias, &norm2_weight, &norm2_bias;  // [E]

  // For rows of x, `packed` values of in_proj and `inner` of attention.
  void check(const Tensor& x, int64_t packed, int64_t inner) const {
    CHECK_DIM(linear1_weight, 2);
    const int64_t width = x.size(x.dim() - 1), hidden = linear1_weight.size(0);
    STD_TORCH_CHECK(width > 0, "x must have a last dimension");
    const auto matrix = [&](const Tensor& t, int64_t rows, int64_t columns, const char* name) {
      STD_TORCH_CHECK(t.is_cpu() && has_shape(t, {rows, columns}) && t.scalar_type() == x.scalar_type(), name,
                      " must be on the CPU, of the dtype of x and of shape ", shape_string({rows, columns}), ", got ", shape_string(t));
    };
    const auto vector = [&](const Optional& t, int64_t size, const char* name) {
      STD_TORCH_CHECK(!t || (t->is_cpu() && has_shape(*t, {size}) && t->scalar_type() == x.scalar_type() && t->is_contiguous()), name,
                      " must be contiguous, on the CPU, of the dtype of x and of shape [", size, "], got ", t ? shape_string(*t) : "");
    };
    matrix(in_proj_weight, packed, width, "in_proj_weight");
    matrix(out_proj_weight, width, inner, "out_proj_weight");
    matrix(linear1_weight, hidden, width, "linear1_weight");
    matrix(linear2_weight, width, hidden, "linear2_weight");
    vector(in_proj_bias, packed, "in_proj_bias");
    vector(linear1_bias, hidden, "linear1_bias");
    const std::pair<const Optional&, const char*> others[] = {{out_proj_bias, "out_proj_bias"}, {linear2_bias, "linear2_bias"},
                                                              {norm1_weight, "norm1_weight"},   {norm1_bias, "norm1_bias"},
                                                              {norm2_weight, "norm2_weight"},   {norm2_bias, "norm2_bias"}};
    for (const auto& [t, name] : others) vector(t, width, name);
  }
};

// y [rows, E] of x; attend(packed, attended) fills [rows, inner] from in_proj's values. All rows lie side by side.
template <class Attend>
void run_layer(const LayerWeights& w, const Text& activation, bool norm_first, double eps, int64_t rows, int64_t width, ScalarType dtype,
               const void* x, void* y, const Attend& attend) {
  const bool by_tanh = activation == "gelu_tanh";
  const Activation kind = by_tanh ? Activation::none : parse_activation(activation);
  STD_TORCH_CHECK(kind != Activation::tanh_sigmoid && kind != Activation::leaky_relu, "activation must have no slope and be no gate");
  const int64_t size = w.in_proj_weight.element_size(), wide = dtype == ScalarType::Double ? 8 : 4;  // of statistics
  const int64_t hidden = w.linear1_weight.size(0), inner = w.out_proj_weight.size(1);
  Scratch<char> packed(rows * w.in_proj_weight.size(0) * size), attended(rows * inner * size), sums(rows * width * size),
      between(rows * width * size), fed(rows * hidden * size), statistics(2 * rows * wide);
  const auto data = [](const Optional& t) { return t ? t->const_data_ptr() : nullptr; };
  const auto linear = [&](const Tensor& weight, const Optional& bias, const void* in, void* out, Activation a, const void* residual) {
    const int64_t from = weight.size(1), to = weight.size(0);
    run_linear({rows, from, to, a, 0, in, from, 1, weight.const_data_ptr(), weight.stride(0), weight.stride(1), data(bias), residual, to,
                out, nullptr},
               dtype);
  };
  const auto norm = [&](const Optional& weight, const Optional& bias, const void* in, void* out) {
    run_norm({rows, width, eps, true, in, width, nullptr, 0, data(weight), data(bias), out, nullptr, statistics.get(),
              statistics.get() + rows * wide},
             dtype);
  };

  if (norm_first) norm(w.norm1_weight, w.norm1_bias, x, between);
  linear(w.in_proj_weight, w.in_proj_bias, norm_first ? between.get() : x, packed, Activation::none, nullptr);
  attend(packed.get(), attended.get());
  linear(w.out_proj_weight, w.out_proj_bias, attended, sums, Activation::none, x);
  // After the norm that comes first the second half adds what it is the norm of; else it adds what it reads.
  if (norm_first)
    norm(w.norm2_weight, w.norm2_bias, sums, between);
  else
    norm(w.norm1_weight, w.norm1_bias, sums, between);
  linear(w.linear1_weight, w.linear1_bias, between, fed, kind, nullptr);
  if (by_tanh) gelu_tanh(fed, rows * hidden, dtype);
  if (norm_first) {
    linear(w.linear2_weight, w.linear2_bias, fed, y, Activation::none, sums);
  } else {
    linear(w.linear2_weight, w.linear2_bias, fed, sums, Activation::none, between);
    norm(w.norm2_weight, w.norm2_bias, sums, y);
  }
}

}  // namespace bmk
