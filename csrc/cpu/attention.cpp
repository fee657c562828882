// Native ops attention_fwd and attention_bwd on the CPU: checks, allocation, registration. The kernels, with formulas
// and who owns what, are in attention_*_kernel.h.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of _mm512_undefined_ps inside _mm512_max_ps
#define KERNEL_SOURCE "attention_kernel.h"
#include "attention_args.h"
#include "for_each_isa.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "../check.h"

namespace bmk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

Strided strided(const Tensor& t) {
  Strided out;
  out.data = t.const_data_ptr();
  for (int64_t i = 0; i < t.dim(); ++i) out.stride[i] = t.stride(i);
  return out;
}

ScalarType lse_dtype(const Tensor& q) { return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

void read_slopes(AttentionArgs& a, const std::optional<Tensor>& alibi_slopes) {
  if (!alibi_slopes) return;
  const Tensor& slopes = *alibi_slopes;
  const int64_t batch = a.batch, heads = a.heads;
  CHECK_CPU(slopes);
  CHECK_DTYPE_IS(slopes, ScalarType::Float);
  CHECK_CONTIGUOUS(slopes);
  CHECK_DIM(slopes, 2);
  const int64_t slope_batch = slopes.size(0);
  CHECK_SHAPE(slopes, slope_batch, heads);
  STD_TORCH_CHECK(slope_batch == 1 || slope_batch == batch, "alibi_slopes must have 1 or ", batch, " rows, got ", slope_batch);
  a.alibi = static_cast<const float*>(slopes.const_data_ptr());
  a.alibi_batch_stride = slope_batch == 1 ? 0 : heads;
}

AttentionArgs read_args(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& attn_mask,
                        const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& seed, double scale, double dropout_p,
                        double softcap, int64_t window_left, int64_t window_right, bool lower_right) {
  CHECK_CPU(q);
  CHECK_CPU(k);
  CHECK_CPU(v);
  CHECK_DIM(q, 4);
  CHECK_DIM(k, 4);
  CHECK_SAME_DTYPE(k, q);
  CHECK_SAME_DTYPE(v, q);
  AttentionArgs a;
  a.batch = q.size(0), a.heads = q.size(1), a.q_len = q.size(2), a.head_dim = q.size(3);
  a.kv_heads = k.size(1), a.k_len = k.size(2);
  const int64_t batch = a.batch, heads = a.heads, kv_heads = a.kv_heads, q_len = a.q_len, k_len = a.k_len, head_dim = a.head_dim;
  CHECK_SHAPE(k, batch, kv_heads, k_len, head_dim);
  CHECK_DIM(v, 4);
  a.value_dim = v.size(3);
  const int64_t value_dim = a.value_dim;
  CHECK_SHAPE(v, batch, kv_heads, k_len, value_dim);
  STD_TORCH_CHECK(kv_heads > 0 ? heads % kv_heads == 0 : heads == 0, "q must have a multiple of the heads of k, got ", heads, " and ",
                  kv_heads);
  a.q = strided(q), a.k = strided(k), a.v = strided(v);
  a.scale = scale, a.dropout_p = dropout_p, a.softcap = softcap;
  a.left = window_left, a.right = window_right;
  a.offset = lower_right ? k_len - q_len : 0;
  if (attn_mask) {
    const Tensor& mask = *attn_mask;
    CHECK_CPU(mask);
    CHECK_DIM(mask, 4);
    const int64_t full[] = {batch, heads, q_len, k_len};
    a.mask.data = mask.const_data_ptr();
    for (int64_t i = 0; i < 4; ++i) {
      STD_TORCH_CHECK(mask.size(i) == full[i] || mask.size(i) == 1, "attn_mask must broadcast to ",
                      shape_string({batch, heads, q_len, k_len}), ", got shape ", shape_string(mask));
      a.mask.stride[i] = mask.size(i) == 1 ? 0 : mask.stride(i);
    }
    switch (mask.scalar_type()) {
      case ScalarType::Bool: a.mask_type = MaskType::boolean; break;
      case ScalarType::Float: a.mask_type = MaskType::float32; break;
      case ScalarType::Double: a.mask_type = MaskType::float64; break;
      case ScalarType::BFloat16: a.mask_type = MaskType::bfloat16; break;
      default:
        STD_TORCH_CHECK(false, "attn_mask must be bool, float32, float64 or bfloat16, got scalar type ",
                        static_cast<int>(mask.scalar_type()));
    }
  }
  read_slopes(a, alibi_slopes);
  if (dropout_p > 0) {
    STD_TORCH_CHECK(seed.has_value(), "seed must be given when dropout_p is not 0");
    CHECK_CPU(*seed);
    CHECK_DTYPE_IS(*seed, ScalarType::Long);
    STD_TORCH_CHECK(seed->numel() == 1, "seed must have one element, got shape ", shape_string(*seed));
    a.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
  }
  return a;
}

}  // namespace

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& attn_mask,
                                         const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& seed, double scale,
                                         double dropout_p, double softcap, int64_t window_left, int64_t window_right, bool lower_right) {
  const AttentionArgs a =
      read_args(q, k, v, attn_mask, alibi_slopes, seed, scale, dropout_p, softcap, window_left, window_right, lower_right);
  Tensor out = torch::stable::new_empty(q, {a.batch, a.q_len, a.heads, a.value_dim});
  Tensor lse = torch::stable::new_empty(q, {a.batch, a.heads, a.q_len}, lse_dtype(q));
  DISPATCH_FLOATING(q.scalar_type(), "attention",
                    [&] { ISA_CALL(attention_forward<scalar_t>, a, out.mutable_data_ptr(), lse.mutable_data_ptr()); });
  return {torch::stable::transpose(out, 1, 2), lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd(const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& out,
                                                         const Tensor& lse, bool mask_grad, const Tensor& q, const Tensor& k,
                                                         const Tensor& v, const std::optional<Tensor>& attn_mask,
                                                         const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& seed,
                                                         double scale, double dropout_p, double softcap, int64_t window_left,
                                                         int64_t window_right, bool lower_right) {
  const AttentionArgs a =
      read_args(q, k, v, attn_mask, alibi_slopes, seed, scale, dropout_p, softcap, window_left, window_right, lower_right);
  const int64_t batch = a.batch, heads = a.heads, q_len = a.q_len, value_dim = a.value_dim;
  CHECK_CPU(grad_out);
  CHECK_CPU(out);
  CHECK_CPU(lse);
  CHECK_SAME_DTYPE(grad_out, q);
  CHECK_SAME_DTYPE(out, q);
  CHECK_DTYPE_IS(lse, lse_dtype(q));
  CHECK_SHAPE(grad_out, batch, heads, q_len, value_dim);
  CHECK_SHAPE(out, batch, heads, q_len, value_dim);
  CHECK_SHAPE(lse, batch, heads, q_len);
  AttentionGradArgs g;
  g.grad_out = strided(grad_out), g.out = strided(out), g.lse = strided(lse);
  if (grad_lse) {
    CHECK_CPU(*grad_lse);
    CHECK_DTYPE_IS(*grad_lse, lse_dtype(q));
    CHECK_SHAPE(*grad_lse, batch, heads, q_len);
    g.grad_lse = strided(*grad_lse);
  }
  Tensor dq = torch::stable::new_empty(q, {a.batch, a.q_len, a.heads, a.head_dim});
  Tensor dk = torch::stable::new_empty(q, {a.batch, a.k_len, a.kv_heads, a.head_dim});
  Tensor dv = torch::stable::new_empty(q, {a.batch, a.k_len, a.kv_heads, a.value_dim});
  g.dq = dq.mutable_data_ptr(), g.dk = dk.mutable_data_ptr(), g.dv = dv.mutable_data_ptr();
  STD_TORCH_CHECK(!mask_grad || (attn_mask && a.mask_type != MaskType::boolean), "attn_mask must be floating where its gradient is wanted");
  Tensor dmask =
      mask_grad ? torch::stable::new_empty(*attn_mask, {attn_mask->size(0), attn_mask->size(1), attn_mask->size(2), attn_mask->size(3)})
                : torch::stable::new_empty(q, {0});
  g.dmask = mask_grad ? dmask.mutable_data_ptr() : nullptr;
  for (int64_t i = 0; i < 4; ++i) g.mask_size[i] = mask_grad ? attn_mask->size(i) : 0;
  DISPATCH_FLOATING(q.scalar_type(), "attention", [&] { ISA_CALL(attention_backward<scalar_t>, a, g); });
  if (mask_grad) {
    torch::stable::zero_(dmask);
    if (a.batch * a.heads * a.q_len * a.k_len != 0)
      DISPATCH_FLOATING(q.scalar_type(), "attention", [&] { ISA_CALL(attention_dbias<scalar_t>, a, g); });
  }
  return {torch::stable::transpose(dq, 1, 2), torch::stable::transpose(dk, 1, 2), torch::stable::transpose(dv, 1, 2), dmask};
}

std::tuple<Tensor, Tensor> attention_decode_fwd(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                                const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale,
                                                const Tensor& cache_seqlens, const std::optional<Tensor>& block_table,
                                                const std::optional<Tensor>& alibi_slopes, double scale, double softcap, int64_t window_left,
                                                int64_t window_right) {
  CHECK_CPU(q);
  CHECK_CPU(k_cache);
  CHECK_CPU(v_cache);
  CHECK_DIM(q, 4);
  CHECK_DIM(k_cache, 4);
  CHECK_DIM(v_cache, 4);
  AttentionArgs a;
  a.batch = q.size(0), a.heads = q.size(1), a.q_len = q.size(2), a.head_dim = q.size(3);
  a.kv_heads = k_cache.size(1), a.k_len = 0, a.value_dim = v_cache.size(3);
  const int64_t batch = a.batch, kv_heads = a.kv_heads, page_size = k_cache.size(2), pages = k_cache.size(0);
  const int64_t head_dim = a.head_dim, value_dim = a.value_dim;
  CHECK_SHAPE(k_cache, pages, kv_heads, page_size, head_dim);
  CHECK_SHAPE(v_cache, pages, kv_heads, page_size, value_dim);
  CHECK_SAME_DTYPE(v_cache, k_cache);
  STD_TORCH_CHECK(kv_heads > 0 && a.heads % kv_heads == 0, "q must have a multiple of the heads of k_cache, got ", a.heads, " and ", kv_heads);
  STD_TORCH_CHECK(a.group_rows() <= kFewRows, "q must have at most ", kFewRows, " rows for each head of k_cache, got ", a.group_rows());
  a.q = strided(q), a.k = strided(k_cache), a.v = strided(v_cache);
  a.scale = scale, a.softcap = softcap, a.dropout_p = 0;
  a.left = window_left, a.right = window_right, a.offset = 0;
  read_slopes(a, alibi_slopes);

  AttentionCache cache;
  CHECK_CPU(cache_seqlens);
  CHECK_DTYPE_IS(cache_seqlens, ScalarType::Long);
  CHECK_CONTIGUOUS(cache_seqlens);
  CHECK_SHAPE(cache_seqlens, batch);
  cache.lengths = static_cast<const int64_t*>(cache_seqlens.const_data_ptr());
  cache.page_size = page_size;
  if (block_table) {
    CHECK_CPU(*block_table);
    CHECK_DTYPE_IS(*block_table, ScalarType::Long);
    CHECK_CONTIGUOUS(*block_table);
    STD_TORCH_CHECK(block_table->dim() == 2 && block_table->size(0) == batch, "block_table must have ", batch, " rows, got shape ",
                    shape_string(*block_table));
    cache.table = static_cast<const int64_t*>(block_table->const_data_ptr());
    cache.table_row = block_table->size(1);
  } else {
    STD_TORCH_CHECK(pages == batch, "k_cache must hold ", batch, " sequences as q does, got ", pages);
  }
  const int64_t capacity = block_table ? cache.table_row * page_size : page_size;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = cache.lengths[b];
    STD_TORCH_CHECK(length >= 0 && length <= capacity, "cache_seqlens must be within the ", capacity, " positions of k_cache, got ", length,
                    " at [", b, "]");
    for (int64_t i = 0; cache.table && i * page_size < length; ++i) {
      const int64_t page = cache.table[b * cache.table_row + i];
      STD_TORCH_CHECK(page >= 0 && page < pages, "block_table must name blocks from 0 to ", pages - 1, " of k_cache, got ", page, " at [", b,
                      ", ", i, "]");
    }
  }
  if (k_cache.scalar_type() == ScalarType::Char || k_cache.scalar_type() == ScalarType::Float8_e4m3fn) {
    cache.type = k_cache.scalar_type() == ScalarType::Char ? CacheType::int8 : CacheType::float8;
    STD_TORCH_CHECK(q.scalar_type() != ScalarType::Double, "a cache of 8 bits is for q of float32 or bfloat16");
    STD_TORCH_CHECK(k_scale && v_scale, "k_scale and v_scale must be given for a cache of 8 bits");
    for (const Tensor* each : {&*k_scale, &*v_scale}) {
      const Tensor& scale_of_key = *each;
      CHECK_CPU(scale_of_key);
      CHECK_DTYPE_IS(scale_of_key, ScalarType::Float);
      CHECK_SHAPE(scale_of_key, pages, kv_heads, page_size);
    }
    cache.k_scale = strided(*k_scale), cache.v_scale = strided(*v_scale);
  } else {
    CHECK_SAME_DTYPE(k_cache, q);
  }
  Tensor out = torch::stable::new_empty(q, {a.batch, a.q_len, a.heads, a.value_dim});
  Tensor lse = torch::stable::new_empty(q, {a.batch, a.heads, a.q_len}, lse_dtype(q));
  DISPATCH_FLOATING(q.scalar_type(), "attention_decode",
                    [&] { ISA_CALL(attention_few<scalar_t>, a, &cache, out.mutable_data_ptr(), lse.mutable_data_ptr()); });
  return {torch::stable::transpose(out, 1, 2), lse};
}

}  // namespace bmk

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_native, m) {
  m.def(
      "attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, Tensor? alibi_slopes, Tensor? seed, float scale, float dropout_p, "
      "float softcap, int window_left, int window_right, bool lower_right) -> (Tensor, Tensor)");
  m.def(
      "attention_bwd(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, bool mask_grad, Tensor q, Tensor k, Tensor v, "
      "Tensor? attn_mask, Tensor? alibi_slopes, Tensor? seed, float scale, float dropout_p, float softcap, int window_left, "
      "int window_right, bool lower_right) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "attention_decode_fwd(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? k_scale, Tensor? v_scale, Tensor cache_seqlens, "
      "Tensor? block_table, Tensor? alibi_slopes, float scale, float softcap, int window_left, int window_right) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel_native, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&bmk::attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&bmk::attention_bwd));
  m.impl("attention_decode_fwd", TORCH_BOX(&bmk::attention_decode_fwd));
}
