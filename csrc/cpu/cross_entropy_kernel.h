// Softmax cross-entropy from logits, and its gradient. Included by for_each_isa.h inside the namespace of each instruction set.
//
//   m = max z    l = log sum exp(z - m)    loss = l + (1 - s) (m - z[target]) + s (m - mean z)      s: label smoothing
//   dz = (exp(z - m - l) - (1 - s) [target] - s / C) dloss;  0 where the target is ignored
//
// A task owns whole rows. Probabilities are in registers only; m and l are kept apart, since their sum has lost digits that the
// gradient needs. Sums of a row run in parts of kPart, so that their error does not grow with the number of classes.
//
// Floor: memory. Forward the logits once (their second reading is from a cache), backward the logits and the gradient once.
#include "row_kernel.h"

constexpr int64_t kAhead = int64_t{1} << 18;  // bytes of the next row: with the row itself they fit the second-level cache

// Sums function over a row. Meanwhile `ahead` elements from `next` on come into the second-level cache.
template <class T, class S, class Function>
INLINE T sum_of_row(const S* row, int64_t columns, const S* next, int64_t ahead, Function&& function) {
  constexpr int64_t kPart = 4096;
  T sum = 0;
  for (int64_t j0 = 0; j0 < columns; j0 += kPart) {
    vec<T> sums[kRowSums] = {};
    for_each_vector<T>(std::min(kPart, columns - j0), [&](int64_t j, int i, auto n) {
      sums[i] += first_lanes(function(load_size(row + j0 + j, n)), n);
      if (j0 + j < ahead) __builtin_prefetch(next + j0 + j, 0, 2);
    });
    sum += total(sums);
  }
  return sum;
}

// Writes the loss of every row to `out`, or the sum of all over `share`.
template <class S>
void cross_entropy_forward(const CrossEntropyCall& call, bool by_row, double share, void* out) {
  using T = compute_t<S>;
  const int64_t columns = call.columns;
  Scratch<T> losses(call.rows);
  const T smoothing = static_cast<T>(call.smoothing);
  const int64_t most_ahead = std::min<int64_t>(columns, kAhead / sizeof(S));
  torch::stable::parallel_for(0, call.rows, row_grain(columns), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const S* row = static_cast<const S*>(call.logits) + r * call.logits_row;
      vec<T> largest[kRowSums];
      for (auto& v : largest) v = broadcast(-std::numeric_limits<T>::infinity());
      for_each_vector<T>(columns, [&](int64_t j, int i, auto n) {
        if constexpr (kIsWhole<decltype(n)>)
          largest[i] = maximum(load(row + j), largest[i]);
        else
          for (int64_t k = j; k < columns; ++k) largest[i] = maximum(broadcast(static_cast<T>(to_compute(row[k]))), largest[i]);
      });
      const T m = reduce_max(maximum(maximum(largest[0], largest[1]), maximum(largest[2], largest[3])));
      const T log_sum =
          std::log(sum_of_row<T>(row, columns, row + call.logits_row, r + 1 < end ? most_ahead : 0, [&](vec<T> z) { return exp(z - m); }));
      static_cast<T*>(call.largest)[r] = m;
      static_cast<T*>(call.log_sum)[r] = log_sum;
      T loss = 0;
      if (call.target[r] != call.ignore_index) {
        loss = log_sum + (1 - smoothing) * (m - to_compute(row[call.target[r]]));
        // Of differences from m, so that logits far from 0 keep their digits.
        if (smoothing > 0)
          loss += smoothing * (sum_of_row<T>(row, columns, row, 0, [&](vec<T> z) { return m - z; }) / static_cast<T>(columns));
      }
      losses[r] = loss;
    }
  });
  S* result = static_cast<S*>(out);
  if (by_row) {
    for (int64_t r = 0; r < call.rows; ++r) result[r] = from_compute<S>(losses[r]);
    return;
  }
  double sum = 0;
  for (int64_t r = 0; r < call.rows; ++r) sum += losses[r];
  *result = from_compute<S>(static_cast<T>(sum / share));
}

template <class S>
void cross_entropy_backward(const CrossEntropyGradientCall& gradient) {
  using T = compute_t<S>;
  const CrossEntropyCall& call = gradient.of;
  const int64_t columns = call.columns;
  const T smoothing = static_cast<T>(call.smoothing), each = smoothing / static_cast<T>(columns);
  const S* d_loss = static_cast<const S*>(gradient.d_loss);
  torch::stable::parallel_for(0, call.rows, row_grain(columns), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const S* row = static_cast<const S*>(call.logits) + r * call.logits_row;
      S* d_row = static_cast<S*>(gradient.d_logits) + r * columns;
      const int64_t target = call.target[r];
      if (target == call.ignore_index) {
        std::memset(static_cast<void*>(d_row), 0, columns * sizeof(S));
        continue;
      }
      const T m = static_cast<const T*>(call.largest)[r], log_sum = static_cast<const T*>(call.log_sum)[r];
      const T d = static_cast<T>(to_compute(d_loss[gradient.d_loss_by_row ? r : 0])) / static_cast<T>(gradient.share);
      for_each_vector<T>(columns, [&](int64_t j, int, auto n) {
        store_size(d_row + j, (exp(load_size(row + j, n) - m - log_sum) - each) * d, n);
      });
      const vec<T> at = broadcast(static_cast<T>(to_compute(row[target])));
      d_row[target] = from_compute<S>(((exp(at - m - log_sum) - (1 - smoothing) - each) * d)[0]);
    }
  });
}
