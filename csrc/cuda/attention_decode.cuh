// Attention of a few new queries to a cache of keys and values, contiguous or paged, in one launch.
//
//     s_j = softcap(scale q k_j),  p = softmax over the keys of the sequence,  out = sum_j p_j v_j,  lse = log sum_j exp s_j
//
// Rows: the queries of all heads that share keys (GQA), 16 to a tile of mma.m16n8k16: each key is read once for all of them.
// Grid: (splits of the keys, key heads x tiles of rows, sequences). A warp takes every fourth run of 16 keys of its split, with its
// own stages of cp.async and its own running maximum; the warps of a block meet at its end. The blocks of a row tile leave
// partial results and take a ticket, and the one that takes the last ticket adds them up: no second launch.
// A split is a share of the keys that are there (cache_seqlens, read on the device), so that the lengths need not be known before.
// Keys past a sequence's length are never read, nor are table entries past it.
// Refuses masks (0 times a NaN behind one would leak), head dimensions past kHeadDim or that are no multiple of 8; rows that are not
// 16-byte aligned are the launcher's check. Floor: memory: the keys and values that are there, once per tile of rows.
#pragma once

#include "common.cuh"

namespace bmk {

constexpr int kDecodeRows = 16, kDecodeKeys = 16, kDecodeWarps = 4, kDecodeStages = 2;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

struct DecodeStrides {
  int64_t batch, head, row;  // in elements; `batch` is that of a page where the cache is paged
};

template <class T>
struct DecodeParameters {
  const T* q;  // [B, Hq, Sq, D]
  const T* k;  // [B, Hkv, S, D], or [pages, Hkv, page_size, D]
  const T* v;
  DecodeStrides q_strides, k_strides, v_strides;
  const int* lengths;  // [B]
  const int* table;    // [B, table_width], null where the cache is contiguous
  T* out;              // [B, Hq, Sq, D]
  float* lse;          // [B, Hq, Sq], null where it is not wanted
  float* partial;      // [B, Hkv x tiles, splits, 16, kHeadDim], then [.., 16, 2] of maximum and sum
  unsigned* tickets;   // [B, Hkv x tiles], zero before and after
  int heads, kv_heads, q_len, head_dim, capacity, pages, page_size, table_width;
  float scale, softcap;
};

__host__ __device__ constexpr int decode_shared_bytes(int head_dim) {
  return kDecodeWarps * kDecodeStages * 2 * kDecodeKeys * head_dim * 2;
}

// The place of 8 elements of a key in a stage: a swizzle by the key keeps ldmatrix free of bank conflicts.
template <int kHeadDim>
__device__ __forceinline__ int chunk_place(int key, int chunk) {
  return (key * (kHeadDim / 8) + (chunk ^ key % 8)) * 8;
}

// What a thread has of a row's softmax: the running maximum (in units of log 2), the sum and the outputs.
template <int kHeadDim>
struct DecodeState {
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  float out[kHeadDim / 8][4] = {};
};

// One run of 16 keys, of which the first `count` exist.
template <class T, int kHeadDim>
__device__ __forceinline__ void attend(DecodeState<kHeadDim>& state, const unsigned (&q)[kHeadDim / 16][4], const T* k, const T* v,
                                       int count, float scale, float softcap) {
  const int lane = threadIdx.x % kWarpSize;
  float s[2][4] = {};
#pragma unroll
  for (int d = 0; d < kHeadDim / 16; ++d) {
    unsigned b[4];
    ptx::ldmatrix_x4(b, k + chunk_place<kHeadDim>(lane / 16 * 8 + lane % 8, d * 2 + lane / 8 % 2));
    mma_m16n8k16<T>(s[0], q[d], b[0], b[1]);
    mma_m16n8k16<T>(s[1], q[d], b[2], b[3]);
  }
  float p[2][4], largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float x = s[n][i] * scale;
      if (softcap > 0) x = softcap * tanhf(x / softcap);
      p[n][i] = n * 8 + lane % 4 * 2 + i % 2 < count ? x * kLog2E : -INFINITY;
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
  for (int c = 0; c < kHeadDim / 8; c += 2) {
    unsigned b[4];
    ptx::ldmatrix_x4_trans(b, v + chunk_place<kHeadDim>(lane / 8 % 2 * 8 + lane % 8, c + lane / 16));
#pragma unroll
    for (int i = 0; i < 4; ++i) state.out[c][i] *= correction[i / 2], state.out[c + 1][i] *= correction[i / 2];
    mma_m16n8k16<T>(state.out[c], a, b[0], b[1]);
    mma_m16n8k16<T>(state.out[c + 1], a, b[2], b[3]);
  }
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

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kDecodeWarps* kWarpSize) attention_decode(DecodeParameters<T> p) {
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
        const int at = d * 16 + half * 8 + lane % 4 * 2;
        const bool inside = row < rows && at < p.head_dim;
        q[d][half * 2 + r] =
            inside ? __builtin_bit_cast(unsigned short, from[at]) | __builtin_bit_cast(unsigned short, from[at + 1]) << 16 : 0;
      }
  }

  constexpr int kStage = 2 * kDecodeKeys * kHeadDim;  // elements: keys, then values
  T* stages = reinterpret_cast<T*>(dynamic_shared()) + warp * kDecodeStages * kStage;
  const int tiles = ceil_div(length, kDecodeKeys), share = ceil_div(tiles, splits);
  const int first_tile = split * share + warp, end_tile = min(tiles, (split + 1) * share);
  const auto fetch = [&](int tile, int stage) {
    if (tile < end_tile) {
      constexpr int kChunks = kHeadDim / 8;
#pragma unroll
      for (int i = 0; i < kDecodeKeys * kChunks / kWarpSize; ++i) {
        const int key = (i * kWarpSize + lane) / kChunks, chunk = (i * kWarpSize + lane) % kChunks, position = tile * kDecodeKeys + key;
        const bool there = position < length && chunk * 8 < p.head_dim;
        int64_t page = batch;
        int row = position;
        if (p.table && there) {
          page = min(max(p.table[int64_t{batch} * p.table_width + position / p.page_size], 0), p.pages - 1);
          row = position % p.page_size;
        }
        const int64_t k_at = page * p.k_strides.batch + kv_head * p.k_strides.head + row * p.k_strides.row + chunk * 8;
        const int64_t v_at = page * p.v_strides.batch + kv_head * p.v_strides.head + row * p.v_strides.row + chunk * 8;
        T* to = stages + stage * kStage + chunk_place<kHeadDim>(key, chunk);
        ptx::cp_async_zfill<16>(to, there ? p.k + k_at : p.k, there ? 16 : 0);
        ptx::cp_async_zfill<16>(to + kDecodeKeys * kHeadDim, there ? p.v + v_at : p.v, there ? 16 : 0);
      }
    }
    ptx::cp_async_commit();
  };
  DecodeState<kHeadDim> state;
  fetch(first_tile, 0);
  for (int tile = first_tile, stage = 0; tile < end_tile; tile += kDecodeWarps, stage ^= 1) {
    fetch(tile + kDecodeWarps, stage ^ 1);
    ptx::cp_async_wait<1>();
    __syncwarp();  // what the other lanes have copied
    const T* k = stages + stage * kStage;
    attend<T, kHeadDim>(state, q, k, k + kDecodeKeys * kHeadDim, length - tile * kDecodeKeys, p.scale, p.softcap);
    __syncwarp();  // before the next fetch overwrites this stage
  }
  ptx::cp_async_wait<0>();

  // The warps of the block, through the memory that held the stages.
  SHARED(float, warp_max_of, [kDecodeWarps][kDecodeRows]);
  SHARED(float, warp_sum_of, [kDecodeWarps][kDecodeRows]);
  float* warp_out = reinterpret_cast<float*>(dynamic_shared());
  static_assert(kDecodeRows * kHeadDim * 4 <= kDecodeStages * kStage * 2, "a warp's outputs fit where its stages were");
  __syncwarp();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = lane / 4 + r * 8;
    const float sum = warp_sum<4>(state.sum[r]);
    if (lane % 4 == 0) warp_max_of[warp][row] = state.max[r], warp_sum_of[warp][row] = sum;
#pragma unroll
    for (int c = 0; c < kHeadDim / 8; ++c)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        warp_out[warp * (kDecodeStages * kStage / 2) + row * kHeadDim + c * 8 + lane % 4 * 2 + i] = state.out[c][r * 2 + i];
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
    for (int w = 0; w < kDecodeWarps; ++w)
      found.add(warp_max_of[w][row], warp_sum_of[w][row], warp_out[w * (kDecodeStages * kStage / 2) + i]);
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
