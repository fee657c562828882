// Native ops attention_fwd and _bwd, attention_varlen_fwd and _bwd, and attention_decode_fwd on the CPU: checks, allocation, registration.
// The kernels, with formulas and who owns what, are in attention_*_kernel.h.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of _mm512_undefined_ps inside _mm512_max_ps
#define KERNEL_SOURCE "attention_kernel.h"
#include "attention.h"

#include "attention_read.h"
#include "for_each_isa.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "../check.h"
#include "new_tensor.h"
#include "pooled_tensor.h"

namespace bmk {

namespace {

// [B, H, S, D], stored as [B, S, H, D]. Not made as a view: autograd has to take it apart from the tensor it is a view of.
Tensor new_heads_inside(int64_t batch, int64_t heads, int64_t tokens, int64_t columns, ScalarType dtype) {
  const auto step = [](int64_t n) { return std::max<int64_t>(n, 1); };
  const int64_t sizes[] = {batch, heads, tokens, columns}, row = step(columns), token = step(heads) * row;
  const int64_t strides[] = {step(tokens) * token, row, token, 1};
  return new_strided(4, sizes, strides, dtype);
}

ScalarType lse_dtype(const Tensor& q) { return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

void check_saved(const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& out, const Tensor& lse, const Tensor& q) {
  CHECK_CPU(grad_out);
  CHECK_CPU(out);
  CHECK_CPU(lse);
  CHECK_SAME_DTYPE(grad_out, q);
  CHECK_SAME_DTYPE(out, q);
  CHECK_DTYPE_IS(lse, lse_dtype(q));
  if (!grad_lse) return;
  CHECK_CPU(*grad_lse);
  CHECK_DTYPE_IS(*grad_lse, lse_dtype(q));
}

// Where an operator has to give a tensor of probabilities that its backend does not keep, the first is -1.
constexpr uint16_t kNotKept = 0xbc00;

// What a forward of these arguments has kept.
void read_kept(AttentionGradArgs& g, const AttentionArgs& a, const Tensor& q, const Tensor& kept, bool mask_grad) {
  const int64_t groups = a.groups(), rows = a.group_rows(), row = a.kept_row();
  const int64_t heads = a.batch * a.heads, q_len = a.q_len, value_dim = a.value_dim;
  const bool rest = keeps_rest(a);
  STD_TORCH_CHECK(q.scalar_type() == ScalarType::BFloat16, "kept must be empty where nothing is kept");
  CHECK_CPU(kept);
  CHECK_DTYPE_IS(kept, rest ? ScalarType::Short : ScalarType::Half);
  CHECK_CONTIGUOUS(kept);
  if (rest) {
    CHECK_SHAPE(kept, heads, q_len, value_dim);
    g.rest = static_cast<const int16_t*>(kept.const_data_ptr());
    return;
  }
  CHECK_SHAPE(kept, groups, rows, row);
  const auto* probabilities = static_cast<const uint16_t*>(kept.const_data_ptr());
  if (probabilities[0] == kNotKept) return;
  STD_TORCH_CHECK(keeps_probabilities(a), "kept must be empty where nothing is kept");
  // The mask's gradient would show what was kept in half precision.
  if (!mask_grad || a.mask_type == MaskType::bfloat16) g.kept = probabilities;
}

// Calls run(first, count) for problems that are multiplied alike: see kFewestPairedRows.
template <class Problem, class Run>
void each_kind(std::vector<Problem>& problems, ScalarType dtype, Run run) {
  auto many = problems.end();
  if (dtype == ScalarType::BFloat16)
    many = std::partition(problems.begin(), problems.end(), [](const Problem& p) { return p.a.group_rows() < kFewestPairedRows; });
  if (many != problems.begin()) run(problems.data(), many - problems.begin());
  if (many != problems.end()) run(&*many, problems.end() - many);
}

}  // namespace

void run_attention(const AttentionForward& problem, ScalarType dtype) {
  DISPATCH_FLOATING(dtype, "attention", [&] { ISA_CALL(attention_forward<scalar_t>, &problem, 1); });
}

void run_decode(const AttentionArgs& a, const AttentionCache& cache, void* out, void* lse, ScalarType dtype) {
  DISPATCH_FLOATING(dtype, "attention_decode", [&] { ISA_CALL(attention_few<scalar_t>, a, &cache, out, lse, nullptr); });
}

// The third is what is kept for the backward, if `save` and where keeps_probabilities or keeps_rest says so; else it is undefined, which
// Python takes for None.
std::tuple<Tensor, Tensor, Tensor> attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& attn_mask,
                                                 const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& seed, double scale,
                                                 double dropout_p, double softcap, int64_t window_left, int64_t window_right,
                                                 bool lower_right, bool save) {
  AttentionForward problem{
      read_args(q, k, v, attn_mask, alibi_slopes, seed, scale, dropout_p, softcap, window_left, window_right, lower_right)};
  const AttentionArgs& a = problem.a;
  Tensor out = new_heads_inside(a.batch, a.heads, a.q_len, a.value_dim, q.scalar_type());
  Tensor lse = new_contiguous({a.batch, a.heads, a.q_len}, lse_dtype(q));
  problem.out = out.mutable_data_ptr(), problem.lse = lse.mutable_data_ptr();
  Tensor kept;
  if (save && q.scalar_type() == ScalarType::BFloat16) {
    if (keeps_rest(a)) {
      kept = pooled_empty({a.batch * a.heads, a.q_len, a.value_dim}, ScalarType::Short, sizeof *problem.rest);
      problem.rest = static_cast<int16_t*>(kept.mutable_data_ptr());
    } else if (keeps_probabilities(a)) {
      kept = pooled_empty({a.groups(), a.group_rows(), a.kept_row()}, ScalarType::Half, sizeof *problem.kept);
      problem.kept = static_cast<uint16_t*>(kept.mutable_data_ptr());
    }
  }
  run_attention(problem, q.scalar_type());
  return {out, lse, kept};
}

// With `as_inputs` gradients lie as their tensors do where these are contiguous, and no fixed layout: a leaf of autograd would copy what
// lies otherwise.
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd(const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& out,
                                                         const Tensor& lse, const std::optional<Tensor>& kept, bool mask_grad,
                                                         const Tensor& q, const Tensor& k, const Tensor& v,
                                                         const std::optional<Tensor>& attn_mask, const std::optional<Tensor>& alibi_slopes,
                                                         const std::optional<Tensor>& seed, double scale, double dropout_p, double softcap,
                                                         int64_t window_left, int64_t window_right, bool lower_right, bool as_inputs) {
  AttentionBackward problem{
      read_args(q, k, v, attn_mask, alibi_slopes, seed, scale, dropout_p, softcap, window_left, window_right, lower_right)};
  const AttentionArgs& a = problem.a;
  AttentionGradArgs& g = problem.g;
  const int64_t batch = a.batch, heads = a.heads, q_len = a.q_len, value_dim = a.value_dim;
  check_saved(grad_out, grad_lse, out, lse, q);
  CHECK_SHAPE(grad_out, batch, heads, q_len, value_dim);
  CHECK_SHAPE(out, batch, heads, q_len, value_dim);
  CHECK_SHAPE(lse, batch, heads, q_len);
  g.grad_out = strided(grad_out), g.out = strided(out), g.lse = strided(lse);
  if (kept && kept->numel() > 0) read_kept(g, a, q, *kept, mask_grad);
  if (grad_lse) {
    CHECK_SHAPE(*grad_lse, batch, heads, q_len);
    g.grad_lse = strided(*grad_lse);
  }
  const auto gradient = [&](const Tensor& of, GradientRows& rows) {
    const int64_t heads = of.size(1), tokens = of.size(2), columns = of.size(3);
    const bool outside = as_inputs && of.is_contiguous();
    Tensor out = outside ? new_contiguous({a.batch, heads, tokens, columns}, of.scalar_type())
                         : new_heads_inside(a.batch, heads, tokens, columns, of.scalar_type());
    rows = (outside ? heads_outside : heads_inside)(out.mutable_data_ptr(), heads, tokens);
    return out;
  };
  Tensor dq = gradient(q, g.dq), dk = gradient(k, g.dk), dv = gradient(v, g.dv);
  STD_TORCH_CHECK(!mask_grad || (attn_mask && a.mask_type != MaskType::boolean), "attn_mask must be floating where its gradient is wanted");
  Tensor dmask =
      mask_grad ? new_contiguous({attn_mask->size(0), attn_mask->size(1), attn_mask->size(2), attn_mask->size(3)}, attn_mask->scalar_type())
                : new_contiguous({0}, q.scalar_type());
  g.dmask = mask_grad ? dmask.mutable_data_ptr() : nullptr;
  for (int64_t i = 0; i < 4; ++i) g.mask_size[i] = mask_grad ? attn_mask->size(i) : 0;
  if (mask_grad && a.batch * a.heads * a.q_len * a.k_len == 0) {
    torch::stable::zero_(dmask);
    g.dmask = nullptr;
  }
  DISPATCH_FLOATING(q.scalar_type(), "attention", [&] { ISA_CALL(attention_backward<scalar_t>, &problem, 1); });
  return {dq, dk, dv, dmask};
}

// The third is what rounding takes from out, for the sequences that keeps_rest names: [Hq, Sq, Dv] of each, from its tokens' place on;
// undefined where nothing is kept. Its shape tells nothing of the lengths, which a compiler may not know.
std::tuple<Tensor, Tensor, Tensor> attention_varlen_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                                                        const Tensor& cu_seqlens_k, const std::optional<Tensor>& alibi_slopes,
                                                        const std::optional<Tensor>& seed, int64_t max_seqlen_q, int64_t max_seqlen_k,
                                                        double scale, double dropout_p, double softcap, int64_t window_left,
                                                        int64_t window_right, bool lower_right, bool save) {
  const Sequences s = read_sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, seed, max_seqlen_q, max_seqlen_k, scale, dropout_p,
                                     softcap, window_left, window_right, lower_right);
  Tensor out = new_contiguous({s.all.q_len, s.all.heads, s.all.value_dim}, q.scalar_type());
  Tensor lse = new_contiguous({s.all.heads, s.all.q_len}, lse_dtype(q));
  Tensor kept;
  int16_t* rest = nullptr;
  if (save && q.scalar_type() == ScalarType::BFloat16 && max_seqlen_k > kMostKeysKept) {
    kept = pooled_empty({s.all.q_len, s.all.heads, s.all.value_dim}, ScalarType::Short, sizeof *rest);
    rest = static_cast<int16_t*>(kept.mutable_data_ptr());
  }
  std::vector<AttentionForward> problems(s.count);
  for (int64_t b = 0; b < s.count; ++b) {
    const int64_t first = s.q_ends[b] * s.all.heads * s.all.value_dim;
    AttentionForward& problem = problems[b];
    problem.a = s.at(b);
    problem.out = advanced(out.mutable_data_ptr(), first, s.element_size);
    problem.lse = advanced(lse.mutable_data_ptr(), s.q_ends[b], lse.element_size());
    if (rest && keeps_rest(problem.a)) problem.rest = rest + first;
  }
  each_kind(problems, q.scalar_type(), [&](const AttentionForward* first, int64_t count) {
    DISPATCH_FLOATING(q.scalar_type(), "attention_varlen", [&] { ISA_CALL(attention_forward<scalar_t>, first, count); });
  });
  return {out, lse, kept};
}

