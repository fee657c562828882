// What is left of an LSTM step after its two products, forward and backward, in one pass.
//
// Formula: lstm_gates.cuh. Thread: one unit of one row, all four gates; a block is 32 units by 4 rows.
// Saved for backward: activated gates and the cell state, float32 whatever the dtype: in 16 bits 1 - i loses most digits near 1.
// Refuses: nothing; sizes, dtypes and contiguity are the launcher's checks. Offsets are int64.
// Floor: memory. Forward 9 numbers read and 2 written per unit (7 with what is saved), backward 8 read and 5 written.
#pragma once

#include "lstm_gates.cuh"

namespace bmk {

constexpr int kCellUnits = 32, kCellRows = 4;  // of a block

template <class T>
struct LstmCellForward {
  int64_t batch, hidden;
  const float* from_input;  // [B, 4 H], the product with w_ih
  const float* from_state;  // [B, 4 H], the product with w_hh
  const T* b_ih;            // [4 H], null where there is none
  const T* b_hh;            // [4 H]
  const T* c;               // [B, H]
  T* h_new;                 // [B, H]
  T* c_new;                 // [B, H]
  float* gates;             // [B, 4 H], null where nothing is saved
  float* cells;             // [B, H]
};

template <class T>
struct LstmCellBackward {
  int64_t batch, hidden;
  const T* d_h;        // [B, H], null for zeros
  const T* d_c;        // [B, H], null for zeros
  const float* gates;  // [B, 4 H]
  const float* cells;  // [B, H]
  const T* c;          // [B, H], before the step
  T* d_gates;          // [B, 4 H], before activation
  T* d_c_before;       // [B, H]
};

template <class T>
__global__ void lstm_cell_forward(LstmCellForward<T> p) {
  const int64_t unit = int64_t{blockIdx.x} * kCellUnits + threadIdx.x;
  if (unit >= p.hidden) return;
  float bias[4] = {};
  if (p.b_ih)
    for (int gate = 0; gate < 4; ++gate) bias[gate] = to_float(p.b_ih[gate * p.hidden + unit]) + to_float(p.b_hh[gate * p.hidden + unit]);
  for (int64_t row = int64_t{blockIdx.y} * kCellRows + threadIdx.y; row < p.batch; row += int64_t{gridDim.y} * kCellRows) {
    const int64_t first = row * 4 * p.hidden + unit, at = row * p.hidden + unit;
    const auto sum = [&](int gate) {
      const int64_t place = first + gate * p.hidden;
      return p.from_input[place] + p.from_state[place] + bias[gate];
    };
    LstmGates gates{sum(0), sum(1), sum(2), sum(3)};
    float c = to_float(p.c[at]);
    p.h_new[at] = from_float<T>(lstm_unit(gates, c));
    p.c_new[at] = from_float<T>(c);
    if (!p.gates) continue;
    p.gates[first] = gates.i;
    p.gates[first + p.hidden] = gates.f;
    p.gates[first + 2 * p.hidden] = gates.g;
    p.gates[first + 3 * p.hidden] = gates.o;
    p.cells[at] = c;
  }
}

template <class T>
__global__ void lstm_cell_backward(LstmCellBackward<T> p) {
  const int64_t unit = int64_t{blockIdx.x} * kCellUnits + threadIdx.x;
  if (unit >= p.hidden) return;
  for (int64_t row = int64_t{blockIdx.y} * kCellRows + threadIdx.y; row < p.batch; row += int64_t{gridDim.y} * kCellRows) {
    const int64_t first = row * 4 * p.hidden + unit, at = row * p.hidden + unit;
    const LstmGates gates{p.gates[first], p.gates[first + p.hidden], p.gates[first + 2 * p.hidden], p.gates[first + 3 * p.hidden]};
    float d_c = p.d_c ? to_float(p.d_c[at]) : 0.0f;
    const LstmGates d = lstm_unit_gradient(gates, p.cells[at], to_float(p.c[at]), p.d_h ? to_float(p.d_h[at]) : 0.0f, d_c);
    p.d_gates[first] = from_float<T>(d.i);
    p.d_gates[first + p.hidden] = from_float<T>(d.f);
    p.d_gates[first + 2 * p.hidden] = from_float<T>(d.g);
    p.d_gates[first + 3 * p.hidden] = from_float<T>(d.o);
    p.d_c_before[at] = from_float<T>(d_c);
  }
}

}  // namespace bmk
