// How the warps that share one LSTM recurrence hand each other what a step made, in words of 4 bytes.
//
// A word holds a float, or two 16-bit neighbours along the depth k of the next product, for one of the 8 columns n (rows of the
// batch). 16-bit words lie in the order in which lanes read them as B fragments of mma.m16n8k16, two tiles of 16 k to one 16-byte
// load; TF32 words likewise for mma.m16n8k8, one tile of 16 k to a load. IEEE floats lie by k, so that the four lanes that share a
// row of weights read 128 bytes in a row.
// Slots: a step's words are in slot step % 2 of shared memory. Who writes slot s of step k + 2 has received step k + 1, which
// everyone sent after reading step k, so two slots are enough.
//
//   block    one block has all units: shared memory and its barrier
//   cluster  the blocks of a cluster: every word is stored into each block's shared memory; one cluster barrier a step (sm_90)
//   grid     blocks anywhere: every word travels through L2 as 8 bytes that hold it and the number of its step, so that what is
//            read is known to be new without a flag beside it; no barrier between blocks. They must all be running: the
//            launcher asks the occupancy calculator, and a wait that outlasts kPatience ends the launch with a message.
//   streamed as grid; the weights past the registers do not stay on chip, but are read from L2 in every step
#pragma once

#include <type_traits>

#include "common.cuh"

namespace bmk {

constexpr int kColumns = 8;  // rows of the batch of a block: the columns of a product

// A float32 number whose products take it rounded to 10 bits of fraction, as torch's TF32 switches allow; sums are float32.
struct Tf32 {
  float value;
};
__device__ __forceinline__ float to_float(Tf32 x) { return x.value; }
template <>
__device__ __forceinline__ Tf32 from_float<Tf32>(float x) {
  return {x};
}

// Words of T for a tile of 16 k: how many, which one holds depth k (16 bits: k and k + 1, k even) of column n, and back.
template <class T>
struct Words {
  static constexpr int kPerTile = 64, kDepth = 2;
  __host__ __device__ static constexpr int of(int k, int n) {
    return k / 32 * (2 * kPerTile) + (n * 4 + k % 8 / 2) * 4 + k % 32 / 16 * 2 + k % 16 / 8;
  }
  __host__ __device__ static constexpr int depth(int word) { return word / 128 * 32 + word % 4 / 2 * 16 + word % 2 * 8 + word / 4 % 4 * 2; }
  __host__ __device__ static constexpr int column(int word) { return word % 128 / 16; }
};
template <>
struct Words<float> {
  static constexpr int kPerTile = 128, kDepth = 1;
  __host__ __device__ static constexpr int of(int k, int n) { return k * kColumns + n; }
  __host__ __device__ static constexpr int depth(int word) { return word / kColumns; }
  __host__ __device__ static constexpr int column(int word) { return word % kColumns; }
};

template <>
struct Words<Tf32> {
  static constexpr int kPerTile = 128, kDepth = 1;
  __host__ __device__ static constexpr int of(int k, int n) { return k / 16 * kPerTile + (n * 4 + k % 4) * 4 + k % 16 / 4; }
  __host__ __device__ static constexpr int depth(int word) { return word / kPerTile * 16 + word % 4 * 4 + word / 4 % 4; }
  __host__ __device__ static constexpr int column(int word) { return word % kPerTile / 16; }
};

enum class Scope { block, cluster, grid, streamed };

constexpr bool goes_through_l2(Scope scope) { return scope == Scope::grid || scope == Scope::streamed; }

struct Exchange {
  unsigned* shared;            // [2, words]
  unsigned long long* global;  // [2, words] of this group of blocks, zero at launch; scopes grid and streamed only
  int words;
};

constexpr uint64_t kPatience = 10'000'000'000;  // nanoseconds

// After the slots have been filled as far as nobody sends to them, and before the first send.
template <Scope scope>
__device__ __forceinline__ void exchange_start() {
  if constexpr (scope == Scope::cluster) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  } else {
    __syncthreads();
  }
}

