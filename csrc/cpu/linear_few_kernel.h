// A linear layer of few rows, as where a network is asked for one word after another: the weights are read once, where they lie. Included
// by linear_kernel.h.
//
// A group of kGroup outputs has as many runs of weights to read, side by side, a block of kBlockBytes of each at a time: what the
// processor fetches by itself ends at a page of 4 KiB, and several runs keep it going. While a block is multiplied by all rows of x the next
// one comes into the second-level cache; fetched into the first, lines fill the few places for misses and the sums wait.
// Lanes are terms. A tile has as many sums as a vector has lanes, of R rows and some outputs, and where that leaves some, of several
// neighbouring vectors of terms; sums of a block are added to those of the blocks before.
//
// Floor: reading the weights; two Zen 4 cores read 25 to 35 GB/s from pages of 4 KiB. From 16 rows on the multiply-adds.

constexpr int64_t kFewLinearRows = 16;

inline bool is_few_rows(const LinearCall& call) {
  return call.rows <= kFewLinearRows && call.weight_step == 1 && call.in >= 64 && call.out > 0;
}

template <class T>
struct FewRows {
  static constexpr int64_t kGroup = 4, kColumns = 16, kBlockBytes = 4096;
  static constexpr int kMostRows = std::min(4, kLanes<T>);

  // Of a group: [row][output][lane].
  static int64_t sums_size(int64_t rows) { return round_up(rows, kMostRows) * kGroup * kLanes<T>; }

  // sums += products of R rows of x, packed, with a block of `length` terms of a group's weights. `ahead`: the block that is next.
  template <int R, class Q, class C>
  NOINLINE static void multiply(const Q* x, const C* const* weights, const C* const* ahead, int64_t length, T* sums) {
    constexpr int W = kLanes<T>, N = std::min<int>(kGroup, W / R), P = W / (R * N), kStep = kTerms<Q>;
    for (int64_t n0 = 0; n0 < kGroup; n0 += N) {
      vec<T> acc[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) acc[i] = vec<T>{};  // one by one: initialised as an array they live in memory
      const C *weight[N], *next[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) weight[n] = weights[n0 + n], next[n] = ahead[n0 + n];
      int64_t d = 0;
      const auto add = [&](int p, const vec<T> (&w)[N]) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const vec<T> xd = load_operand<Q>(x + d * R + r * kStep);
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) add_product<Q>(acc[(p * R + r) * N + n], xd, w[n]);
        }
      };
      vec<T> w[N];
      while (d + P * kStep <= length) {
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p, d += kStep) {
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) {
            w[n] = load_operand<Q>(weight[n] + d);
            __builtin_prefetch(next[n] + d, 0, 2);
          }
          add(p, w);
        }
      }
      for (; d < length; d += kStep) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) w[n] = load_operand<Q>(weight[n] + d, std::min<int64_t>(kStep, length - d));
        add(0, w);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
          vec<T> sum = acc[r * N + n];
