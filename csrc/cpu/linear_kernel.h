// A linear layer with what follows it, and its gradient. Included by for_each_isa.h inside the namespace of each instruction set.
//
//   y = activation(z) + residual,  z = x w^T + bias          x [rows, in], w [out, in], y [rows, out]
//   dz = dy activation'(z)    dx = dz w    dw = dz^T x    dbias = sum over rows of dz
//
// The tail runs on each tile of the product while it is in the first-level cache. What the derivative is known from, z for gelu
// and silu, else the activation's value, is written beside y where a residual makes y something else.
//
// Floor: 2 rows in out operations forward, twice that backward, at the multiply-add peak.
// clang-format off: each builds on those before it
#include "strips.h"
#include "activation_kernel.h"
#include "dots.h"
#include "row_kernel.h"
#include "linear_few_kernel.h"
// clang-format on

// Terms that are added up one after the other: fewer where the result has few columns or rows. MKL adds those up in finer parts, and
// one chain of 120 terms for 3 columns had seven times the largest error of its product.
inline int64_t product_chain(int64_t rows, int64_t columns) {
  constexpr int64_t kFew = 16;
  return columns < kFew ? 32 : rows < kFew ? 64 : kProductBlock;
}

template <class S>
struct LinearTail {
  using T = compute_t<S>;
  const S *bias, *residual;
  int64_t residual_row;
  S *y, *known;  // known is null where it is not kept
  int64_t width;
  Activation kind;
  T slope;

  // What can be done as sums leave their registers.
  std::optional<Tail<T>> simple() const {
    const AnyActivation<T> activation(kind, slope);
    if constexpr (std::is_same_v<S, T>)
      if (!known && activation.is_floor()) return Tail<T>{bias, activation.floor, residual, residual_row};
    return std::nullopt;
  }

  template <Activation kActivation>
  INLINE void run(const T* tile, int64_t tile_row, int64_t row, int64_t column, int64_t rows, int64_t columns) const {
    constexpr int W = kLanes<T>;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < columns; j += W) {
        const int64_t n = std::min<int64_t>(W, columns - j), at = (row + r) * width + column + j;
        vec<T> z = load_partial(tile + r * tile_row + j, n);
        if (bias) z += load_partial(bias + column + j, n);
        vec<T> v = activate<kActivation>(z, slope);
        if (known) store_partial(known + at, derivative_from_output(kActivation) ? v : z, n);
        if (residual) v += load_partial(residual + (row + r) * residual_row + column + j, n);
        store_partial(y + at, v, n);
      }
    }
  }
};

template <class S>
void linear_forward(const LinearCall& call) {
  using T = compute_t<S>;
  S* y = static_cast<S*>(call.y);
  const LinearTail<S> tail{static_cast<const S*>(call.bias),
                           static_cast<const S*>(call.residual),
                           call.residual_row,
                           y,
                           static_cast<S*>(call.known),
                           call.out,
                           call.activation,
                           static_cast<T>(call.slope)};
  // Not inlined: it has a loop for every activation.
  const auto finish = [&](const T* tile, int64_t tile_row, int64_t row, int64_t column, int64_t rows,
                          int64_t columns) __attribute__((noinline)) {
    with_activation(call.activation, [&](auto activation) { tail.template run<activation>(tile, tile_row, row, column, rows, columns); });
  };
  if (is_few_rows(call)) {
    const auto run = [&](auto zero) {
      using Q = decltype(zero);
      if (call.weight_step == 1)
        FewRows<T>::template run<Q, S>(call, finish);
      else
        FewRowsAcross<T>::template run<Q, S>(call, finish);
    };
#if ISA_VECTOR_BYTES == 64
    if constexpr (std::is_same_v<S, bfloat16>)
      if (selected_isa() == Isa::avx512_bf16) return run(S{});
#endif
    return run(T(0));
  }
  const AdjacentSteps<T, S> x(static_cast<const S*>(call.x), call.x_row, call.x_step, call.rows, call.in);
  StripProduct<T, S> product{call.rows,        call.out,        call.in, x.data(), x.row(), static_cast<const S*>(call.weight),
                             call.weight_step, call.weight_row, nullptr, call.out};
  product.chain = product_chain(call.rows, call.out);
  if constexpr (std::is_same_v<S, T>) product.c = y;  // sums of bfloat16 are rounded once, at the end
  if (const auto simple = tail.simple()) {
    const bool nothing = !simple->bias && !simple->residual && call.activation == Activation::none;
    product.tail = nothing ? nullptr : &*simple;
    return multiply_strips(product, [](auto...) {});
  }
  multiply_strips(product, finish);
}