template <Scope scope>
__device__ __forceinline__ void exchange_send(const Exchange& e, int step, int word, unsigned value) {
  const int place = step % 2 * e.words + word;
  if constexpr (scope == Scope::block) {
    e.shared[place] = value;
  } else if constexpr (scope == Scope::cluster) {
    const unsigned blocks = ptx::cluster_size();
    for (unsigned rank = 0; rank < blocks; ++rank) *ptx::mapa(&e.shared[place], rank) = value;
  } else {
    ptx::st_relaxed_gpu(&e.global[place], static_cast<unsigned long long>(step + 1) << 32 | value);
  }
}

// After a thread's last send of a step: everything up to exchange_receive overlaps with the others' sending.
template <Scope scope>
__device__ __forceinline__ void exchange_sent() {
  if constexpr (scope == Scope::cluster) ptx::cluster_arrive();
}

// The words of a step, once all are here. `sent(word)` tells which ones anybody sends.
template <Scope scope, class Sent>
__device__ __forceinline__ const unsigned* exchange_receive(const Exchange& e, int step, const Sent& sent) {
  unsigned* slot = e.shared + step % 2 * e.words;
  if constexpr (scope == Scope::cluster) {
    ptx::cluster_wait();
  } else {
    if constexpr (goes_through_l2(scope)) {
      const unsigned long long* from = e.global + step % 2 * e.words;
      uint64_t deadline = 0;
      for (int word = threadIdx.x; word < e.words; word += blockDim.x) {
        if (!sent(word)) continue;
        unsigned long long found = ptx::ld_relaxed_gpu(&from[word]);
        while (static_cast<unsigned>(found >> 32) != static_cast<unsigned>(step + 1)) {
          const uint64_t now = ptx::globaltimer();
          if (deadline == 0) deadline = now + kPatience;
          if (now > deadline) ptx::trap_with("lstm: a block of the same recurrence does not answer");
          found = ptx::ld_relaxed_gpu(&from[word]);
        }
        slot[word] = static_cast<unsigned>(found);
      }
    }
    __syncthreads();
  }
  return slot;
}

// A number as the bits of a word, or of half of one.
__device__ __forceinline__ unsigned bits_of(float x) { return __builtin_bit_cast(unsigned, x); }
__device__ __forceinline__ unsigned bits_of(Tf32 x) { return __builtin_bit_cast(unsigned, x); }
template <class T>
__device__ __forceinline__ unsigned bits_of(T x) {
  return __builtin_bit_cast(unsigned short, x);
}
template <class T>
__device__ __forceinline__ T from_bits(unsigned bits) {
  if constexpr (sizeof(T) == 4)
    return __builtin_bit_cast(T, bits);
  else
    return __builtin_bit_cast(T, static_cast<unsigned short>(bits));
}

// The bits that a product takes for those of a number.
template <class T>
__device__ __forceinline__ unsigned operand(unsigned bits) {
  if constexpr (std::is_same_v<T, Tf32>)
    return ptx::cvt_rna_tf32(__builtin_bit_cast(float, bits));
  else
    return bits;
}

// Sends the numbers of a unit, at depth first_k + unit, for columns 2 t and 2 t + 1 (t = lane % 4). The lanes of a warp have 8
// neighbouring units; in 16 bits, lanes of neighbouring units make words of both: the even one that of column 2 t, the odd one
// that of 2 t + 1.
template <class T, Scope scope>
__device__ __forceinline__ void exchange_send_unit(const Exchange& e, int step, int first_k, int unit, int units, unsigned first_column,
                                                   unsigned second_column) {
  const int column = threadIdx.x % 4 * 2;
  if constexpr (sizeof(T) == 4) {
    if (unit >= units) return;
    exchange_send<scope>(e, step, Words<T>::of(first_k + unit, column), operand<T>(first_column));
    exchange_send<scope>(e, step, Words<T>::of(first_k + unit, column + 1), operand<T>(second_column));
  } else {
    const bool odd = unit % 2;
    const unsigned other = __shfl_xor_sync(kFullWarp, odd ? first_column : second_column, 4);
    const unsigned word = odd ? other | second_column << 16 : first_column | other << 16;
    const int even = unit & ~1;
    if (even < units) exchange_send<scope>(e, step, Words<T>::of(first_k + even, column + odd), word);
  }
}

}  // namespace bmk
