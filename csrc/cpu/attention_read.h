// What the arguments of the native attention ops say, checked.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <type_traits>

#include "../check.h"
#include "attention_args.h"

namespace bmk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Strided strided(const Tensor& t) {
  Strided out;
  out.data = t.const_data_ptr();
  for (int64_t i = 0; i < t.dim(); ++i) out.stride[i] = t.stride(i);
  return out;
}

inline void read_slopes(AttentionArgs& a, const std::optional<Tensor>& alibi_slopes) {
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

inline void read_options(AttentionArgs& a, const std::optional<Tensor>& seed, double scale, double dropout_p, double softcap,
                         int64_t window_left, int64_t window_right) {
  a.scale = scale, a.dropout_p = dropout_p, a.softcap = softcap;
  a.left = window_left, a.right = window_right;
  if (dropout_p > 0) {
    STD_TORCH_CHECK(seed.has_value(), "seed must be given when dropout_p is not 0");
    CHECK_CPU(*seed);
    CHECK_DTYPE_IS(*seed, ScalarType::Long);
    STD_TORCH_CHECK(seed->numel() == 1, "seed must have one element, got shape ", shape_string(*seed));
    a.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
  }
}

// Once the sizes are known.
inline void read_mask(AttentionArgs& a, const std::optional<Tensor>& attn_mask) {
  if (!attn_mask) return;
  const Tensor& mask = *attn_mask;
  CHECK_CPU(mask);
  CHECK_DIM(mask, 4);
  const int64_t full[] = {a.batch, a.heads, a.q_len, a.k_len};
  a.mask.data = mask.const_data_ptr();
  for (int64_t i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(mask.size(i) == full[i] || mask.size(i) == 1, "attn_mask must broadcast to ",
                    shape_string({a.batch, a.heads, a.q_len, a.k_len}), ", got shape ", shape_string(mask));
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

inline AttentionArgs read_args(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& attn_mask,
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
  a.offset = lower_right ? k_len - q_len : 0;
  a.lse_stride = q_len;
  read_mask(a, attn_mask);
  read_slopes(a, alibi_slopes);
  read_options(a, seed, scale, dropout_p, softcap, window_left, window_right);
  return a;
}

// Tokens [tokens, H, D] as one batch entry [H, tokens, D]; of [H, tokens] likewise, with one column.
inline Strided strided_tokens(const Tensor& t) {
  Strided out;
  out.data = t.const_data_ptr();
  out.stride[1] = t.stride(1), out.stride[2] = t.stride(0), out.stride[3] = t.stride(2);
  return out;
}

inline Strided strided_lse(const Tensor& t) {
  Strided out;
  out.data = t.const_data_ptr();
  out.stride[1] = t.stride(0), out.stride[2] = t.stride(1);
  return out;
}

template <class T>
T* advanced(T* data, int64_t elements, int64_t element_size) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return static_cast<Byte*>(data) + elements * element_size;
}

inline Strided from_token(Strided t, int64_t token, int64_t element_size) {
  t.data = advanced(t.data, token * t.stride[2], element_size);
  return t;
}

// Where the sequences end, checked.
inline const int64_t* read_ends(const char* name, const Tensor& cu_seqlens, int64_t sequences, int64_t total, int64_t longest) {
  CHECK_CPU(cu_seqlens);
  CHECK_DTYPE_IS(cu_seqlens, ScalarType::Long);
  CHECK_CONTIGUOUS(cu_seqlens);
  const int64_t ends_count = sequences + 1;
  CHECK_SHAPE(cu_seqlens, ends_count);
  const auto* ends = static_cast<const int64_t*>(cu_seqlens.const_data_ptr());
  for (int64_t b = 0; b <= sequences; ++b) {
    const bool fits = (b > 0 ? ends[b] >= ends[b - 1] : ends[b] == 0) && (b < sequences || ends[b] == total);
    STD_TORCH_CHECK(fits, "cu_seqlens_", name, " must rise from 0 to the ", total, " tokens, got ", ends[b], " at [", b, "]");
  }
  for (int64_t b = 0; b < sequences; ++b)
    STD_TORCH_CHECK(ends[b + 1] - ends[b] <= longest, "max_seqlen_", name, " must be at least the longest sequence, got ", longest,
                    " and one of ", ends[b + 1] - ends[b]);
  return ends;
}

// What the sequences of attention_varlen have in common, and where each of them lies.
struct Sequences {
  AttentionArgs all;  // of all tokens, as if they were one sequence
  int64_t count, element_size;
  const int64_t *q_ends, *k_ends;
  bool lower_right;

  AttentionArgs at(int64_t b) const {
    AttentionArgs a = all;
    a.q_len = q_ends[b + 1] - q_ends[b], a.k_len = k_ends[b + 1] - k_ends[b];
    a.q = from_token(all.q, q_ends[b], element_size);
    a.k = from_token(all.k, k_ends[b], element_size), a.v = from_token(all.v, k_ends[b], element_size);
    a.offset = lower_right ? a.k_len - a.q_len : 0;
    a.first_batch = b;
    if (a.alibi) a.alibi += b * a.alibi_batch_stride;
    return a;
  }
};

inline Sequences read_sequences(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& seed, int64_t max_seqlen_q,
                                int64_t max_seqlen_k, double scale, double dropout_p, double softcap, int64_t window_left,
                                int64_t window_right, bool lower_right) {
  CHECK_CPU(q);
  CHECK_CPU(k);
  CHECK_CPU(v);
  CHECK_DIM(q, 3);
  CHECK_DIM(k, 3);
  CHECK_DIM(v, 3);
  CHECK_SAME_DTYPE(k, q);
  CHECK_SAME_DTYPE(v, q);
  CHECK_DIM(cu_seqlens_q, 1);
  Sequences s;
  AttentionArgs& a = s.all;
  a.batch = s.count = cu_seqlens_q.size(0) - 1;  // read_slopes asks for so many
  STD_TORCH_CHECK(s.count >= 0, "cu_seqlens_q must have an element more than there are sequences, got none");
  a.q_len = q.size(0), a.heads = q.size(1), a.head_dim = q.size(2);
  a.k_len = k.size(0), a.kv_heads = k.size(1), a.value_dim = v.size(2);
  const int64_t kv_heads = a.kv_heads, k_len = a.k_len, head_dim = a.head_dim, value_dim = a.value_dim;
  CHECK_SHAPE(k, k_len, kv_heads, head_dim);
  CHECK_SHAPE(v, k_len, kv_heads, value_dim);
  STD_TORCH_CHECK(kv_heads > 0 ? a.heads % kv_heads == 0 : a.heads == 0, "q must have a multiple of the heads of k, got ", a.heads, " and ",
                  kv_heads);
  a.q = strided_tokens(q), a.k = strided_tokens(k), a.v = strided_tokens(v);
  a.lse_stride = a.q_len;
  read_slopes(a, alibi_slopes);
  read_options(a, seed, scale, dropout_p, softcap, window_left, window_right);
  a.batch = 1;
  s.q_ends = read_ends("q", cu_seqlens_q, s.count, a.q_len, max_seqlen_q);
  s.k_ends = read_ends("k", cu_seqlens_k, s.count, a.k_len, max_seqlen_k);
  s.element_size = q.element_size();
  s.lower_right = lower_right;
  return s;
}

}  // namespace bmk
