// Native op attention_decode: checks, launch and registration of attention_decode.cuh.
#include "attention_decode.cuh"

#include "host.h"

namespace bmk {

namespace {

void check_rows(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cuda() && t.dim() == 4 && t.stride(3) == 1, name, " must be a CUDA tensor of 4 dimensions, adjacent in the last");
}
void check_cache(const Tensor& t, Cache cache, ScalarType dtype, const char* name) {
  check_rows(t, name);
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must be of scalar type ", static_cast<int>(dtype), ", got ",
                  static_cast<int>(t.scalar_type()));
  const int64_t chunk = cache == Cache::as_query ? 8 : 16;  // elements of 16 bytes
  bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && t.size(3) % chunk == 0;
  for (int64_t i = 0; i < 3; ++i) aligned = aligned && (t.size(i) == 1 || t.stride(i) % chunk == 0);
  STD_TORCH_CHECK(aligned, name, " must have rows aligned to 16 bytes");
}

void check_scale(const std::optional<Tensor>& t, Cache cache, const Tensor& of, const char* name) {
  STD_TORCH_CHECK(t.has_value() == (cache != Cache::as_query), name, " must be given for caches of 8 bits, and only for them");
  if (t)
    STD_TORCH_CHECK(t->is_cuda() && t->scalar_type() == ScalarType::Float && has_shape(*t, {of.size(0), of.size(1), of.size(2)}), name,
                    " must be a float32 CUDA tensor ", shape_string({of.size(0), of.size(1), of.size(2)}), ", got ", shape_string(*t));
}

DecodeStrides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }
DecodeStrides strides_of(const std::optional<Tensor>& t) { return t ? strides_of(*t) : DecodeStrides{}; }

template <class T, Cache cache, int kHeadDim>
void launch_decode(const DecodeParameters<T>& p, dim3 grid, cudaStream_t stream) {
  constexpr int kBytes = DecodeStage<cache, kHeadDim>::kShared;
  const auto kernel = attention_decode<T, cache, kHeadDim>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes), "attention_decode: shared memory");
  kernel<<<grid, kDecodeWarps * kWarpSize, kBytes, stream>>>(p);
  check_cuda(cudaGetLastError(), "attention_decode");
}
template <class T, Cache cache>
void launch_for_head(const DecodeParameters<T>& p, dim3 grid, cudaStream_t stream) {
  p.head_dim <= 64 ? launch_decode<T, cache, 64>(p, grid, stream) : launch_decode<T, cache, 128>(p, grid, stream);
}

Cache cache_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Char: return Cache::int8;
    case ScalarType::Float8_e4m3fn: return Cache::e4m3;
    default: return Cache::as_query;
  }
}

}  // namespace

