// What the forward and the backward kernel of a whole LSTM layer share: which rows, units and steps a thread has.
//
// Grid: (blocks that share a recurrence, groups of 8 rows of the batch, directions), from group `first_group` on. Packed sequences are
// sorted, longest first: a group stops after the steps of its first row, and a row past its end keeps its state.
#pragma once

#include "lstm_exchange.cuh"
#include "lstm_gates.cuh"
#include "lstm_product.cuh"

namespace bmk {

struct LstmSteps {
  int64_t tokens;  // below 2^31
  int batch, hidden, steps;
  const int64_t* firsts;      // [T]: first token of every step, null where sequences are dense
  const int64_t* lengths;     // [B]: steps of every row, null where dense
  unsigned long long* words;  // scopes grid and streamed: [directions, all groups, 2, words], zero; else null
  const uint4* streamed;      // scope streamed: [directions, blocks, tiles past the registers, threads]; else null
  int first_group, groups;
  int bias_at;  // in dynamic shared memory; forward only

  __device__ __forceinline__ int group() const { return first_group + blockIdx.y; }
};

// The first unit of this thread's warp.
__device__ __forceinline__ int first_unit_of(int units_of_warp) {
  return (blockIdx.x * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize) * units_of_warp;
}

// What a plan of ops/lstm/cuda_plan.py comes to: units of a block, tiles of the depth, and bytes. In dynamic shared memory: two slots of
// words, the tiles that are not in registers unless they are streamed, and, forward, the bias.
struct LstmPlan {
  int units, threads, depth_tiles, bias_at, shared_bytes;
  int64_t streamed_bytes;  // of a block

  template <class T>
  __host__ __device__ static LstmPlan of(Scope scope, int tiles, int units_of_warp, int depth_tiles, int registers, int warps,
                                         bool biased) {
    const int units = units_of_warp * warps, threads = warps * kWarpSize;
    const int64_t rest = lstm_tile_bytes<T>(tiles, registers, depth_tiles, threads);
    const bool streams = scope == Scope::streamed;
    const int bias_at = 2 * depth_tiles * Words<T>::kPerTile * 4 + static_cast<int>(streams ? 0 : rest);
    const int bias_bytes = biased ? units * static_cast<int>(sizeof(float4)) : 0;
    return {units, threads, depth_tiles, bias_at, bias_at + bias_bytes, streams ? rest : 0};
  }
};

// Writes the tiles of the depth past the registers in the order in which the threads of the sequence kernel read them in every step.
// Grid: (its blocks, those tiles, directions), with its threads.
template <class T>
struct LstmStream {
  const T* w_hh;  // [directions, 4 H, H]
  uint4* to;      // LstmSteps::streamed
  int hidden, registers;
};

template <class T, int Tiles, class TileOf>
__device__ __forceinline__ void stream_weights(const LstmStream<T>& p, const TileOf& tile_of) {
  const int64_t block = blockIdx.z * gridDim.x + blockIdx.x;
  uint4* const tiles = p.to + block * gridDim.y * Tiles * (kFragment<T> / 4) * blockDim.x + threadIdx.x;
  for (int tile = 0; tile < Tiles; ++tile) write_tile<T>(tiles, blockIdx.y * Tiles + tile, tile_of(tile, p.registers + blockIdx.y));
}

// Where a thread of the sequence kernel finds them.
template <class T>
__device__ __forceinline__ const uint4* streamed_tiles(const LstmSteps& p, int tiles) {
  const int64_t block = blockIdx.z * gridDim.x + blockIdx.x;
  return p.streamed + block * tiles * (kFragment<T> / 4) * blockDim.x + threadIdx.x;
}

// The words of this group of blocks.
template <class T, Scope scope>
__device__ __forceinline__ Exchange exchange_of(const LstmSteps& p, int depth_tiles) {
  Exchange e{reinterpret_cast<unsigned*>(dynamic_shared()), nullptr, depth_tiles * Words<T>::kPerTile};
  if constexpr (goes_through_l2(scope)) e.global = p.words + (int64_t{blockIdx.z} * p.groups + p.group()) * 2 * e.words;
  return e;
}

// The two neighbouring rows of the batch (columns 2 t and 2 t + 1 of the product's tile) of this thread, and their steps.
struct LstmRows {
  int row;        // the first of the two
  int length[2];  // 0 past the batch
  int longest;    // of the group
  int direction;

  __device__ __forceinline__ explicit LstmRows(const LstmSteps& p) : direction(blockIdx.z) {
    const int first = p.group() * kColumns;
    row = first + threadIdx.x % 4 * 2;
    longest = p.lengths ? static_cast<int>(p.lengths[first]) : p.steps;
    for (int j = 0; j < 2; ++j) length[j] = row + j >= p.batch ? 0 : p.lengths ? static_cast<int>(p.lengths[row + j]) : p.steps;
  }

  // The k-th step in the order of the direction, or, for the backward pass, in the opposite one.
  __device__ __forceinline__ int step(int k, bool from_the_end) const { return (direction == 1) != from_the_end ? longest - 1 - k : k; }
  // The token of the first row; that of the second is the next one.
  __device__ __forceinline__ int token(const LstmSteps& p, int step) const {
    return (p.firsts ? static_cast<int>(p.firsts[step]) : step * p.batch) + row;
  }
  // Where a state of row j lies in [directions, B, H].
  __device__ __forceinline__ int64_t state(const LstmSteps& p, int j, int unit) const {
    return (int64_t{direction} * p.batch + row + j) * p.hidden + unit;
  }
};

}  // namespace bmk
