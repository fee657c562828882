// One token more through a whole layer of a Transformer's decoder, against caches of keys and values, in one call. Formula:
// transformer_layer.h, with the attention of one query. Floor: every weight and every key and value of the sequences read once.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>

#include "attention.h"
#include "attention_read.h"
#include "new_tensor.h"
#include "transformer_layer.h"

namespace bmk {

Tensor decoder_step_fwd(const Tensor& x, Tensor k_cache, Tensor v_cache, const Tensor& lengths, const Tensor& in_proj_weight,
                        const Optional& in_proj_bias, const Tensor& out_proj_weight, const Optional& out_proj_bias,
                        const Tensor& linear1_weight, const Optional& linear1_bias, const Tensor& linear2_weight,
                        const Optional& linear2_bias, const Optional& norm1_weight, const Optional& norm1_bias,
                        const Optional& norm2_weight, const Optional& norm2_bias, int64_t num_heads, const Text& activation,
                        bool norm_first, double eps) {
  CHECK_CPU(x);
  CHECK_DIM(x, 2);
  CHECK_CONTIGUOUS(x);
  CHECK_CPU(k_cache);
  CHECK_CPU(v_cache);
  CHECK_DIM(k_cache, 4);
  CHECK_SAME_DTYPE(k_cache, x);
  CHECK_SAME_DTYPE(v_cache, x);
  const int64_t batch = x.size(0), width = x.size(1), size = x.element_size();
  const int64_t kv_heads = k_cache.size(1), capacity = k_cache.size(2), head_dim = k_cache.size(3);
  CHECK_SHAPE(k_cache, batch, kv_heads, capacity, head_dim);
  CHECK_SHAPE(v_cache, batch, kv_heads, capacity, head_dim);
  STD_TORCH_CHECK(kv_heads > 0 && num_heads > 0 && num_heads % kv_heads == 0, "num_heads must be a multiple of the heads of k_cache, ",
                  kv_heads, ", got ", num_heads);
  STD_TORCH_CHECK(num_heads / kv_heads <= kFewRows, "num_heads must be at most ", kFewRows, " times the heads of k_cache, got ", num_heads,
                  " and ", kv_heads);
  STD_TORCH_CHECK(head_dim == 0 || (k_cache.stride(3) == 1 && v_cache.stride(3) == 1), "the caches must have adjacent last dimensions");
  const int64_t packed_width = (num_heads + 2 * kv_heads) * head_dim;
  const LayerWeights weights{in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, linear1_weight, linear1_bias,
                             linear2_weight, linear2_bias, norm1_weight,    norm1_bias,    norm2_weight,   norm2_bias};
  weights.check(x, packed_width, num_heads * head_dim);
  CHECK_CPU(lengths);
  CHECK_DTYPE_IS(lengths, ScalarType::Long);
  CHECK_CONTIGUOUS(lengths);
  CHECK_SHAPE(lengths, batch);
  const auto* before = static_cast<const int64_t*>(lengths.const_data_ptr());
  Scratch<int64_t> with_this(batch);
  for (int64_t b = 0; b < batch; ++b) {
    STD_TORCH_CHECK(before[b] >= 0 && before[b] < capacity, "lengths must leave a place of the ", capacity, " of k_cache, got ", before[b],
                    " at [", b, "]");
    with_this[b] = before[b] + 1;
  }
  const ScalarType dtype = x.scalar_type();
  Tensor y = new_contiguous({batch, width}, dtype);
  if (batch == 0) return y;

  AttentionArgs a;
  a.batch = batch, a.heads = num_heads, a.kv_heads = kv_heads, a.q_len = 1, a.k_len = 0, a.head_dim = a.value_dim = head_dim;
  a.offset = 0, a.lse_stride = 1;
  a.k = strided(k_cache), a.v = strided(v_cache);
  read_options(a, std::nullopt, 1 / std::sqrt(static_cast<double>(head_dim)), 0, 0, -1, -1);
  AttentionCache cache;
  cache.lengths = with_this, cache.page_size = capacity;
  Scratch<double> lse(num_heads * batch);
  const auto keep = [&](const Tensor& t, const char* numbers) {
    auto* data = static_cast<char*>(t.mutable_data_ptr());
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t h = 0; h < kv_heads; ++h)
        std::memcpy(data + (b * t.stride(0) + h * t.stride(1) + before[b] * t.stride(2)) * size,
                    numbers + (b * packed_width + h * head_dim) * size, head_dim * size);
  };
  run_layer(weights, activation, norm_first, eps, batch, width, dtype, x.const_data_ptr(), y.mutable_data_ptr(),
            [&](char* packed, char* attended) {
              const char* keys = packed + num_heads * head_dim * size;
              keep(k_cache, keys), keep(v_cache, keys + kv_heads * head_dim * size);
              a.q = {packed, {packed_width, head_dim, packed_width, 1}};
              run_decode(a, cache, attended, lse, dtype);
            });
  return y;
}

}  // namespace bmk

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_native, m) {
  m.def(
      "decoder_step_fwd(Tensor x, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor lengths, Tensor in_proj_weight, Tensor? in_proj_bias, "
      "Tensor out_proj_weight, Tensor? out_proj_bias, Tensor linear1_weight, Tensor? linear1_bias, Tensor linear2_weight, "
      "Tensor? linear2_bias, Tensor? norm1_weight, Tensor? norm1_bias, Tensor? norm2_weight, Tensor? norm2_bias, int num_heads, "
      "str activation, bool norm_first, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel_native, CPU, m) { m.impl("decoder_step_fwd", TORCH_BOX(&bmk::decoder_step_fwd)); }
