// Attention of a few new queries to a cache of keys and values, contiguous or paged, in one launch.
//
//     s_j = softcap(scale q k_j),  p = softmax over the keys of the sequence,  out = sum_j p_j v_j,  lse = log sum_j exp s_j
//
// A cache of 8 bits holds k_j / a_j and v_j / b_j as int8 or e4m3, with float32 scales a_j and b_j. Its numbers become T in registers:
// those of keys exactly, with a_j on the score; those of values times b_j, so that no p_j b_j can fall below the smallest half.
//
// Rows: the queries of all heads that share keys (GQA), 16 to a tile of mma.m16n8k16: each key is read once for all of them.
// Grid: (splits of the keys, key heads x tiles of rows, sequences). A warp takes every fourth run of 16 keys of its split, with its
// own stages of cp.async and its own running maximum; the warps of a block meet at its end. The blocks of a row tile leave
// partial results and take a ticket, and the one that takes the last ticket adds them up: no second launch.
// A split is a share of the keys that are there (cache_seqlens, read on the device), so that the lengths need not be known before.
// Keys past a sequence's length are never read, nor are table entries past it.
// Refuses masks (0 times a NaN behind one would leak), head dimensions past kHeadDim or that are no multiple of 8 (8 bits: 16); rows
// that are not 16-byte aligned are the launcher's check. Floor: memory: the keys and values that are there, once per tile of rows.
#pragma once

#include "common.cuh"

namespace bmk {

constexpr int kDecodeRows = 16, kDecodeKeys = 16, kDecodeWarps = 4;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

struct DecodeStrides {
  int64_t batch, head, row;  // in elements; `batch` is that of a page where the cache is paged
};

enum class Cache { as_query, int8, e4m3 };

template <class T>
struct DecodeParameters {
  const T* q;     // [B, Hq, Sq, D]
  const void* k;  // [B, Hkv, S, D], or [pages, Hkv, page_size, D]
  const void* v;
  const float* k_scale;  // of 8-bit caches: [B, Hkv, S] or [pages, Hkv, page_size]
  const float* v_scale;
  DecodeStrides q_strides, k_strides, v_strides, k_scale_strides, v_scale_strides;
  const int* lengths;  // [B]
  const int* table;    // [B, table_width], null where the cache is contiguous
  T* out;              // [B, Hq, Sq, D]
  float* lse;          // [B, Hq, Sq], null where it is not wanted
  float* partial;      // [B, Hkv x tiles, splits, 16, kHeadDim], then [.., 16, 2] of maximum and sum
  unsigned* tickets;   // [B, Hkv x tiles], zero before and after
  int heads, kv_heads, q_len, head_dim, capacity, pages, page_size, table_width;
  float scale, softcap;
};

// A stage of a warp: 16 keys, 16 values, then the scales of both.
template <Cache cache, int kHeadDim>
struct DecodeStage {
  static constexpr int kStages = cache == Cache::as_query ? 2 : 4;
  static constexpr int kElement = cache == Cache::as_query ? 2 : 1;
  static constexpr int kRow = kHeadDim * kElement, kChunks = kRow / 16;  // bytes; pieces of 16 bytes
  static constexpr int kValues = kDecodeKeys * kRow, kScales = 2 * kValues;
  static constexpr int kBytes = kScales + (cache == Cache::as_query ? 0 : 2 * kDecodeKeys * 4);
  static constexpr int kShared = kDecodeWarps * kStages * kBytes;  // of a block

  // The place of a chunk of a key: a swizzle by the key keeps the loads of a warp, or most of them, free of bank conflicts.
  __device__ __forceinline__ static int place(int key, int chunk) {
    return (key * kChunks + (chunk ^ (kChunks >= 8 ? key % 8 : key / 2 % 4))) * 16;
  }
  // The head dimension of a column of a tile of outputs: with 8 bits a thread reads four neighbours at a time, one for each of four tiles.
  __device__ __forceinline__ static int dim(int tile, int column) {
    return cache == Cache::as_query ? tile * 8 + column : tile / 4 * 32 + column * 4 + tile % 4;
  }
};

// Four numbers of an 8-bit cache.
template <Cache cache>
__device__ __forceinline__ Vector<float, 4> cached_numbers(unsigned word) {
  Vector<float, 4> found;
  if constexpr (cache == Cache::int8) {
    const unsigned biased = word ^ 0x80808080u;  // a byte b under the exponent of 2^23 is 2^23 + b
#pragma unroll
    for (int i = 0; i < 4; ++i) found[i] = __uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7650 + i)) - (8388608.0f + 128.0f);
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 pair = unpack2<__half>(ptx::cvt_f16x2_e4m3x2(word >> 16 * i & 0xffff));
      found[2 * i] = pair.x, found[2 * i + 1] = pair.y;
    }
  }
  return found;
}

