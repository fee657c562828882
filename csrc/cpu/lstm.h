// What the LSTM kernels are called with: one layer, all of its directions. Plain data, the same for every instruction set.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "team.h"
#include "tile_unit.h"

namespace bmk {

// Tokens are the rows of x and of the output, step by step: the rows of step t are the first batch_sizes[t] sequences,
// at offsets[t]. A dense batch is the case where every step has all of them; a packed one has its longest sequence first.
struct LstmShape {
  int64_t steps, batch, tokens;
  int64_t input, hidden;
  int64_t state;  // size of h: `hidden`, or proj_size
  bool projected;
  int64_t directions;
  const int64_t* batch_sizes;  // [steps]
  const int64_t* offsets;      // [steps]
  const int64_t* lengths;      // [batch]

  int64_t gates() const { return 4 * hidden; }
  int64_t width() const { return directions * state; }  // of a row of the output
};

// The parameters of one direction of one layer, or their gradients, as torch.nn.LSTM lays them out: gates i, f, g, o.
template <class S>
struct LstmWeights {
  S* w_ih;  // [4 H, I]
  S* w_hh;  // [4 H, P]
  S* b_ih;  // [4 H] or null
  S* b_hh;  // [4 H] or null
  S* w_hr;  // [P, H] or null
};

// S is the storage type, T the type it is computed in.
template <class S, class T>
struct LstmForward {
  LstmWeights<const S> weights[2];
  const S* x;   // [tokens, I]
  const S* h0;  // [D, B, P]
  const S* c0;  // [D, B, H]
  S* output;    // [tokens, D P]
  S* h_n;       // [D, B, P]
  S* c_n;       // [D, B, H]
  T* gates;     // [D, tokens, 4 H], activated; null unless a backward follows
  T* cells;     // [D, tokens, H]; likewise
};

template <class S, class T>
struct LstmBackward {
  LstmWeights<const S> weights[2];
  LstmWeights<S> d_weights[2];  // null where they are not wanted
  const S* x;
  const S* h0;
  const S* c0;
  const S* output;
  const T* gates;
  const T* cells;
  const T* d_output;  // [tokens, D P]
  const S* d_h_n;     // [D, B, P] or null
  const S* d_c_n;     // [D, B, H] or null
  T* d_x;             // [tokens, I] or null
  S* d_h0;            // [D, B, P]
  S* d_c0;            // [D, B, H]
};

// One step of one cell, of h and c into h_new and c_new. All contiguous and of one dtype.
struct LstmCell {
  int64_t batch, input, hidden;
  const void *x, *h, *c, *w_ih, *w_hh, *b_ih, *b_hh;  // the biases may be null
  void *h_new, *c_new;
};
void lstm_cell_step(torch::headeronly::ScalarType dtype, const LstmCell& cell);

// The op itself, for lstm_cell: output, h_n, c_n, gates, cells, hidden.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor>
lstm_fwd(const torch::stable::Tensor& x, const torch::stable::Tensor& h0, const torch::stable::Tensor& c0,
         const std::vector<torch::stable::Tensor>& weights, const std::optional<torch::stable::Tensor>& batch_sizes,
         const std::optional<torch::stable::Tensor>& dropout_mask, int64_t num_layers, bool bidirectional, bool save);

// Its backward: d_x, d_h0, d_c0, d_weights.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, std::vector<torch::stable::Tensor>> lstm_bwd(
    const std::optional<torch::stable::Tensor>& d_output, const std::optional<torch::stable::Tensor>& d_h_n,
    const std::optional<torch::stable::Tensor>& d_c_n, const torch::stable::Tensor& output, const torch::stable::Tensor& gates,
    const torch::stable::Tensor& states, const torch::stable::Tensor& hidden, bool need_d_x, bool need_d_weights,
    const torch::stable::Tensor& x, const torch::stable::Tensor& h0, const torch::stable::Tensor& c0,
    const std::vector<torch::stable::Tensor>& weights, const std::optional<torch::stable::Tensor>& batch_sizes,
    const std::optional<torch::stable::Tensor>& dropout_mask, int64_t num_layers, bool bidirectional);

}  // namespace bmk
