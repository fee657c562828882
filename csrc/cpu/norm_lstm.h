// What the kernels of norm_lstm are called with. Plain data, the same for every instruction set.
#pragma once

#include <cstdint>

namespace bmk {

struct NormLstmShape {
  int64_t steps, batch, hidden;
  double eps, eps_c;

  int64_t tokens() const { return steps * batch; }
  int64_t gates() const { return 4 * hidden; }
};

// S is the storage type, T the type it is computed in. All contiguous.
template <class S>
struct NormLstmInputs {
  const S* a;       // [T, B, 4 H]: the input's part of the gates
  const S* h0;      // [B, H]
  const S* c0;      // [B, H]
  const S* w;       // [4 H, H]
  const S* gain;    // [4 H]
  const S* gain_c;  // [H]
  const S* bias_c;  // [H]
};

template <class S, class T>
struct NormLstmForward {
  NormLstmInputs<S> in;
  S* output;  // [T, B, H]
  S* h_n;     // [B, H]
  S* c_n;     // [B, H]
  T* z;       // [T, B, 4 H]: W h before its norm; null unless a backward follows
  T* gates;   // [T, B, 4 H], activated; likewise
  T* cells;   // [T, B, H]; likewise
};

template <class S, class T>
struct NormLstmBackward {
  NormLstmInputs<S> in;
  const S* output;
  const T* z;
  const T* gates;
  const T* cells;
  const S* d_output;  // [T, B, H] or null
  const S* d_h_n;     // [B, H] or null
  const S* d_c_n;     // likewise
  S* d_a;
  S* d_h0;
  S* d_c0;
  S* d_w;
  S* d_gain;
  S* d_gain_c;
  S* d_bias_c;
};

}  // namespace bmk