std::tuple<Tensor, Tensor, Tensor> attention_varlen_bwd(const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& out,
                                                        const Tensor& lse, const std::optional<Tensor>& kept, const Tensor& q,
                                                        const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                                                        const Tensor& cu_seqlens_k, const std::optional<Tensor>& alibi_slopes,
                                                        const std::optional<Tensor>& seed, int64_t max_seqlen_q, int64_t max_seqlen_k,
                                                        double scale, double dropout_p, double softcap, int64_t window_left,
                                                        int64_t window_right, bool lower_right) {
  const Sequences s = read_sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, seed, max_seqlen_q, max_seqlen_k, scale, dropout_p,
                                     softcap, window_left, window_right, lower_right);
  const int64_t tokens = s.all.q_len, heads = s.all.heads, value_dim = s.all.value_dim;
  check_saved(grad_out, grad_lse, out, lse, q);
  CHECK_SHAPE(grad_out, tokens, heads, value_dim);
  CHECK_SHAPE(out, tokens, heads, value_dim);
  CHECK_SHAPE(lse, heads, tokens);
  AttentionGradArgs all{};
  all.grad_out = strided_tokens(grad_out), all.out = strided_tokens(out), all.lse = strided_lse(lse);
  if (grad_lse) {
    CHECK_SHAPE(*grad_lse, heads, tokens);
    all.grad_lse = strided_lse(*grad_lse);
  }
  if (kept && kept->numel() > 0) {
    CHECK_CPU(*kept);
    CHECK_DTYPE_IS(*kept, ScalarType::Short);
    CHECK_CONTIGUOUS(*kept);
    CHECK_SHAPE(*kept, tokens, heads, value_dim);
    all.rest = static_cast<const int16_t*>(kept->const_data_ptr());
  }
  Tensor dq = new_contiguous({tokens, heads, s.all.head_dim}, q.scalar_type());
  Tensor dk = new_contiguous({s.all.k_len, s.all.kv_heads, s.all.head_dim}, q.scalar_type());
  Tensor dv = new_contiguous({s.all.k_len, s.all.kv_heads, value_dim}, q.scalar_type());
  const int64_t size = s.element_size, lse_size = lse.element_size();
  std::vector<AttentionBackward> problems(s.count);
  for (int64_t b = 0; b < s.count; ++b) {
    const int64_t q0 = s.q_ends[b], k0 = s.k_ends[b];
    const AttentionArgs a = s.at(b);
    AttentionGradArgs g = all;
    g.grad_out = from_token(all.grad_out, q0, size), g.out = from_token(all.out, q0, size), g.lse = from_token(all.lse, q0, lse_size);
    if (grad_lse) g.grad_lse = from_token(all.grad_lse, q0, lse_size);
    if (g.rest) g.rest = keeps_rest(a) ? g.rest + q0 * heads * value_dim : nullptr;
    const int64_t kv_heads = s.all.kv_heads;  // the one batch entry of a sequence needs no step
    g.dq = heads_inside(advanced(dq.mutable_data_ptr(), q0 * heads * s.all.head_dim, size), heads, 0);
    g.dk = heads_inside(advanced(dk.mutable_data_ptr(), k0 * kv_heads * s.all.head_dim, size), kv_heads, 0);
    g.dv = heads_inside(advanced(dv.mutable_data_ptr(), k0 * kv_heads * value_dim, size), kv_heads, 0);
    problems[b] = {a, g};
  }
  each_kind(problems, q.scalar_type(), [&](const AttentionBackward* first, int64_t count) {
    DISPATCH_FLOATING(q.scalar_type(), "attention_varlen", [&] { ISA_CALL(attention_backward<scalar_t>, first, count); });
  });
  return {dq, dk, dv};
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
  a.left = window_left, a.right = window_right, a.offset = 0, a.lse_stride = a.q_len;
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
  Tensor out = new_heads_inside(a.batch, a.heads, a.q_len, a.value_dim, q.scalar_type());
  Tensor lse = new_contiguous({a.batch, a.heads, a.q_len}, lse_dtype(q));
  run_decode(a, cache, out.mutable_data_ptr(), lse.mutable_data_ptr(), q.scalar_type());
  return {out, lse};
}

}  // namespace bmk

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_native, m) {
  m.def(
      "attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, Tensor? alibi_slopes, Tensor? seed, float scale, float dropout_p, "
      "float softcap, int window_left, int window_right, bool lower_right, bool save) -> (Tensor, Tensor, Tensor)");
  m.def(
      "attention_bwd(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor? kept, bool mask_grad, Tensor q, Tensor k, "
      "Tensor v, Tensor? attn_mask, Tensor? alibi_slopes, Tensor? seed, float scale, float dropout_p, float softcap, int window_left, "
      "int window_right, bool lower_right, bool as_inputs) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "attention_varlen_fwd(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? alibi_slopes, Tensor? seed, "
      "int max_seqlen_q, int max_seqlen_k, float scale, float dropout_p, float softcap, int window_left, int window_right, "
      "bool lower_right, bool save) -> (Tensor, Tensor, Tensor)");
  m.def(
      "attention_varlen_bwd(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor? kept, Tensor q, Tensor k, Tensor v, "
      "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? alibi_slopes, Tensor? seed, int max_seqlen_q, int max_seqlen_k, float scale, "
      "float dropout_p, float softcap, int window_left, int window_right, bool lower_right) -> (Tensor, Tensor, Tensor)");
  m.def(
      "attention_decode_fwd(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? k_scale, Tensor? v_scale, Tensor cache_seqlens, "
      "Tensor? block_table, Tensor? alibi_slopes, float scale, float softcap, int window_left, int window_right) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel_native, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&bmk::attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&bmk::attention_bwd));
  m.impl("attention_varlen_fwd", TORCH_BOX(&bmk::attention_varlen_fwd));
  m.impl("attention_varlen_bwd", TORCH_BOX(&bmk::attention_varlen_bwd));
  m.impl("attention_decode_fwd", TORCH_BOX(&bmk::attention_decode_fwd));
}
