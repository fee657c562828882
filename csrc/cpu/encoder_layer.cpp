// A whole layer of a Transformer's encoder without gradients, in one call. Formula: transformer_layer.h.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "attention.h"
#include "attention_read.h"
#include "new_tensor.h"
#include "transformer_layer.h"

namespace bmk {

Tensor encoder_layer_fwd(const Tensor& x, const Tensor& in_proj_weight, const Optional& in_proj_bias, const Tensor& out_proj_weight,
                         const Optional& out_proj_bias, const Tensor& linear1_weight, const Optional& linear1_bias,
                         const Tensor& linear2_weight, const Optional& linear2_bias, const Optional& norm1_weight,
                         const Optional& norm1_bias, const Optional& norm2_weight, const Optional& norm2_bias, const Optional& attn_mask,
                         bool is_causal, int64_t num_heads, const Text& activation, bool norm_first, double eps) {
  CHECK_CPU(x);
  CHECK_DIM(x, 3);
  CHECK_CONTIGUOUS(x);
  const int64_t batch = x.size(0), tokens = x.size(1), width = x.size(2), rows = batch * tokens, size = x.element_size();
  STD_TORCH_CHECK(num_heads > 0 && width % num_heads == 0, "num_heads must divide the last dimension of x, ", width, ", got ", num_heads);
  const LayerWeights weights{in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, linear1_weight, linear1_bias,
                             linear2_weight, linear2_bias, norm1_weight,    norm1_bias,    norm2_weight,   norm2_bias};
  weights.check(x, 3 * width, width);
  const ScalarType dtype = x.scalar_type();

  AttentionForward attention{};
  AttentionArgs& a = attention.a;
  a.batch = batch, a.heads = a.kv_heads = num_heads, a.q_len = a.k_len = tokens, a.head_dim = a.value_dim = width / num_heads;
  a.offset = 0, a.lse_stride = tokens;
  read_mask(a, attn_mask);
  read_options(a, std::nullopt, 1 / std::sqrt(static_cast<double>(a.head_dim)), 0, 0, -1, is_causal ? 0 : -1);

  Tensor y = new_contiguous({batch, tokens, width}, dtype);
  if (rows == 0) return y;
  Scratch<double> lse(num_heads * rows);
  run_layer(weights, activation, norm_first, eps, rows, width, dtype, x.const_data_ptr(), y.mutable_data_ptr(),
            [&](char* packed, char* attended) {
              const int64_t row = 3 * width;
              const auto heads = [&](int64_t part) { return Strided{packed + part * width * size, {tokens * row, a.head_dim, row, 1}}; };
              a.q = heads(0), a.k = heads(1), a.v = heads(2);
              attention.out = attended, attention.lse = lse.get();
              run_attention(attention, dtype);
            });
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
