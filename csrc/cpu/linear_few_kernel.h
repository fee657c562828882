// A linear layer of few rows, as where a network is asked for one word after another: the weights are read once, where they lie. Included
// by linear_kernel.h.
//
// FewRows is for weights whose inputs are adjacent, as PyTorch keeps them, FewRowsAcross for those whose outputs are, as GPT-2's.
//
// A group of kGroup outputs has as many runs of weights to read, side by side, a block of kBlockBytes of each at a time: what the
// processor fetches by itself ends at a page of 4 KiB, and several runs keep it going. While a block is multiplied by all rows of x the
// next one comes into the second-level cache; fetched into the first, lines fill the few places for misses and the sums wait. Lanes are
// terms. A tile has as many sums as a vector has lanes, of R rows and some outputs, and where that leaves some, of several neighbouring
// vectors of terms; sums of a block are added to those of the blocks before.
//
// Floor: reading the weights; two Zen 4 cores read 25 to 35 GB/s from pages of 4 KiB. From 16 rows on the multiply-adds.

constexpr int64_t kFewLinearRows = 16;

inline bool is_few_rows(const LinearCall& call) {
  return call.rows <= kFewLinearRows && call.in >= 64 && call.out > 0 && (call.weight_step == 1 || call.weight_row == 1);
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
      const auto add = [&](int p, const vec<T>(&w)[N]) __attribute__((always_inline)) {
#pragma GCC unroll 4
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
#pragma GCC unroll 4
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
    some(std::integral_constant<int, 4>()), some(std::integral_constant<int, 2>()), some(std::integral_constant<int, 1>());
  }

  // The rows of x from groups to [step][row][terms of a vector], the last vector with zeros: one run of memory for all rows of a group,
  // which lie whole pages apart in x as a rule, on the same sets of the first-level cache.
  template <class Q, class C>
  static void pack(Q* to, int64_t padded_in, const LinearCall& call) {
    const C* x = static_cast<const C*>(call.x);
    each_group(call.rows, [&](int64_t first, auto group) {
      constexpr int64_t R = group.value, kStep = kTerms<Q>;
      for (int64_t r = 0; r < R; ++r) {
        Q* out = to + first * padded_in + r * kStep;
        const C* row = x + (first + r) * call.x_row;
        for (int64_t k = 0; k < padded_in; k += kStep, out += R * kStep) {
          C some[kStep] = {};
          const C* terms = row + k;
          if (call.x_step != 1 || k + kStep > call.in) {
            for (int64_t i = 0; i < std::min(kStep, call.in - k); ++i) some[i] = row[(k + i) * call.x_step];
            terms = some;
          }
          if constexpr (std::is_same_v<Q, C>)
            std::memcpy(out, terms, sizeof some);
          else
            store(out, load(terms));
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
            multiply<group.value, Q, C>(x + r * padded_in + k * group.value, block, r ? block : ahead, length,
                                        sums + r * kGroup * kLanes<T>);
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

// Lanes are outputs. kOperands rows of weights (of pairs of rows) are multiplied at a time, for all rows of x; sums lie in the first-level
// cache, and every kChain terms they are added to totals.
template <class T>
struct FewRowsAcross {
  static constexpr int kOperands = 4, kVectors = 2;
  static constexpr int64_t kStrip = kVectors * kLanes<T>, kChain = 64;

  template <class Q>
  static constexpr int kPerOperand = std::is_same_v<Q, bfloat16> ? 2 : 1;
  template <class Q>
  static constexpr int64_t kTermsAtOnce = kOperands * kPerOperand<Q>;

  // Operand i of `n` (or all) columns of a strip, of row i of weights or of rows 2 i and 2 i + 1 interleaved.
  template <class Q, class C, class Size>
  INLINE static void load_weights(vec<T> (&w)[kVectors], const C* const* rows, int i, int64_t c, Size n) {
    constexpr int W = kLanes<T>;
#if ISA_VECTOR_BYTES == 64
    if constexpr (std::is_same_v<Q, bfloat16>) {
      const auto get = [&](const C* row) __attribute__((always_inline)) {
        if constexpr (kIsWhole<Size>)
          return _mm512_loadu_si512(row + c);
        else
          return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), row + c);
      };
      const __m512i first = get(rows[2 * i]), second = get(rows[2 * i + 1]);
      const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const __m512i low = _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(32)), 16));
      const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
      w[0] = reinterpret_cast<vec<T>>(_mm512_permutex2var_epi16(first, low, second));
      w[1] = reinterpret_cast<vec<T>>(_mm512_permutex2var_epi16(first, high, second));
      return;
    }
#endif
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (kIsWhole<Size>)
        w[v] = load(rows[i] + c + v * W);
      else
        w[v] = n > v * W ? load_partial(rows[i] + c + v * W, std::min<int64_t>(W, n - v * W)) : vec<T>{};
    }
  }

  // One number of x, or two neighbours, in all lanes.
  template <class Q>
  INLINE static vec<T> spread(const Q* x) {
    if constexpr (std::is_same_v<Q, bfloat16>) {
      int32_t pair;
      std::memcpy(&pair, x, sizeof pair);
      typedef int32_t words __attribute__((vector_size(ISA_VECTOR_BYTES)));
      return reinterpret_cast<vec<T>>(words{} + pair);
    } else {
      return broadcast(*x);
    }
  }

  // sums[row][sums_row] (+)= x times kTermsAtOnce rows of weights. `ahead`: those that are next.
  template <bool add, class Q, class C>
  NOINLINE static void multiply(int64_t rows, int64_t columns, const Q* x, int64_t x_row, const C* const* weights, const C* const* ahead,
                                T* sums, int64_t sums_row) {
    const auto strip = [&](int64_t c, auto n) __attribute__((always_inline)) {
      vec<T> w[kOperands][kVectors];
#pragma GCC unroll 4
      for (int i = 0; i < kOperands; ++i) load_weights<Q>(w[i], weights, i, c, n);
#pragma GCC unroll 8
      for (int i = 0; i < kTermsAtOnce<Q>; ++i)
        for (int64_t j = 0; j < kStrip; j += 64 / sizeof(C)) __builtin_prefetch(ahead[i] + c + j, 0, 2);
      for (int64_t r = 0; r < rows; ++r) {
        T* to = sums + r * sums_row + c;
        vec<T> sum[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sum[v] = add ? load(to + v * kLanes<T>) : vec<T>{};
#pragma GCC unroll 4
        for (int i = 0; i < kOperands; ++i) {
          const vec<T> xi = spread(x + r * x_row + i * kPerOperand<Q>);
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) add_product<Q>(sum[v], xi, w[i][v]);
        }
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) store(to + v * kLanes<T>, sum[v]);
      }
    };
    int64_t c = 0;
    for (; c + kStrip <= columns; c += kStrip) strip(c, std::integral_constant<int, kStrip>());
    if (c < columns) strip(c, columns - c);
  }

  template <class Q, class C, class Finish>
  static void run(const LinearCall& call, const Finish& finish) {
    constexpr int64_t kTerms = kTermsAtOnce<Q>, kSumsBytes = 16384, kLine = 64 / sizeof(Q), kWorkOfThread = 100000;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t x_row = round_up(call.in, kTerms) + kLine;
    Scratch<Q> x(call.rows * x_row);
    for (int64_t r = 0; r < call.rows; ++r) {
      const C* row = static_cast<const C*>(call.x) + r * call.x_row;
      for (int64_t k = 0; k < call.in; ++k) {
        if constexpr (std::is_same_v<Q, C>)
          x[r * x_row + k] = row[k * call.x_step];
        else
          x[r * x_row + k] = to_compute(row[k * call.x_step]);
      }
      std::fill(x + r * x_row + call.in, x + (r + 1) * x_row, Q{});
    }
    const int64_t fitting =
        std::max(kStrip, kSumsBytes / static_cast<int64_t>(sizeof(T)) / std::max<int64_t>(1, call.rows) / kStrip * kStrip);
    const int64_t width = std::min(fitting, round_up((call.out + threads - 1) / threads, kStrip));
    const int64_t tasks = (call.out + width - 1) / width, work = std::max<int64_t>(1, call.rows * call.in * width);
    const C* weight = static_cast<const C*>(call.weight);
    torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, kWorkOfThread / work), [&](int64_t begin, int64_t end) {
      Scratch<T> sums(call.rows * width), totals(call.rows * width);
      Scratch<C> zeros(width);
      std::fill(zeros.get(), zeros + width, C{});
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task * width, columns = std::min(width, call.out - first);
        const auto rows_at = [&](const C** rows, int64_t k) {
          for (int64_t i = 0; i < kTerms; ++i) rows[i] = k + i < call.in ? weight + (k + i) * call.weight_step + first : zeros.get();
        };
        std::fill(totals.get(), totals + call.rows * width, T(0));
        const C *rows[kTerms], *ahead[kTerms];
        rows_at(rows, 0);
        for (int64_t k0 = 0; k0 < call.in; k0 += kChain) {
          for (int64_t k = k0; k < std::min(k0 + kChain, call.in); k += kTerms) {
            rows_at(ahead, k + kTerms);
            const auto multiply_rows = k == k0 ? multiply<false, Q, C> : multiply<true, Q, C>;
            multiply_rows(call.rows, columns, x + k, x_row, rows, ahead, sums, width);
            std::copy(ahead, ahead + kTerms, rows);
          }
          for (int64_t i = 0; i < call.rows * width; i += kLanes<T>) store(totals + i, load(totals + i) + load(sums + i));
        }
        finish(totals.get(), width, 0, first, call.rows, columns);
      }
    });
  }
};