// Writes out and, where it is given, lse. `tickets` is zero, [B, Hkv x tiles of rows], and zero again when the launch has ended;
// launches that may run at the same time need their own. The scales, of 8-bit caches, have the caches' first three dimensions.
void attention_decode_native(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& k_scale,
                             const std::optional<Tensor>& v_scale, const Tensor& lengths, const std::optional<Tensor>& table, double scale,
                             double softcap, int64_t splits, Tensor out, std::optional<Tensor> lse, Tensor partial, Tensor tickets) {
  const Cache cache = cache_of(k);
  const ScalarType cache_dtype = cache == Cache::as_query ? q.scalar_type() : k.scalar_type();
  check_rows(q, "q");
  check_cache(k, cache, cache_dtype, "k_cache");
  check_cache(v, cache, cache_dtype, "v_cache");
  check_scale(k_scale, cache, k, "k_scale");
  check_scale(v_scale, cache, v, "v_scale");
  const int64_t batch = q.size(0), heads = q.size(1), q_len = q.size(2), head_dim = q.size(3);
  const int64_t pages = k.size(0), kv_heads = k.size(1), page_size = k.size(2);
  CHECK_SHAPE(k, pages, kv_heads, page_size, head_dim);
  CHECK_SHAPE(v, pages, kv_heads, page_size, head_dim);
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "q must have a multiple of the heads of k_cache, got ", heads, " and ", kv_heads);
  STD_TORCH_CHECK(head_dim % 8 == 0 && head_dim <= 128, "q must have a head dimension that is a multiple of 8 up to 128, got ", head_dim);
  STD_TORCH_CHECK(table.has_value() || pages == batch, "k_cache must have ", batch, " sequences, got ", pages);
  check_tensor(lengths, {batch}, ScalarType::Int, "cache_seqlens");
  const int64_t width = table ? table->size(1) : 1;
  if (table) check_tensor(*table, {batch, width}, ScalarType::Int, "block_table");
  check_tensor(out, {batch, heads, q_len, head_dim}, q.scalar_type(), "out");
  if (lse) check_tensor(*lse, {batch, heads, q_len}, ScalarType::Float, "lse");
  const int64_t padded = head_dim <= 64 ? 64 : 128, tiles = kv_heads * ceil_div<int64_t>(heads / kv_heads * q_len, kDecodeRows);
  STD_TORCH_CHECK(splits > 0 && batch <= 65535 && tiles <= 65535 && width * page_size < (int64_t{1} << 31),
                  "attention_decode: too many sequences, heads or keys: ", batch, ", ", tiles, ", ", width * page_size);
  if (splits > 1) {
    check_tensor(partial, {batch * tiles * splits * kDecodeRows * (padded + 2)}, ScalarType::Float, "partial");
    check_tensor(tickets, {batch * tiles}, ScalarType::Int, "tickets");
  }
  if (batch * heads * q_len == 0) return;
  const OnDeviceOf device(q);
  const dim3 grid(static_cast<unsigned>(splits), static_cast<unsigned>(tiles), static_cast<unsigned>(batch));
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const DecodeParameters<T> p{data<T>(q),
                                k.const_data_ptr(),
                                v.const_data_ptr(),
                                data<float>(k_scale),
                                data<float>(v_scale),
                                strides_of(q),
                                strides_of(k),
                                strides_of(v),
                                strides_of(k_scale),
                                strides_of(v_scale),
                                data<int>(lengths),
                                data<int>(table),
                                mutable_data<T>(out),
                                lse ? mutable_data<float>(*lse) : nullptr,
                                mutable_data<float>(partial),
                                mutable_data<unsigned>(tickets),
                                static_cast<int>(heads),
                                static_cast<int>(kv_heads),
                                static_cast<int>(q_len),
                                static_cast<int>(head_dim),
                                static_cast<int>(width * page_size),
                                static_cast<int>(pages),
                                static_cast<int>(page_size),
                                static_cast<int>(width),
                                static_cast<float>(scale),
                                static_cast<float>(softcap)};
    if (cache == Cache::int8) return launch_for_head<T, Cache::int8>(p, grid, device.stream());
    if (cache == Cache::e4m3) return launch_for_head<T, Cache::e4m3>(p, grid, device.stream());
    launch_for_head<T, Cache::as_query>(p, grid, device.stream());
  };
  if (q.scalar_type() == ScalarType::Half) return run(__half{});
  STD_TORCH_CHECK(q.scalar_type() == ScalarType::BFloat16, "attention_decode: the cuda kernels take float16 and bfloat16, got scalar type ",
                  static_cast<int>(q.scalar_type()));
  run(__nv_bfloat16{});
}

}  // namespace bmk

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_native, m) {
  m.def(
      "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? k_scale, Tensor? v_scale, Tensor cache_seqlens, Tensor? "
      "block_table, "
      "float scale, float softcap, int splits, Tensor(a!) out, Tensor(b!)? lse, Tensor(c!) partial, Tensor(d!) tickets) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel_native, CUDA, m) { m.impl("attention_decode", TORCH_BOX(&bmk::attention_decode_native)); }
