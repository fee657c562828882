// A whole LSTM layer, backward through time: all steps in one launch, the recurrent weights transposed on chip throughout, or, where
// there is no room for them (scope streamed), read from L2 in every step.
//
//     dh_t = dy_t + U^T dgates_(t+1);  dgates_t and dc from it: lstm_gates.cuh
//
// Warp: 16 units of 8 rows, on the M side of mma.m16n8k16; the depth is all four gates of all units. A thread has two units of two
// rows, whose dh and dc stay in float registers. dgates are rounded to T, as the products that follow read them.
// The gradients of the input and of the weights are products over all tokens, after this kernel.
// Refuses what the forward kernel refuses.
// Floor: T times the latency of a step (4 H / 16 / 2 dependent mma, one exchange).
#pragma once

#include "lstm_sequence.cuh"

namespace bmk {

template <class T>
struct LstmBackward {
  LstmSteps shape;
  const T* d_output;   // [tokens, directions H]
  const float* gates;  // [directions, tokens, 4 H]
  const float* cells;  // [directions, tokens, H]
  const T* c0;         // [directions, B, H]
  const T* w_hh;       // [directions, 4 H, H]
  float* d_h;          // [directions, B, H]: gradients of the final states; on return of the initial ones
  float* d_c;          // [directions, B, H]: likewise
  T* d_gates;          // [tokens, directions, 4 H]
};

constexpr int kBackwardTiles = 1, kBackwardUnits = 16;  // of a warp

template <class T>
__host__ __device__ LstmPlan lstm_backward_plan(Scope scope, int hidden, int registers, int warps) {
  return LstmPlan::of<T>(scope, kBackwardTiles, kBackwardUnits, max(registers, round_up(hidden, 16) / 4), registers, warps, false);
}

// The transposed weights of a tile for a warp's units: the depth is all four gates, each padded to a multiple of 16 units.
template <class T>
__device__ __forceinline__ auto backward_weights(const T* w, int hidden, int first_unit) {
  return [=](int, int depth_tile) {
    const int padded = round_up(hidden, 16), gate = 16 * depth_tile / padded, first_row = 16 * depth_tile % padded;
    return [=](int m, int k) -> unsigned {
      const int row = first_row + k, column = first_unit + m;
      return gate < 4 && row < hidden && column < hidden ? bits_of(w[(int64_t{gate} * hidden + row) * hidden + column]) : 0;
    };
  };
}

template <class T>
__global__ void lstm_backward_stream(LstmStream<T> p) {
  const T* w = p.w_hh + int64_t{blockIdx.z} * 4 * p.hidden * p.hidden;
  stream_weights<T, kBackwardTiles>(p, backward_weights(w, p.hidden, first_unit_of(kBackwardUnits)));
}

template <class T, Scope scope, int Registers>
__global__ void __launch_bounds__(256, 1) lstm_backward(LstmBackward<T> p) {
  const int hidden = p.shape.hidden, padded = round_up(hidden, 16);
  const LstmRows rows(p.shape);
  const int first_unit = first_unit_of(kBackwardUnits);
  const int unit[2] = {first_unit + static_cast<int>(threadIdx.x) / 4 % 8, first_unit + static_cast<int>(threadIdx.x) / 4 % 8 + 8};
  const int depth_tiles = max(Registers, padded / 4);

  const Exchange exchange = exchange_of<T, scope>(p.shape, depth_tiles);
  uint4* in_shared = reinterpret_cast<uint4*>(exchange.shared + 2 * exchange.words) + threadIdx.x;
  const auto sent = [&](int word) {
    const int k = Words<T>::depth(word);
    return k < 4 * padded && k % padded < hidden;
  };

  unsigned weights[kBackwardTiles][Registers][kFragment<T>];
  const T* w = p.w_hh + int64_t{rows.direction} * 4 * hidden * hidden;
  load_weights<T, kBackwardTiles, Registers>(weights, in_shared, scope == Scope::streamed ? Registers : depth_tiles,
                                             backward_weights(w, hidden, first_unit));
  const uint4* const others = scope == Scope::streamed ? streamed_tiles<T>(p.shape, (depth_tiles - Registers) * kBackwardTiles) : in_shared;
  for (int word = threadIdx.x; word < exchange.words; word += blockDim.x)
    if (!sent(word)) exchange.shared[word] = exchange.shared[exchange.words + word] = 0;

  float d_h[2][2] = {}, d_c[2][2] = {};  // [unit][row]
  const auto exists = [&](int u, int j) { return unit[u] < hidden && rows.row + j < p.shape.batch; };
  for (int u = 0; u < 2; ++u)
    for (int j = 0; j < 2; ++j)
      if (exists(u, j)) {
        const int64_t at = rows.state(p.shape, j, unit[u]);
        d_h[u][j] = p.d_h[at], d_c[u][j] = p.d_c[at];
      }
  if constexpr (scope == Scope::cluster) exchange_start<scope>();  // in the other scopes the first receive does as well

  // Of the step at hand; c_before is that of the step before it in time, or the initial state.
  LstmGates gates[2][2];
  float d_y[2][2], c[2][2], c_before[2][2] = {};
  const auto active = [&](int k, int j) { return k < rows.longest && rows.step(k, true) < rows.length[j]; };
  const auto load_c = [&](int k, int u, int j) {
    if (!active(k, j)) return to_float(p.c0[rows.state(p.shape, j, unit[u])]);
    return p.cells[(rows.direction * p.shape.tokens + rows.token(p.shape, rows.step(k, true)) + j) * hidden + unit[u]];
  };
  const auto load = [&](int k) {
    for (int u = 0; u < 2; ++u)
      for (int j = 0; j < 2; ++j) {
        if (unit[u] >= hidden || !active(k, j)) continue;
        const int64_t token = rows.token(p.shape, rows.step(k, true)) + j;
        const float* g = p.gates + (rows.direction * p.shape.tokens + token) * 4 * hidden + unit[u];
        gates[u][j] = {g[0], g[hidden], g[2 * hidden], g[3 * hidden]};
        d_y[u][j] = to_float(p.d_output[(token * gridDim.z + rows.direction) * hidden + unit[u]]);
        c[u][j] = k > 0 && active(k - 1, j) ? c_before[u][j] : load_c(k, u, j);
        c_before[u][j] = load_c(k + 1, u, j);
      }
  };
  load(0);
  for (int k = 0; k < rows.longest; ++k) {
    const int64_t token = rows.token(p.shape, rows.step(k, true));
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      unsigned d[4][2] = {};  // [gate][row]
      for (int j = 0; j < 2; ++j) {
        if (unit[u] >= hidden || !active(k, j)) continue;
        const LstmGates found = lstm_unit_gradient(gates[u][j], c[u][j], c_before[u][j], d_h[u][j] + d_y[u][j], d_c[u][j]);
        const T rounded[4] = {from_float<T>(found.i), from_float<T>(found.f), from_float<T>(found.g), from_float<T>(found.o)};
        T* out = p.d_gates + ((token + j) * gridDim.z + rows.direction) * 4 * hidden + unit[u];
        for (int gate = 0; gate < 4; ++gate) {
          d[gate][j] = bits_of(rounded[gate]);
          out[gate * hidden] = rounded[gate];
        }
      }
#pragma unroll
      for (int gate = 0; gate < 4; ++gate)
        exchange_send_unit<T, scope>(exchange, k, gate * padded, unit[u], hidden, d[gate][0], d[gate][1]);
    }
    exchange_sent<scope>();
    load(k + 1);
    const unsigned* words = exchange_receive<scope>(exchange, k, sent);
    float sums[kBackwardTiles][4] = {};
    multiply<T, scope, true>(sums, weights, others, depth_tiles, words);
    for (int u = 0; u < 2; ++u)
      for (int j = 0; j < 2; ++j)
        if (active(k, j)) d_h[u][j] = sums[0][u * 2 + j];
  }
  for (int u = 0; u < 2; ++u)
    for (int j = 0; j < 2; ++j)
      if (exists(u, j)) {
        const int64_t at = rows.state(p.shape, j, unit[u]);
        p.d_h[at] = d_h[u][j], p.d_c[at] = d_c[u][j];
      }
}

}  // namespace bmk
