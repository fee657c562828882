// A whole LSTM layer, forward: all steps in one launch, the recurrent weights on chip throughout.
//
//     pre_t = (W x_t, from one product over all tokens) + U h_(t-1) + b;  gates, c_t, h_t: lstm_gates.cuh
//
// Warp: 8 units of 8 rows. Gates are on the M side of the product (lstm_product.cuh), i and f of the units in one tile, g and o in
// another, so that a thread has all four sums of one unit for two rows; rows are on the N side, in eights. U lies in registers for a
// depth of 16 Registers, beyond that in shared memory. c stays in a float register over all steps.
// What a step reads from memory does not depend on the step before it, and is loaded one step ahead.
// Saved for backward: activated gates and cell states, float32. h is rounded to T, as the caller sees it.
// Refuses projections.
// Floor: T times the latency of a step, not memory (9 H floats per row and step): one exchange, and depth / 32 dependent mma, or in
// float32 the multiply-adds of the multiprocessor, 32 H to a thread for each 4 H.
#pragma once

#include "lstm_sequence.cuh"

namespace bmk {

template <class T>
struct LstmForward {
  LstmSteps shape;
  const float* from_input;  // [directions, tokens, 4 H]; may be `gates`
  const T* w_hh;            // [directions, 4 H, H]
  const float* bias;        // [directions, 4 H]
  const T* h0;              // [directions, B, H]
  T* output;                // [tokens, directions H]
  T* h_n;                   // [directions, B, H]; not h0, which other blocks may yet have to read
  float* c;                 // [directions, B, H]: initial states; on return the final ones
  float* gates;             // [directions, tokens, 4 H], null where nothing is saved
  float* cells;             // [directions, tokens, H]
};

constexpr int kForwardTiles = 2, kForwardUnits = 8;  // of a warp

template <class T>
__host__ __device__ LstmPlan lstm_forward_plan(Scope scope, int hidden, int registers, int warps) {
  const int depth_tiles = max(registers, round_up(ceil_div(hidden, 16), 2));
  return LstmPlan::of<T>(scope, kForwardTiles, kForwardUnits, depth_tiles, registers, warps, true);
}

// The weights of a tile for a warp's units, i and f of them in the first tile, g and o in the second.
template <class T>
__device__ __forceinline__ auto forward_weights(const T* w, int hidden, int first_unit) {
  return [=](int tile, int depth_tile) {
    return [=](int m, int k) -> unsigned {
      const int gate = tile * 2 + m / 8, row = first_unit + m % 8, column = 16 * depth_tile + k;
      return row < hidden && column < hidden ? bits_of(w[(int64_t{gate} * hidden + row) * hidden + column]) : 0;
    };
  };
}

template <class T>
__global__ void lstm_forward_stream(LstmStream<T> p) {
  const T* w = p.w_hh + int64_t{blockIdx.z} * 4 * p.hidden * p.hidden;
  stream_weights<T, kForwardTiles>(p, forward_weights(w, p.hidden, first_unit_of(kForwardUnits)));
}

// The most threads of a block: those of 128 units where 128 registers do for each.
template <class T, Scope scope, int Registers>
constexpr int kForwardThreads = sizeof(T) == 2 && scope == Scope::block && Registers <= 8 ? 512 : 256;

template <class T, Scope scope, int Registers>
__global__ void __launch_bounds__(kForwardThreads<T, scope, Registers>, 1) lstm_forward(LstmForward<T> p) {
  const int hidden = p.shape.hidden;
  const LstmRows rows(p.shape);
  const int first_unit = first_unit_of(kForwardUnits);
  const int unit = first_unit + threadIdx.x / 4 % 8;
  const bool exists = unit < hidden;
  const int depth_tiles = max(Registers, round_up(ceil_div(hidden, 16), 2));

  const Exchange exchange = exchange_of<T, scope>(p.shape, depth_tiles);
  uint4* in_shared = reinterpret_cast<uint4*>(exchange.shared + 2 * exchange.words) + threadIdx.x;

  unsigned weights[kForwardTiles][Registers][kFragment<T>];
  const T* w = p.w_hh + int64_t{rows.direction} * 4 * hidden * hidden;
  load_weights<T, kForwardTiles, Registers>(weights, in_shared, scope == Scope::streamed ? Registers : depth_tiles,
                                            forward_weights(w, hidden, first_unit));
  const uint4* const others = scope == Scope::streamed ? streamed_tiles<T>(p.shape, (depth_tiles - Registers) * kForwardTiles) : in_shared;
  for (int word = threadIdx.x; word < exchange.words; word += blockDim.x) {
    const int k = Words<T>::depth(word), row = p.shape.group() * kColumns + Words<T>::column(word);
    const T* h = p.h0 + (int64_t{rows.direction} * p.shape.batch + row) * hidden + k;
    unsigned value = 0;
    for (int i = 0; i < Words<T>::kDepth; ++i)
      if (row < p.shape.batch && k + i < hidden) value |= operand<T>(bits_of(h[i])) << i * 16;
    exchange.shared[word] = value;
    if (k >= hidden) exchange.shared[exchange.words + word] = 0;
  }
  // In shared memory, not in registers, of which there are none to spare.
  float4* bias = reinterpret_cast<float4*>(dynamic_shared() + p.shape.bias_at) + threadIdx.x / 4;
  if (threadIdx.x % 4 == 0) {
    const float* b = p.bias + int64_t{rows.direction} * 4 * hidden + unit;
    *bias = exists ? make_float4(b[0], b[hidden], b[2 * hidden], b[3 * hidden]) : make_float4(0, 0, 0, 0);
  }
  float c[2] = {};
  unsigned h[2] = {};
  for (int j = 0; j < 2; ++j)
    if (exists && rows.row + j < p.shape.batch) {
      const int64_t at = rows.state(p.shape, j, unit);
      c[j] = p.c[at];
      h[j] = bits_of(p.h0[at]);
    }
  exchange_start<scope>();

  float next[2][4] = {};
  int next_token = 0;
  const auto load_ahead = [&](int k) {
    const int step = rows.step(k, false);
    next_token = rows.token(p.shape, step);
    for (int j = 0; j < 2; ++j) {
      if (!exists || step >= rows.length[j]) continue;
      const float* x = p.from_input + (rows.direction * p.shape.tokens + next_token + j) * 4 * hidden + unit;
      next[j][0] = x[0], next[j][1] = x[hidden], next[j][2] = x[2 * hidden], next[j][3] = x[3 * hidden];
    }
  };
  if (rows.longest > 0) load_ahead(0);
  for (int k = 0; k < rows.longest; ++k) {
    const int step = rows.step(k, false), token = next_token;
    float sums[kForwardTiles][4];  // [gate / 2][gate % 2 * 2 + row]
    for (int j = 0; j < 2; ++j)
      for (int gate = 0; gate < 4; ++gate) sums[gate / 2][gate % 2 * 2 + j] = next[j][gate];
    if (k + 1 < rows.longest) load_ahead(k + 1);
    const unsigned* words = exchange.shared;
    if (k > 0) words = exchange_receive<scope>(exchange, k, [&](int word) { return Words<T>::depth(word) < hidden; });
    multiply<T, scope, scope != Scope::block>(sums, weights, others, depth_tiles, words);
    LstmGates gates[2];
    const float4 b = *bias;
    for (int j = 0; j < 2; ++j) {
      if (!exists || step >= rows.length[j]) continue;
      gates[j] = {sums[0][j] + b.x, sums[0][2 + j] + b.y, sums[1][j] + b.z, sums[1][2 + j] + b.w};
      h[j] = bits_of(from_float<T>(lstm_unit(gates[j], c[j])));
    }
    if (k + 1 < rows.longest) {
      exchange_send_unit<T, scope>(exchange, k + 1, 0, unit, hidden, h[0], h[1]);
      exchange_sent<scope>();
    }
    for (int j = 0; j < 2; ++j) {
      if (!exists || step >= rows.length[j]) continue;
      p.output[(int64_t{token + j} * gridDim.z + rows.direction) * hidden + unit] = from_bits<T>(h[j]);
      if (!p.gates) continue;
      const int64_t place = rows.direction * p.shape.tokens + token + j;
      float* saved = p.gates + place * 4 * hidden + unit;
      saved[0] = gates[j].i, saved[hidden] = gates[j].f, saved[2 * hidden] = gates[j].g, saved[3 * hidden] = gates[j].o;
      p.cells[place * hidden + unit] = c[j];
    }
  }
  for (int j = 0; j < 2; ++j)
    if (exists && rows.row + j < p.shape.batch) {
      const int64_t at = rows.state(p.shape, j, unit);
      p.h_n[at] = from_bits<T>(h[j]);
      p.c[at] = c[j];
    }
}

}  // namespace bmk
