// A whole layer of a Transformer's encoder without gradients, in one call:
//
//   attended(t) = out_proj(attention of the heads of in_proj(t))    fed(t) = linear2(activation(linear1(t)))
//   norm_first: h = x + attended(norm1(x)), y = h + fed(norm2(h));    else h = norm1(x + attended(x)), y = norm2(h + fed(h))
//
// The kernels are those of linear, attention and norm, one after the other. What lies between them is in working memory that stays from
// call to call, not in seven new tensors, and nothing returns to Python on the way, which takes longer than a short sequence does.
#include <torch/csrc/stable/library.h>

#include "../text.h"
#include "attention_read.h"
#include "attention_tasks.h"
#include "linear.h"
#include "new_tensor.h"
#include "norm.h"
#include "scratch.h"

namespace bmk {

using Optional = std::optional<Tensor>;

namespace {

struct Matrix {
  const Tensor& weight;  // [out, in]
  const Optional& bias;
};

struct Norm {
  const Optional &weight, &bias;
};

// What the steps share. Rows are tokens, contiguous.
struct Steps {
  ScalarType dtype;
  int64_t rows, width, size;  // of a number, bytes
  double eps;
  void *mean, *rstd;

  void linear(const Matrix& m, const void* in, void* out, Activation activation, const void* residual) const {
    const Tensor& w = m.weight;
    run_linear({rows, w.size(1), w.size(0), activation, 0, in, w.size(1), 1, w.const_data_ptr(), w.stride(0), w.stride(1),
                m.bias ? m.bias->const_data_ptr() : nullptr, residual, w.size(0), out, nullptr},
               dtype);
  }

  void norm(const Norm& n, const void* in, void* out) const {
    run_norm({rows, width, eps, true, in, width, nullptr, 0, n.weight ? n.weight->const_data_ptr() : nullptr,
              n.bias ? n.bias->const_data_ptr() : nullptr, out, nullptr, mean, rstd},
             dtype);
  }
};

void check_vector(const Optional& t, int64_t size, const Tensor& x, const char* name) {
  if (!t) return;
  STD_TORCH_CHECK(t->is_cpu() && has_shape(*t, {size}) && t->scalar_type() == x.scalar_type() && t->is_contiguous(), name,
                  " must be contiguous, on the CPU, of the dtype of x and of shape [", size, "], got ", shape_string(*t));
}

void check_matrix(const Tensor& t, int64_t rows, int64_t columns, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && has_shape(t, {rows, columns}) && t.scalar_type() == x.scalar_type(), name,
                  " must be on the CPU, of the dtype of x and of shape ", shape_string({rows, columns}), ", got ", shape_string(t));
}

}  // namespace