// What a thread has of a row's softmax: the running maximum (in units of log 2), the sum and the outputs.
template <int kHeadDim>
struct DecodeState {
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  float out[kHeadDim / 8][4] = {};
};

// s += q k for 16 keys, eight to a tile. With 8 bits, step d multiplies the dimensions 16 d + 4 t .. 4 t + 3 of lane t in another order
// than that of the instruction, for q as for k.
template <class T, Cache cache, int kHeadDim>
__device__ __forceinline__ void multiply_keys(float (&s)[2][4], const unsigned (&q)[kHeadDim / 16][4], const unsigned char* stage) {
  using Stage = DecodeStage<cache, kHeadDim>;
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int d = 0; d < kHeadDim / 16; ++d) {
    if constexpr (cache == Cache::as_query) {
      unsigned b[4];
      ptx::ldmatrix_x4(b, stage + Stage::place(lane / 16 * 8 + lane % 8, d * 2 + lane / 8 % 2));
      mma_m16n8k16<T>(s[0], q[d], b[0], b[1]);
      mma_m16n8k16<T>(s[1], q[d], b[2], b[3]);
    } else {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const auto k = cached_numbers<cache>(*reinterpret_cast<const unsigned*>(stage + Stage::place(n * 8 + lane / 4, d) + lane % 4 * 4));
        mma_m16n8k16<T>(s[n], q[d], pack2<T>(k[0], k[1]), pack2<T>(k[2], k[3]));
      }
    }
  }
}

// out += p v for 16 keys.
template <class T, Cache cache, int kHeadDim>
__device__ __forceinline__ void multiply_values(float (&out)[kHeadDim / 8][4], const unsigned (&p)[4], const unsigned char* stage) {
  using Stage = DecodeStage<cache, kHeadDim>;
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  if constexpr (cache == Cache::as_query) {
#pragma unroll
    for (int c = 0; c < kHeadDim / 8; c += 2) {
      unsigned b[4];
      ptx::ldmatrix_x4_trans(b, stage + Stage::kValues + Stage::place(lane / 8 % 2 * 8 + lane % 8, c + lane / 16));
      mma_m16n8k16<T>(out[c], p, b[0], b[1]);
      mma_m16n8k16<T>(out[c + 1], p, b[2], b[3]);
    }
  } else {
    const float* const scales = reinterpret_cast<const float*>(stage + Stage::kScales) + kDecodeKeys;
#pragma unroll
    for (int group = 0; group < kHeadDim / 32; ++group) {
      Vector<float, 4> v[4];  // [key][dimension]
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = i / 2 * 8 + 2 * t + i % 2;
        v[i] = cached_numbers<cache>(
            *reinterpret_cast<const unsigned*>(stage + Stage::kValues + Stage::place(key, group * 2 + g / 4) + g % 4 * 4));
#pragma unroll
        for (int c = 0; c < 4; ++c) v[i][c] *= scales[key];
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) mma_m16n8k16<T>(out[group * 4 + c], p, pack2<T>(v[0][c], v[1][c]), pack2<T>(v[2][c], v[3][c]));
    }
  }
}

// One run of 16 keys, of which the first `count` exist.
template <class T, Cache cache, int kHeadDim>
__device__ __forceinline__ void attend(DecodeState<kHeadDim>& state, const unsigned (&q)[kHeadDim / 16][4], const unsigned char* stage,
                                       int count, float scale, float softcap) {
  const int lane = threadIdx.x % kWarpSize;
  const float* const scales = reinterpret_cast<const float*>(stage + DecodeStage<cache, kHeadDim>::kScales);
  float s[2][4] = {};
  multiply_keys<T, cache, kHeadDim>(s, q, stage);
  float p[2][4], largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = n * 8 + lane % 4 * 2 + i % 2;
      float x = s[n][i] * scale;
      if constexpr (cache != Cache::as_query) x *= scales[key];
      if (softcap > 0) x = softcap * tanhf(x / softcap);
      p[n][i] = key < count ? x * kLog2E : -INFINITY;
      largest[i / 2] = fmaxf(largest[i / 2], p[n][i]);
    }
  float correction[2], shift[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float max = fmaxf(state.max[r], warp_max<4>(largest[r]));
    shift[r] = max == -INFINITY ? 0.0f : max;  // nothing seen yet: all exponents below are -inf
    correction[r] = exp2f(state.max[r] - shift[r]);
    state.max[r] = max;
    state.sum[r] *= correction[r];
  }
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      p[n][i] = exp2f(p[n][i] - shift[i / 2]);
      state.sum[i / 2] += p[n][i];
    }
  const unsigned a[4] = {pack2<T>(p[0][0], p[0][1]), pack2<T>(p[0][2], p[0][3]), pack2<T>(p[1][0], p[1][1]), pack2<T>(p[1][2], p[1][3])};
