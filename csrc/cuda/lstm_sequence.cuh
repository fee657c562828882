// What the forward and the backward kernel of a whole LSTM layer share: which rows, units and steps a thread has.
//
// Grid: (blocks that share a recurrence, groups of 8 rows of the batch, directions), from group `first_group` on. Packed sequences are
// sorted, longest first: a group stops after the steps of its first row, and a row past its end keeps its state.
#pragma once

#include "lstm_exchange.cuh"
#include "lstm_gates.cuh"

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

// The words of this group of blocks.
template <Scope scope>
__device__ __forceinline__ Exchange exchange_of(const LstmSteps& p, int depth_tiles) {
  Exchange e{reinterpret_cast<unsigned*>(dynamic_shared()), nullptr, depth_tiles * kWordsPerTile};
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

// One A fragment of mma.m16n8k16 from a tile of weights given as weight(m, k).
template <class Weight>
__device__ __forceinline__ void load_fragment(unsigned (&a)[4], const Weight& weight) {
  const int g = threadIdx.x / 4 % 8, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int m = g + i % 2 * 8, k = t * 2 + i / 2 * 8;
    a[i] = weight(m, k) | weight(m, k + 1) << 16;
  }
}

// acc += weights times the words of a step, for Tiles tiles of 16 rows that share them. The first Registers tiles of the depth are in
// registers, the others lie in shared memory as this thread put them there; the chain of sums is halved.
template <class T, int Tiles, int Registers>
__device__ __forceinline__ void multiply(float (&acc)[Tiles][4], const unsigned (&in_registers)[Tiles][Registers][4],
                                         const uint4* in_shared, int depth_tiles, const uint4* words) {
  const int lane = threadIdx.x % kWarpSize;
  float odd[Tiles][4] = {};
#pragma unroll
  for (int k = 0; k < Registers; k += 2) {
    const uint4 b = words[k / 2 * kWarpSize + lane];
#pragma unroll
    for (int m = 0; m < Tiles; ++m) {
      mma_m16n8k16<T>(acc[m], in_registers[m][k], b.x, b.y);
      mma_m16n8k16<T>(odd[m], in_registers[m][k + 1], b.z, b.w);
    }
  }
#pragma unroll 2
  for (int k = Registers; k < depth_tiles; k += 2) {
    const uint4 b = words[k / 2 * kWarpSize + lane];
#pragma unroll
    for (int m = 0; m < Tiles; ++m) {
      const uint4 even = in_shared[((k - Registers) * Tiles + m) * blockDim.x];
      const uint4 next = in_shared[((k + 1 - Registers) * Tiles + m) * blockDim.x];
      const unsigned a[4] = {even.x, even.y, even.z, even.w}, a_next[4] = {next.x, next.y, next.z, next.w};
      mma_m16n8k16<T>(acc[m], a, b.x, b.y);
      mma_m16n8k16<T>(odd[m], a_next, b.z, b.w);
    }
  }
#pragma unroll
  for (int m = 0; m < Tiles; ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[m][i] += odd[m][i];
}

// Loads what `multiply` reads; tile_of(tile, depth_tile)(m, k) is a weight, as 16 bits, zero past the matrix's edges.
template <int Tiles, int Registers, class TileOf>
__device__ __forceinline__ void load_weights(unsigned (&in_registers)[Tiles][Registers][4], uint4* in_shared, int depth_tiles,
                                             const TileOf& tile_of) {
#pragma unroll
  for (int k = 0; k < Registers; ++k) {
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) load_fragment(in_registers[tile][k], tile_of(tile, k));
    __syncwarp();  // keeps the compiler from starting all loads at once, with the addresses of all of them in registers
  }
  for (int k = Registers; k < depth_tiles; ++k)
    for (int tile = 0; tile < Tiles; ++tile) {
      unsigned a[4];
      load_fragment(a, tile_of(tile, k));
      in_shared[((k - Registers) * Tiles + tile) * blockDim.x] = make_uint4(a[0], a[1], a[2], a[3]);
    }
}

// Bytes of dynamic shared memory: two slots of words, then the fragments that are not in registers (after them, forward, the bias).
__host__ __device__ constexpr int lstm_shared_bytes(int tiles, int registers, int depth_tiles, int threads) {
  const int rest = depth_tiles > registers ? depth_tiles - registers : 0;
  return 2 * depth_tiles * kWordsPerTile * 4 + rest * tiles * threads * 16;
}

}  // namespace bmk
