// What the attention kernels are told: sizes, strides and flags, the same for every instruction set and dtype.
#pragma once

#include <cstdint>

#include "isa.h"
#include "tile_unit.h"

namespace bmk {

enum class MaskType { none, boolean, float32, float64, bfloat16 };

// A tensor of four dimensions; strides count elements, any value.
struct Strided {
  const void* data = nullptr;
  int64_t stride[4] = {};

  template <class T>
  const T* at(int64_t i, int64_t j, int64_t k) const {
    return static_cast<const T*>(data) + i * stride[0] + j * stride[1] + k * stride[2];
  }
};

struct AttentionArgs {
  Strided q;     // [B, Hq, Sq, D]
  Strided k;     // [B, Hkv, Sk, D]
  Strided v;     // [B, Hkv, Sk, Dv]
  Strided mask;  // [B, Hq, Sq, Sk], stride 0 along broadcast dimensions
  MaskType mask_type = MaskType::none;
  const float* alibi = nullptr;  // [B or 1, Hq], contiguous
  int64_t alibi_batch_stride = 0;
  int64_t batch, heads, kv_heads, q_len, k_len, head_dim, value_dim;
  double scale, dropout_p, softcap;
  int64_t left, right;      // keys attended before and after the query's own position; -1: all
  int64_t offset;           // position of query 0 among the keys
  int64_t lse_stride;       // from a head to the next in lse
  int64_t first_batch = 0;  // what dropout counts batch entry 0 as
  uint64_t seed = 0;

  int64_t groups() const { return batch * kv_heads; }
  int64_t group_rows() const { return heads / (kv_heads > 0 ? kv_heads : 1) * q_len; }
  int64_t kept_row() const { return (k_len + 15) / 16 * 16; }  // from a row to the next of what is kept for the backward
};

// A group with fewer rows of bfloat16 is multiplied in float32: p and ds, rounded for the dot products, are averaged over few keys
// or rows there, and their rounding would show beside that of the result.
inline constexpr int64_t kFewestPairedRows = 32;
inline constexpr int64_t kMostKeysKept = 192;  // the block of keys
inline constexpr int64_t kFewRows = 16;  // of a group; with at most so many, keys and values can be read where they lie

struct Float8 {
  uint8_t bits;  // float8_e4m3fn
};
enum class CacheType { same, int8, float8 };  // same: the type of q

// Whether a forward in bfloat16 keeps its probabilities for the backward (attention_kept_kernel.h): 2 bytes each, in all no more than
// q, k, v and out take.
inline bool keeps_probabilities(const AttentionArgs& a) {
  const int64_t rows = a.group_rows(), width = a.head_dim + a.value_dim;
  return selected_isa() == Isa::avx512_bf16 && selected_tiles() == Tiles::none && rows >= kFewestPairedRows && a.k_len <= kMostKeysKept &&
         a.dropout_p == 0 && a.softcap == 0 && rows * a.kept_row() <= (rows + a.k_len) * width;
}

// Whether a forward in bfloat16 keeps what rounding takes from out (attention_rest_kernel.h): where keys lie in several blocks.
inline bool keeps_rest(const AttentionArgs& a) { return a.k_len > kMostKeysKept; }

// Caches of keys and values to decode with: sequence b has the first lengths[b] keys, in pages where there is a table of them.
struct AttentionCache {
  const int64_t* lengths;          // [B]
  const int64_t* table = nullptr;  // [B, table_row]: key j is in page table[b, j / page_size]; null: k[b] holds all keys
  int64_t table_row = 0, page_size = 0;
  CacheType type = CacheType::same;
  Strided k_scale, v_scale;  // float [pages, Hkv, page_size], for caches of 8 bits
};

// A gradient of q, k or v: rows of D or Dv elements, contiguous as [B, S, H] or as [B, H, S]; steps count rows.
struct GradientRows {
  void* data = nullptr;
  int64_t batch = 0, head = 0, token = 0;

  template <class T>
  T* at(int64_t b, int64_t h, int64_t i, int64_t columns) const {
    return static_cast<T*>(data) + (b * batch + h * head + i * token) * columns;
  }
};
inline GradientRows heads_inside(void* data, int64_t heads, int64_t tokens) { return {data, tokens * heads, 1, heads}; }
inline GradientRows heads_outside(void* data, int64_t heads, int64_t tokens) { return {data, tokens * heads, tokens, 1}; }

// What the backward adds. grad_lse may be null.
struct AttentionGradArgs {
  Strided grad_out;      // [B, Hq, Sq, Dv]
  Strided out;           // [B, Hq, Sq, Dv]
  Strided lse;           // [B, Hq, Sq, 1]
  Strided grad_lse;      // [B, Hq, Sq, 1]
  const uint16_t* kept;  // of the forward, or null: see AttentionForward
  const int16_t* rest;   // likewise
  GradientRows dq, dk, dv;
  void* dmask;           // [B or 1, Hq or 1, Sq or 1, Sk or 1], contiguous, of the mask's dtype; null when not wanted
  int64_t mask_size[4];  // its sizes
};

}  // namespace bmk
