// The product of an LSTM step: rows of recurrent weights, which stay on chip, times the words of the step before.
//
// A tile of weights has 16 rows, which the caller maps to gates and units, and 16 k. Warp: Tiles tiles side by side, over the whole
// depth; the first Registers tiles of the depth are in registers, the others in shared memory, where a thread reads what it wrote, or
// (scope streamed) in the same order in global memory, where a kernel before this one wrote it.
// Results, for either arithmetic, as mma.m16n8k16 gives them: with g = lane / 4 and t = lane % 4, a thread has rows g and g + 8 of
// each tile for columns 2 t and 2 t + 1.
//
// 16 bits: mma.m16n8k16, sums in float, the chain of sums halved. TF32: likewise with two mma.m16n8k8 to a tile, one to each chain.
// float32: IEEE multiply-adds. A thread has rows g and g + 8 for every fourth k, from t on, and all 8 columns; at the end the four
// threads of a row add up what they have.
#pragma once

#include "lstm_exchange.cuh"

namespace bmk {

// 4-byte registers of a tile of weights in a thread.
template <class T>
constexpr int kFragment = sizeof(T) == 4 ? 8 : 4;

// The part of a thread of a tile of weights given as weight(m, k), in bits.
template <class T, class Weight>
__device__ __forceinline__ void load_fragment(unsigned (&a)[kFragment<T>], const Weight& weight) {
  const int g = threadIdx.x / 4 % 8, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < kFragment<T>; ++i) {
    const int m = g + i % 2 * 8;
    if constexpr (sizeof(T) == 4) {
      a[i] = operand<T>(weight(m, i / 2 * 4 + t));
    } else {
      const int k = t * 2 + i / 2 * 8;
      a[i] = weight(m, k) | weight(m, k + 1) << 16;
    }
  }
}

// What a thread has summed up, and the word of the step for a tile of the depth.
template <class T, int Tiles>
struct Sums {
  static constexpr int kTiles = 128 / Words<T>::kPerTile;  // of the depth, to a load
  float odd[Tiles][4] = {};  // of every second mma; the others go into acc at once
  uint4 b;

  __device__ __forceinline__ void load(const unsigned* words, int k) {
    if (k % kTiles == 0) b = reinterpret_cast<const uint4*>(words)[k / kTiles * kWarpSize + threadIdx.x % kWarpSize];
  }
  __device__ __forceinline__ void add(float (&acc)[Tiles][4], int tile, int k, const unsigned (&a)[kFragment<T>]) {
    if constexpr (sizeof(T) == 4) {
      ptx::mma_m16n8k8_tf32(acc[tile], {a[0], a[1], a[2], a[3]}, b.x, b.y);
      ptx::mma_m16n8k8_tf32(odd[tile], {a[4], a[5], a[6], a[7]}, b.z, b.w);
    } else if (k % 2 == 0)
      mma_m16n8k16<T>(acc[tile], a, b.x, b.y);
    else
      mma_m16n8k16<T>(odd[tile], a, b.z, b.w);
  }
  __device__ __forceinline__ void finish(float (&acc)[Tiles][4]) const {
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[tile][i] += odd[tile][i];
  }
};

template <int Tiles>
struct Sums<float, Tiles> {
  float sum[Tiles][2][kColumns] = {};
  const float* words;

  __device__ __forceinline__ void load(const unsigned* all, int k) {
    words = reinterpret_cast<const float*>(all) + (k * 16 + threadIdx.x % 4) * kColumns;
  }
  __device__ __forceinline__ void add(float (&)[Tiles][4], int tile, int, const unsigned (&a)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto low = load_vector<float, 4>(words + i * 4 * kColumns), high = load_vector<float, 4>(words + i * 4 * kColumns + 4);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float w = __builtin_bit_cast(float, a[i * 2 + r]);
#pragma unroll
        for (int n = 0; n < 4; ++n) sum[tile][r][n] += w * low[n], sum[tile][r][n + 4] += w * high[n];
      }
    }
  }
  // Lane t keeps columns 2 t and 2 t + 1: halves are swapped with lane t ^ 2, then with lane t ^ 1.
  __device__ __forceinline__ void finish(float (&acc)[Tiles][4]) const {
    const bool upper = threadIdx.x & 2, odd = threadIdx.x & 1;
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float* s = sum[tile][r];
        float half[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) half[n] = (upper ? s[n + 4] : s[n]) + __shfl_xor_sync(kFullWarp, upper ? s[n] : s[n + 4], 2);
#pragma unroll
        for (int n = 0; n < 2; ++n)
          acc[tile][r * 2 + n] += (odd ? half[n + 2] : half[n]) + __shfl_xor_sync(kFullWarp, odd ? half[n] : half[n + 2], 1);
      }
  }
};