#pragma GCC unroll 4
          for (int p = 1; p < P; ++p) sum += acc[(p * R + r) * N + n];
          T* to = sums + (r * kGroup + n0 + n) * W;
          store(to, load(to) + sum);
        }
    }
  }

  // out[row * out_row + output] of a group.
  static void add_lanes(const T* sums, int64_t rows, T* out, int64_t out_row) {
    constexpr int W = kLanes<T>;
    constexpr int64_t kPart = std::min<int64_t>(W, kGroup);
    for (int64_t i = 0; i < round_up(rows * kGroup, W); i += W) {
      vec<T> x[W];
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j) x[j] = load(sums + (i + j) * W);
      T lanes[W];
      store(lanes, sum_each<T>(x));
      for (int64_t j = 0; j < W; j += kPart)
        if ((i + j) / kGroup < rows) std::copy(lanes + j, lanes + j + kPart, out + (i + j) / kGroup * out_row + (i + j) % kGroup);
    }
  }

  // Calls body(first row, R) for groups of rows that are multiplied together.
  template <class Body>
  INLINE static void each_group(int64_t rows, const Body& body) {
    int64_t r = 0;
    const auto some = [&](auto wanted) {
      constexpr int R = std::min<int>(wanted.value, kMostRows);
      while (rows - r >= R) body(r, std::integral_constant<int, R>()), r += R;
    };
    some(std::integral_constant<int, 8>()), some(std::integral_constant<int, 4>());
    some(std::integral_constant<int, 2>()), some(std::integral_constant<int, 1>());
  }

  // The rows of x from groups to [step][row][terms of a vector], the last vector with zeros: one run of memory for all rows of a group, which
  // lie whole pages apart in x as a rule, on the same sets of the first-level cache.
  template <class Q, class C>
  static void pack(Q* to, int64_t padded_in, const LinearCall& call) {
    const C* x = static_cast<const C*>(call.x);
    each_group(call.rows, [&](int64_t first, auto group) {
      constexpr int64_t R = group.value, kStep = kTerms<Q>;
      for (int64_t r = 0; r < R; ++r) {
        Q* out = to + first * padded_in + r * kStep;
        const C* row = x + (first + r) * call.x_row;
        for (int64_t k = 0; k < padded_in; k += kStep, out += R * kStep)
          for (int64_t i = 0; i < kStep; ++i) {
            const C value = k + i < call.in ? row[(k + i) * call.x_step] : C{};
            if constexpr (std::is_same_v<Q, C>)
              out[i] = value;
            else
              out[i] = to_compute(value);
          }
      }
    });
  }

  // Q: what x is multiplied as. C: its type and that of the weights.
  template <class Q, class C, class Finish>
  static void run(const LinearCall& call, const Finish& finish) {
    constexpr int64_t kBlock = kBlockBytes / sizeof(C), kWorkOfThread = 100000;
    const int64_t padded_in = round_up(call.in, kTerms<Q>);
    Scratch<Q> x(call.rows * padded_in);
    pack<Q, C>(x.get(), padded_in, call);
    const C* weight = static_cast<const C*>(call.weight);
    const int64_t tasks = (call.out + kColumns - 1) / kColumns, work = std::max<int64_t>(1, call.rows * call.in * kColumns);
    torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, kWorkOfThread / work), [&](int64_t begin, int64_t end) {
      Scratch<T> sums(sums_size(call.rows)), tile(call.rows * kColumns);
      const auto block_of = [&](const C** rows, int64_t o, int64_t k) {  // outputs past the last one are the last one
        for (int64_t n = 0; n < kGroup; ++n) rows[n] = weight + std::min(o + n, call.out - 1) * call.weight_row + k;
      };
      const int64_t last = std::min(end * kColumns, call.out);
      for (int64_t o = begin * kColumns; o < last; o += kGroup) {
        std::fill(sums.get(), sums.get() + sums_size(call.rows), T(0));
        for (int64_t k = 0; k < call.in; k += kBlock) {
          const C *block[kGroup], *ahead[kGroup];
          block_of(block, o, k);
          k + kBlock < call.in ? block_of(ahead, o, k + kBlock) : block_of(ahead, std::min(o + kGroup, last - 1), 0);
          const int64_t length = std::min(kBlock, call.in - k);
          each_group(call.rows, [&](int64_t r, auto group) {
            multiply<group.value, Q, C>(x + r * padded_in + k * group.value, block, r ? block : ahead, length, sums + r * kGroup * kLanes<T>);
          });
        }
        const int64_t column = o % kColumns;
        add_lanes(sums.get(), call.rows, tile + column, kColumns);
        if (column + kGroup >= kColumns || o + kGroup >= last) {
          const int64_t first = o - column;
          finish(tile.get(), kColumns, 0, first, call.rows, std::min(kColumns, call.out - first));
        }
      }
    });
  }
};