#pragma unroll
  for (int c = 0; c < kHeadDim / 8; ++c)
#pragma unroll
    for (int i = 0; i < 4; ++i) state.out[c][i] *= correction[i / 2];
  multiply_values<T, cache, kHeadDim>(state.out, a, stage);
}

// The sum of results of one row, each of them relative to its own maximum.
struct DecodeSum {
  float max = -INFINITY, sum = 0, out = 0;

  __device__ __forceinline__ void add(float other_max, float other_sum, float other_out) {
    const float both = fmaxf(max, other_max);
    if (both == -INFINITY) return;
    const float mine = exp2f(max - both), its = exp2f(other_max - both);
    max = both, sum = sum * mine + other_sum * its, out = out * mine + other_out * its;
  }
};

template <class T, Cache cache, int kHeadDim>
__global__ void __launch_bounds__(kDecodeWarps* kWarpSize) attention_decode(const __grid_constant__ DecodeParameters<T> p) {
  using Stage = DecodeStage<cache, kHeadDim>;
  const int splits = gridDim.x, split = blockIdx.x, batch = blockIdx.z;
  const int kv_head = blockIdx.y % p.kv_heads, first_row = blockIdx.y / p.kv_heads * kDecodeRows;
  const int group = p.heads / p.kv_heads, rows = group * p.q_len;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int length = min(p.lengths[batch], p.capacity);
  const auto head_of = [&](int row) { return kv_head * group + row % group; };

  unsigned q[kHeadDim / 16][4];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first_row + lane / 4 + r * 8;
    const T* from = p.q + batch * p.q_strides.batch + head_of(row) * p.q_strides.head + row / group * p.q_strides.row;
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = d * 16 + (cache == Cache::as_query ? half * 8 + lane % 4 * 2 : lane % 4 * 4 + half * 2);
        const bool inside = row < rows && at < p.head_dim;
        q[d][half * 2 + r] =
            inside ? __builtin_bit_cast(unsigned short, from[at]) | __builtin_bit_cast(unsigned short, from[at + 1]) << 16 : 0;
      }
  }

  unsigned char* const stages = dynamic_shared() + warp * Stage::kStages * Stage::kBytes;
  const int tiles = ceil_div(length, kDecodeKeys), share = ceil_div(tiles, splits);
  const int first_tile = split * share + warp, end_tile = min(tiles, (split + 1) * share);
  struct Row {
    int64_t page;
    int head, row;

    __device__ int64_t at(const DecodeStrides& strides) const { return page * strides.batch + head * strides.head + row * strides.row; }
  };
  const auto row_of = [&](int position) {
    if (!p.table) return Row{batch, kv_head, position};
    const int page = p.table[int64_t{batch} * p.table_width + position / p.page_size];
    return Row{min(max(page, 0), p.pages - 1), kv_head, position % p.page_size};
  };
  const auto fetch = [&](int tile, int stage) {
    unsigned char* const to = stages + stage * Stage::kBytes;
    if (tile < end_tile) {
#pragma unroll
      for (int i = 0; i < kDecodeKeys * Stage::kChunks / kWarpSize; ++i) {
        const int key = (i * kWarpSize + lane) / Stage::kChunks, chunk = (i * kWarpSize + lane) % Stage::kChunks;
        const int position = tile * kDecodeKeys + key;
        const bool there = position < length && chunk * 16 < p.head_dim * Stage::kElement;
        const Row row = there ? row_of(position) : Row{};
        const auto copy = [&](unsigned char* shared, const void* cache_of, const DecodeStrides& strides) {
          const auto* from = static_cast<const unsigned char*>(cache_of);
          ptx::cp_async_zfill<16>(shared, there ? from + row.at(strides) * Stage::kElement + chunk * 16 : from, there ? 16 : 0);
        };
        copy(to + Stage::place(key, chunk), p.k, p.k_strides);
        copy(to + Stage::kValues + Stage::place(key, chunk), p.v, p.v_strides);
      }
      if constexpr (cache != Cache::as_query) {  // the first half of the warp: of keys, the second: of values
        const bool of_key = lane < kDecodeKeys;
        const int position = tile * kDecodeKeys + lane % kDecodeKeys;
        const int64_t at = position < length ? row_of(position).at(of_key ? p.k_scale_strides : p.v_scale_strides) : 0;
        ptx::cp_async_zfill<4>(to + Stage::kScales + lane * 4, (of_key ? p.k_scale : p.v_scale) + at, position < length ? 4 : 0);
      }
    }
    ptx::cp_async_commit();
  };
  DecodeState<kHeadDim> state;