template <class T>
__device__ __forceinline__ void read_tile(unsigned (&a)[kFragment<T>], const uint4* tiles, int number) {
#pragma unroll
  for (int i = 0; i < kFragment<T>; i += 4) {
    const uint4 v = tiles[(number * (kFragment<T> / 4) + i / 4) * blockDim.x];
    a[i] = v.x, a[i + 1] = v.y, a[i + 2] = v.z, a[i + 3] = v.w;
  }
}

// acc += weights times words. Without More, all of the weights are in registers.
template <class T, Scope scope, bool More, int Tiles, int Registers>
__device__ __forceinline__ void multiply(float (&acc)[Tiles][4], const unsigned (&in_registers)[Tiles][Registers][kFragment<T>],
                                         const uint4* others, int depth_tiles, const unsigned* words) {
  // How many pairs of tiles are loaded before the first is needed: the way to L2 is longer than a product.
  constexpr int kAhead = scope != Scope::streamed ? 1 : 16 / (Tiles * kFragment<T> / 4) / 2;
  Sums<T, Tiles> sums;
#pragma unroll
  for (int k = 0; k < Registers; ++k) {
    sums.load(words, k);
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) sums.add(acc, tile, k, in_registers[tile][k]);
  }
#pragma unroll kAhead
  for (int first = Registers; More && first < depth_tiles; first += 2)
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      sums.load(words + first * Words<T>::kPerTile, k);
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) {
        unsigned a[kFragment<T>];
        read_tile<T>(a, others, (first + k - Registers) * Tiles + tile);
        sums.add(acc, tile, k, a);
      }
    }
  sums.finish(acc);
}

// What read_tile reads.
template <class T, class Weight>
__device__ __forceinline__ void write_tile(uint4* tiles, int number, const Weight& weight) {
  unsigned a[kFragment<T>];
  load_fragment<T>(a, weight);
  for (int i = 0; i < kFragment<T>; i += 4)
    tiles[(number * (kFragment<T> / 4) + i / 4) * blockDim.x] = make_uint4(a[i], a[i + 1], a[i + 2], a[i + 3]);
}

// Loads what `multiply` reads, the first `depth_tiles` tiles of the depth; tile_of(tile, depth_tile)(m, k) is a weight, in bits, zero past
// the matrix's edges.
template <class T, int Tiles, int Registers, class TileOf>
__device__ __forceinline__ void load_weights(unsigned (&in_registers)[Tiles][Registers][kFragment<T>], uint4* in_shared, int depth_tiles,
                                             const TileOf& tile_of) {
#pragma unroll
  for (int k = 0; k < Registers; ++k) {
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) load_fragment<T>(in_registers[tile][k], tile_of(tile, k));
    __syncwarp();  // keeps the compiler from starting all loads at once, with the addresses of all of them in registers
  }
  for (int k = Registers; k < depth_tiles; ++k)
    for (int tile = 0; tile < Tiles; ++tile) write_tile<T>(in_shared, (k - Registers) * Tiles + tile, tile_of(tile, k));
}

// Bytes of the tiles of a block that are not in registers.
template <class T>
__host__ __device__ constexpr int64_t lstm_tile_bytes(int tiles, int registers, int depth_tiles, int threads) {
  const int rest = depth_tiles > registers ? depth_tiles - registers : 0;
  return int64_t{rest} * tiles * threads * kFragment<T> * 4;
}

}  // namespace bmk