// dz (where there is an activation) and dbias (where `dbias` is not null). The rows of a column are summed in runs of kRun, whose sums
// are added to that of a share of the rows; the shares depend on the shape alone, and so does the order of all additions.
template <class S, class T>
void linear_tail_gradient(const LinearCall& call, const S* dy, int64_t dy_row, T* dz, S* dbias) {
  constexpr int W = kLanes<T>;
  constexpr int64_t kRun = 64, kShare = 8 * kRun, kVectors = 8;
  const S* known = static_cast<const S*>(call.known);
  const int64_t shares = std::max<int64_t>(1, (call.rows + kShare - 1) / kShare);
  const int64_t strips = (call.out + kVectors * W - 1) / (kVectors * W);
  Scratch<T> sums(shares * call.out);
  with_activation(call.activation, [&](auto activation) {
    torch::stable::parallel_for(0, shares * strips, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t share = task / strips, first = task % strips * kVectors * W;
        const int64_t columns = std::min<int64_t>(kVectors * W, call.out - first), last = std::min(call.rows, (share + 1) * kShare);
        vec<T> total[kVectors] = {};
        for (int64_t m0 = share * kShare; m0 < last; m0 += kRun) {
          vec<T> run[kVectors] = {};
          for (int64_t m = m0; m < std::min(last, m0 + kRun); ++m) {
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) {
              const int64_t column = first + v * W, n = std::min<int64_t>(W, columns - v * W);
              if (n <= 0) break;
              vec<T> d = load_partial(dy + m * dy_row + column, n);
              if constexpr (activation != Activation::none) {
                d *= derivative<activation>(load_partial(known + m * call.out + column, n), static_cast<T>(call.slope));
                store_partial(dz + m * call.out + column, d, n);
              }
              run[v] += d;
            }
          }
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) total[v] += run[v];
        }
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v)
          if (const int64_t n = std::min<int64_t>(W, columns - v * W); n > 0)
            store_partial(sums.get() + share * call.out + first + v * W, total[v], n);
      }
    });
  });
  if (!dbias) return;
  for (int64_t j = 0; j < call.out; ++j) {
    T sum = 0;
    for (int64_t share = 0; share < shares; ++share) sum += sums[share * call.out + j];
    dbias[j] = from_compute<S>(sum);
  }
}

// dx = dz w and dweight = dz^T x; null where one is not wanted.
template <class S, class D>
void linear_products(const LinearCall& call, const D* dz, int64_t dz_row, S* dx, S* dweight) {
  if (dx)
    gemm(call.rows, call.in, call.out, dz, dz_row, 1, static_cast<const S*>(call.weight), call.weight_row, call.weight_step, dx, call.in,
         false, product_chain(call.rows, call.in));
  if (dweight)
    gemm(call.out, call.in, call.rows, dz, 1, dz_row, static_cast<const S*>(call.x), call.x_row, call.x_step, dweight, call.in, false,
         product_chain(call.out, call.in));
}

// Gradients that are not wanted are null.
template <class S>
void linear_backward(const LinearCall& call, const void* dy_data, int64_t dy_row, void* dx_data, void* dweight_data, void* dbias_data) {
  using T = compute_t<S>;
  const S* dy = static_cast<const S*>(dy_data);
  S *dx = static_cast<S*>(dx_data), *dweight = static_cast<S*>(dweight_data), *dbias = static_cast<S*>(dbias_data);
  if (call.activation == Activation::none) {
    if (dbias) linear_tail_gradient<S, T>(call, dy, dy_row, nullptr, dbias);
    linear_products(call, dy, dy_row, dx, dweight);
  } else {
    Scratch<T> dz(call.rows * call.out);
    linear_tail_gradient(call, dy, dy_row, dz.get(), dbias);
    linear_products(call, static_cast<const T*>(dz.get()), call.out, dx, dweight);
  }
}