#pragma unroll
  for (int stage = 0; stage < Stage::kStages - 1; ++stage) fetch(first_tile + stage * kDecodeWarps, stage);
  for (int tile = first_tile, stage = 0; tile < end_tile; tile += kDecodeWarps, stage = (stage + 1) % Stage::kStages) {
    fetch(tile + (Stage::kStages - 1) * kDecodeWarps, (stage + Stage::kStages - 1) % Stage::kStages);
    ptx::cp_async_wait<Stage::kStages - 1>();
    __syncwarp();  // what the other lanes have copied
    attend<T, cache, kHeadDim>(state, q, stages + stage * Stage::kBytes, length - tile * kDecodeKeys, p.scale, p.softcap);
    __syncwarp();  // before the next fetch overwrites this stage
  }
  ptx::cp_async_wait<0>();

  // The warps of the block, through the memory that held the stages.
  SHARED(float, warp_max_of, [kDecodeWarps][kDecodeRows]);
  SHARED(float, warp_sum_of, [kDecodeWarps][kDecodeRows]);
  float* warp_out = reinterpret_cast<float*>(dynamic_shared());
  constexpr int kWarpOut = Stage::kStages * Stage::kBytes / 4;  // from one warp's outputs to the next one's
  static_assert(kDecodeRows * kHeadDim <= kWarpOut, "a warp's outputs fit where its stages were");
  __syncwarp();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = lane / 4 + r * 8;
    const float sum = warp_sum<4>(state.sum[r]);
    if (lane % 4 == 0) warp_max_of[warp][row] = state.max[r], warp_sum_of[warp][row] = sum;
#pragma unroll
    for (int c = 0; c < kHeadDim / 8; ++c)
#pragma unroll
      for (int i = 0; i < 2; ++i) warp_out[warp * kWarpOut + row * kHeadDim + Stage::dim(c, lane % 4 * 2 + i)] = state.out[c][r * 2 + i];
  }
  __syncthreads();
  const int place = batch * gridDim.y + blockIdx.y;
  float* partial = p.partial + int64_t{place} * splits * kDecodeRows * kHeadDim;
  float* weights = p.partial + int64_t{gridDim.z} * gridDim.y * splits * kDecodeRows * kHeadDim + int64_t{place} * splits * kDecodeRows * 2;
  const auto finish = [&](int row, int d, const DecodeSum& found) {
    const int all = first_row + row;
    if (all >= rows || d >= p.head_dim) return;
    const int64_t at = (int64_t{batch} * p.heads + head_of(all)) * p.q_len + all / group;
    p.out[at * p.head_dim + d] = from_float<T>(found.sum > 0 ? found.out / found.sum : 0.0f);
    if (p.lse && d == 0) p.lse[at] = found.sum > 0 ? (found.max + log2f(found.sum)) * kLn2 : -INFINITY;
  };
  for (int i = threadIdx.x; i < kDecodeRows * kHeadDim; i += kDecodeWarps * kWarpSize) {
    const int row = i / kHeadDim, d = i % kHeadDim;
    DecodeSum found;
    for (int w = 0; w < kDecodeWarps; ++w) found.add(warp_max_of[w][row], warp_sum_of[w][row], warp_out[w * kWarpOut + i]);
    if (splits == 1) {
      finish(row, d, found);
      continue;
    }
    partial[split * kDecodeRows * kHeadDim + i] = found.out;
    if (d == 0) weights[(split * kDecodeRows + row) * 2] = found.max, weights[(split * kDecodeRows + row) * 2 + 1] = found.sum;
  }
  if (splits == 1) return;

  SHARED(bool, is_last, [1]);
  __syncthreads();
  if (threadIdx.x == 0) is_last[0] = ptx::atom_add_acq_rel_gpu(&p.tickets[place], 1) == static_cast<unsigned>(splits) - 1;
  __syncthreads();
  if (!is_last[0]) return;
  for (int i = threadIdx.x; i < kDecodeRows * kHeadDim; i += kDecodeWarps * kWarpSize) {
    const int row = i / kHeadDim;
    DecodeSum found;
    for (int s = 0; s < splits; ++s) {
      const float* weight = &weights[(s * kDecodeRows + row) * 2];
      found.add(weight[0], weight[1], partial[s * kDecodeRows * kHeadDim + i]);
    }
    finish(row, i % kHeadDim, found);
  }
  if (threadIdx.x == 0) p.tickets[place] = 0;
}

}  // namespace bmk
