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
  unsigned long long* words;  // scope grid: [directions, all groups, 2, words], zero; else null
  int first_group, groups;
  int bias_at;  // in dynamic shared memory; forward only

  __device__ __forceinline__ int group() const { return first_group + blockIdx.y; }
};

// What a plan of ops/lstm/cuda_plan.py comes to: units of a block, tiles of the depth, and bytes of dynamic shared memory.
struct LstmPlan {
  int units, threads, depth_tiles, bias_at, shared_bytes;

  template <class T>
  __host__ __device__ static LstmPlan of(int tiles, int units_of_warp, int depth_tiles, int registers, int warps, bool biased) {
    const int units = units_of_warp * warps, bytes = lstm_shared_bytes<T>(tiles, registers, depth_tiles, warps * kWarpSize);
    return {units, warps * kWarpSize, depth_tiles, bytes, bytes + (biased ? units * static_cast<int>(sizeof(float4)) : 0)};
  }
};

// The words of this group of blocks.
template <class T, Scope scope>
__device__ __forceinline__ Exchange exchange_of(const LstmSteps& p, int depth_tiles) {
  Exchange e{reinterpret_cast<unsigned*>(dynamic_shared()), nullptr, depth_tiles * Words<T>::kPerTile};
  if constexpr (scope == Scope::grid) e.global = p.words + (int64_t{blockIdx.z} * p.groups + p.group()) * 2 * e.words;
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