Tensor encoder_layer_fwd(const Tensor& x, const Tensor& in_proj_weight, const Optional& in_proj_bias, const Tensor& out_proj_weight,
                         const Optional& out_proj_bias, const Tensor& linear1_weight, const Optional& linear1_bias,
                         const Tensor& linear2_weight, const Optional& linear2_bias, const Optional& norm1_weight,
                         const Optional& norm1_bias, const Optional& norm2_weight, const Optional& norm2_bias, const Optional& attn_mask,
                         bool is_causal, int64_t num_heads, const Text& activation, bool norm_first, double eps) {
  CHECK_CPU(x);
  CHECK_DIM(x, 3);
  CHECK_CONTIGUOUS(x);
  CHECK_DIM(linear1_weight, 2);
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2), hidden = linear1_weight.size(0), rows = batch * tokens;
  STD_TORCH_CHECK(num_heads > 0 && width > 0 && width % num_heads == 0, "num_heads must divide the last dimension of x, ", width, ", got ",
                  num_heads);
  check_matrix(in_proj_weight, 3 * width, width, x, "in_proj_weight");
  check_matrix(out_proj_weight, width, width, x, "out_proj_weight");
  check_matrix(linear1_weight, hidden, width, x, "linear1_weight");
  check_matrix(linear2_weight, width, hidden, x, "linear2_weight");
  check_vector(in_proj_bias, 3 * width, x, "in_proj_bias");
  check_vector(linear1_bias, hidden, x, "linear1_bias");
  const std::pair<const Optional&, const char*> vectors[] = {{out_proj_bias, "out_proj_bias"}, {linear2_bias, "linear2_bias"},
                                                             {norm1_weight, "norm1_weight"},   {norm1_bias, "norm1_bias"},
                                                             {norm2_weight, "norm2_weight"},   {norm2_bias, "norm2_bias"}};
  for (const auto& [t, name] : vectors) check_vector(t, width, x, name);
  const Activation kind = parse_activation(activation);
  STD_TORCH_CHECK(kind != Activation::tanh_sigmoid && kind != Activation::leaky_relu, "activation must have no slope and be no gate");

  const ScalarType dtype = x.scalar_type();
  const int64_t size = x.element_size(), wide = dtype == ScalarType::Double ? 8 : 4;  // of statistics
  Tensor y = new_contiguous({batch, tokens, width}, dtype);
  if (rows == 0) return y;
  Scratch<char> packed(rows * 3 * width * size), attended(rows * width * size), sums(rows * width * size), between(rows * width * size),
      fed(rows * hidden * size), statistics(std::max<int64_t>(num_heads, 2) * rows * wide);
  const Steps steps{dtype, rows, width, size, eps, statistics.get(), statistics.get() + rows * wide};

  AttentionForward attention{};
  AttentionArgs& a = attention.a;
  a.batch = batch, a.heads = a.kv_heads = num_heads, a.q_len = a.k_len = tokens, a.head_dim = a.value_dim = width / num_heads;
  const int64_t row = 3 * width;
  const auto heads_at = [&](int64_t part) { return Strided{packed.get() + part * width * size, {tokens * row, a.head_dim, row, 1}}; };
  a.q = heads_at(0), a.k = heads_at(1), a.v = heads_at(2);
  a.offset = 0, a.lse_stride = tokens;
  read_mask(a, attn_mask);
  read_options(a, std::nullopt, 1 / std::sqrt(static_cast<double>(a.head_dim)), 0, 0, -1, is_causal ? 0 : -1);
  attention.out = attended.get(), attention.lse = statistics.get();

  const void* source = x.const_data_ptr();
  if (norm_first) steps.norm({norm1_weight, norm1_bias}, source, between.get());
  steps.linear({in_proj_weight, in_proj_bias}, norm_first ? between.get() : source, packed.get(), Activation::none, nullptr);
  run_attention(attention, dtype);
  steps.linear({out_proj_weight, out_proj_bias}, attended.get(), sums.get(), Activation::none, source);
  // After the norm that comes first the second half reads its result, and adds what it is the norm of; else it adds what it reads.
  if (norm_first)
    steps.norm({norm2_weight, norm2_bias}, sums.get(), between.get());
  else
    steps.norm({norm1_weight, norm1_bias}, sums.get(), between.get());
  steps.linear({linear1_weight, linear1_bias}, between.get(), fed.get(), kind, nullptr);
  if (norm_first) {
    steps.linear({linear2_weight, linear2_bias}, fed.get(), y.mutable_data_ptr(), Activation::none, sums.get());
  } else {
    steps.linear({linear2_weight, linear2_bias}, fed.get(), sums.get(), Activation::none, between.get());
    steps.norm({norm2_weight, norm2_bias}, sums.get(), y.mutable_data_ptr());
  }
  return y;
}

}  // namespace bmk

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_native, m) {
  m.def(
      "encoder_layer_fwd(Tensor x, Tensor in_proj_weight, Tensor? in_proj_bias, Tensor out_proj_weight, Tensor? out_proj_bias, "
      "Tensor linear1_weight, Tensor? linear1_bias, Tensor linear2_weight, Tensor? linear2_bias, Tensor? norm1_weight, "
      "Tensor? norm1_bias, Tensor? norm2_weight, Tensor? norm2_bias, Tensor? attn_mask, bool is_causal, int num_heads, str activation, "
      "bool norm_first, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel_native, CPU, m) { m.impl("encoder_layer_fwd", TORCH_BOX(&bmk::encoder_layer_fwd)); }
