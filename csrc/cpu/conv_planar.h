// Convolution of few input channels whose pixels are adjacent (NCHW), forward. Included by for_each_isa.h inside the namespace
// of each instruction set.
//
// Lanes are columns of the output, so that NCHW is read and written as it lies. A task owns rows of one image: it copies the
// rows of the input that they need into a padded block; then a tile of 4 vectors of outputs x kOut channels adds up all taps in
// registers, a vector load for 1 output vector of all kOut channels and a broadcast weight for 4. Without a pool the 4 vectors
// are 4 rows. With a 2x2 max-pool they are the 4 elements of one vector of windows: even and odd columns of a row are vectors
// of their own, for which the block holds even and odd columns apart, and the maximum is taken in registers. Which element it was, for the
// backward, goes to a row of bytes a channel, and squares of 16 x 16 of these are transposed: the index has its channels innermost.
//
// Of finite sources and weights fused multiply-adds make no NaN, so that a comparison an element is enough to choose by; what holds others
// takes a tile of its own.
//
// Refused: a residual, values before the activation for the backward, and more terms than one sum may have (kSumLength).
// Floor: the multiply-adds at two vectors a cycle. 1 -> 32 channels, 3x3 on 28 x 28 with ReLU and 2x2 max-pool, per image on
// one Zen 5 core: floor 7,100 cycles, 8,100 with the lanes past the last window, measured 10,900.

template <class T>
struct PlanarTile {
  static constexpr int kVectors = 4;  // of outputs
#if ISA_VECTOR_BYTES == 64
  static constexpr int kOut = 4;  // 16 accumulators, 4 vectors of the input and 1 broadcast
#else
  static constexpr int kOut = 2;
#endif
};

template <class T>
inline bool planar_applies(const ConvForward& call) {
  const Pass pass = gather_pass(call.conv);
  const Window& window = call.window;
  const bool halves = window.is_halves();
  if (call.transposed || pass.groups > 1 || !(halves || window.kind == Pooling::none) || !is_monotone(call.activation)) return false;
  if (call.x.w != 1 || call.out.w != 1 || call.residual.data || call.pre.data) return false;
  if (call.index.data && call.index.c != 1) return false;
  const int64_t width = call.out.width, phases = pass.w.axis.stride * (halves ? 2 : 1);
  return pass.depth() <= kSumLength && phases <= 2 && 4 * width >= 3 * round_up(width, kLanes<T>);
}

template <class T, class S>
struct Planar {
  static constexpr int W = kLanes<T>, kVectors = PlanarTile<T>::kVectors, kOut = PlanarTile<T>::kOut;
  static constexpr int kLine = 16;  // bytes of the index that are transposed together
  Pass pass;
  Bands bands;
  int64_t phases, length;  // a row of the block has `phases` runs of `length` columns of every channel
  Image<const S> x;
  Image<S> out;
  Image<uint8_t> index;
  AnyActivation<T> activation;
  bool finite;               // weights and shift
  bool dense;                // rows of the output follow each other
  const T *weights, *shift;  // [group of kOut channels][taps][kOut], [channel]
  const int64_t* offsets;    // [taps][2]: where the sources of even and odd columns lie in the block

  int64_t row_step() const { return pass.channels * phases * length; }
  int64_t taps() const { return pass.depth(); }
  // A last tile may have rows that are not stored.
  int64_t block_rows(int64_t rows) const { return pass.h.span(round_up(rows, kVectors)); }
  int64_t line_size() const { return pass.w.axis.pad + std::max(phases * length, round_up(x.width, W)) + W; }
  T* line(T* lines, int64_t row, int64_t channel) const { return lines + (row * pass.channels + channel) * line_size(); }

  // `rows` rows of the input from `first` on into the block, by way of `lines`: rows of the input, 0 before and after the image.
  void fill(T* block, T* lines, int64_t n, int64_t first, int64_t rows) const {
    for (int64_t r = std::max<int64_t>(0, -first); r < std::min(rows, x.height - first); ++r)
      for (int64_t c = 0; c < pass.channels; ++c) {
        const S* source = x.data + n * x.n + c * x.c + (first + r) * x.h;
        T* to = line(lines, r, c) + pass.w.axis.pad;
        for (int64_t p = 0; p < x.width; p += W) write_lanes<T>(to + p, read_lanes<T>(source + p, x.width - p), x.width - p);
      }
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < pass.channels; ++c) {
        T* run = block + r * row_step() + c * phases * length;
        if (first + r < 0 || first + r >= x.height) {
          std::memset(run, 0, phases * length * sizeof(T));
          continue;
        }
        for (int64_t p = 0; p < length; p += W) {
          const T* at = line(lines, r, c) + phases * p;
          vec<T> a = load(at);
          if (phases == 2) {
            vec<T> odd;
            part<T>(a, load(at + W), a, odd);
            store(run + length + p, odd);
          }
          store(run + p, a);
        }
      }
  }

  // One tile: channels [c, c + kOut) of the outputs whose sources begin at `source`; the first is element (row, column). `chosen` is a
  // line of the index for each channel.
  template <Activation kKind, bool kPooled, bool kFinite>
  INLINE void tile(const T* source, int64_t n, int64_t c, int64_t row, int64_t last_row, int64_t column, uint8_t* chosen) const {
    vec<T> acc[kVectors][kOut];
#pragma GCC unroll 4
    for (int o = 0; o < kOut; ++o)
#pragma GCC unroll 4
      for (int q = 0; q < kVectors; ++q) acc[q][o] = broadcast(shift[c + o]);
    const int64_t step = pass.h.axis.stride * row_step();
    const T* w = weights + c * taps();
    for (int64_t t = 0; t < taps(); ++t, w += kOut) {
      vec<T> in[kVectors];
#pragma GCC unroll 4
      for (int q = 0; q < kVectors; ++q)
        in[q] = load(source + (kPooled ? offsets[2 * t + q % 2] + q / 2 * step : offsets[2 * t] + q * step));
#pragma GCC unroll 4
      for (int o = 0; o < kOut; ++o) {
        const vec<T> weight = broadcast(w[o]);
#pragma GCC unroll 4
        for (int q = 0; q < kVectors; ++q) acc[q][o] += in[q] * weight;
      }
    }
    for (int o = 0; o < std::min<int64_t>(kOut, out.channels - c); ++o) {
      if constexpr (kPooled) {
        const vec<T> window[4] = {acc[0][o], acc[1][o], acc[2][o], acc[3][o]};
        write_largest<kKind, kFinite>(window, n, c + o, row, last_row, column, chosen);
      } else {
        S* to = out.data + n * out.n + (c + o) * out.c + row * out.h + column;
#pragma GCC unroll 4
        for (int q = 0; q < kVectors; ++q)
          if (row + q < last_row) write_lanes<T>(to + q * out.h, activated<kKind>(acc[q][o]), out.width - column);
      }
    }
  }

  // Activation::none stands for the ReLU as well.
  template <Activation kKind>
  INLINE vec<T> activated(vec<T> z) const {
    if constexpr (kKind == Activation::none)
      return activation.at_floor(z);
    else
      return activate<kKind>(z, activation.slope);
  }

  // The largest element of each window, as torch chooses it: the first of equals, the last NaN.
  template <Activation kKind, bool kFinite>
  INLINE void write_largest(const vec<T> (&z)[4], int64_t n, int64_t channel, int64_t row, int64_t last_row, int64_t column,
                            uint8_t* chosen) const {
    S* to = out.data + n * out.n + channel * out.c + row * out.h + column;
    uint8_t* line = chosen + channel * kLine;
    vec<T> a;
    if constexpr (kFinite) {
#if ISA_VECTOR_BYTES == 64
      const __m512 z0 = as_512(z[0]), z1 = as_512(z[1]), z2 = as_512(z[2]), z3 = as_512(z[3]);
      const __mmask16 right_above = _mm512_cmp_ps_mask(z1, z0, _CMP_GT_OQ), right_below = _mm512_cmp_ps_mask(z3, z2, _CMP_GT_OQ);
      const __m512 above = _mm512_mask_mov_ps(z0, right_above, z1), below = _mm512_mask_mov_ps(z2, right_below, z3);
      const __mmask16 lower = _mm512_cmp_ps_mask(below, above, _CMP_GT_OQ);
      const __m512 best = _mm512_mask_mov_ps(above, lower, below);
      a = activated<kKind>(reinterpret_cast<vec<T>>(best));
      if (index.data) {
        const __m128i first = _mm_maskz_set1_epi8(right_above, 1);
        const __m128i second = _mm_mask_mov_epi8(_mm_set1_epi8(2), right_below, _mm_set1_epi8(3));
        const __mmask16 off = _mm512_cmp_ps_mask(as_512(a), _mm512_set1_ps(off_until()), _CMP_LE_OQ);
        const __m128i position = _mm_mask_mov_epi8(first, lower, second);
        const __m128i index_of = _mm_mask_mov_epi8(position, off, _mm_set1_epi8(static_cast<char>(kNoGradient)));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(line), index_of);
      }
#else
      const vec<T> above = maximum(z[1], z[0]), below = maximum(z[3], z[2]);
      a = activated<kKind>(maximum(below, above));
      if (index.data) {
        const vec<T> first = z[1] > z[0] ? broadcast(T(1)) : vec<T>{}, second = z[3] > z[2] ? broadcast(T(3)) : broadcast(T(2));
        write_chosen(line, a, below > above ? second : first);
      }
#endif
    } else {
      vec<T> best = z[0], position = {};
#pragma GCC unroll 4
      for (int q = 1; q < 4; ++q) {
        const auto better = (z[q] > best) | (z[q] != z[q]);
        best = better ? z[q] : best, position = better ? broadcast(static_cast<T>(q)) : position;
      }
      a = activated<kKind>(best);
      if (index.data) write_chosen(line, a, position);
    }
    // A masked store costs several whole ones: what a whole one writes past its row is written again, with the next row.
    if (row + 1 < last_row && dense)
      store(to, a);
    else
      write_lanes<T>(to, a, out.width - column);
  }
  INLINE void write_chosen(uint8_t* line, vec<T> a, vec<T> position) const {
    write_lanes<T>(line, a <= off_until() ? broadcast(static_cast<T>(kNoGradient)) : position, W);
  }
  // Up to this a ReLU passes no gradient on; without one no number compares.
  INLINE T off_until() const { return activation.kind == Activation::relu ? T(0) : std::numeric_limits<T>::quiet_NaN(); }
#if ISA_VECTOR_BYTES == 64
  static INLINE __m512 as_512(vec<T> v) { return reinterpret_cast<__m512>(v); }
#endif

  // The index of a tile of all channels, from a line of bytes each.
  void write_index(const uint8_t* chosen, int64_t n, int64_t row, int64_t column) const {
    uint8_t* to = index.data + n * index.n + row * index.h + column * index.w;
    for (int64_t c = 0; c < out.channels; c += kLine)
      transpose_bytes<true, false>(to + c, index.w, chosen + c * kLine, kLine, std::min<int64_t>(kLine, out.channels - c),
                                   std::min<int64_t>(W, out.width - column));
  }

  // All channels of the pooled tile of a 3x3 convolution of one channel: its 16 vectors of input stay in registers.
  template <Activation kKind>
  INLINE void tile_of_3x3(const T* source, int64_t n, int64_t row, int64_t last_row, int64_t column, uint8_t* chosen) const {
    vec<T> in[4][4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) in[i][j] = load(source + i * row_step() + j % 2 * length + j / 2);
    for (int64_t c = 0; c < out.channels; ++c) {
      const T* w = weights + c / kOut * kOut * 9 + c % kOut;
      vec<T> acc[4];
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) acc[q] = broadcast(shift[c]);
#pragma GCC unroll 9
      for (int t = 0; t < 9; ++t) {
        const vec<T> weight = broadcast(w[t * kOut]);
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) acc[q] += in[q / 2 + t / 3][q % 2 + t % 3] * weight;
      }
      write_largest<kKind, true>(acc, n, c, row, last_row, column, chosen);
    }
  }

  template <Activation kKind, bool kPooled>
  void run() const {
    constexpr int64_t kRows = kPooled ? 1 : kVectors;
    const Axis &h = pass.h.axis, &w = pass.w.axis;
    const bool in_registers = ISA_VECTOR_BYTES == 64 && pass.channels == 1 && h.taps == 3 && w.taps == 3 && h.dilation == 1 &&
                              w.dilation == 1 && h.stride == 1 && w.stride == 1;
    const int64_t per_image = bands.count(), rows = block_rows(bands.full_rows());
    torch::stable::parallel_for(0, pass.batch * per_image, 1, [&](int64_t begin, int64_t end) {
      const int64_t lines_size = rows * pass.channels * line_size();
      Scratch<T> block(rows * row_step() + W), lines(lines_size);
      Scratch<uint8_t> chosen(index.data ? round_up(out.channels, kLine) * kLine : 0);
      std::memset(lines, 0, lines_size * sizeof(T));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / per_image;
        const Band band = bands.pooled(task % per_image), full = bands.full(task % per_image);
        const int64_t filled = block_rows(full.rows());
        fill(block, lines, n, pass.h.lowest(full.top), filled);
        const bool tame = kFused && finite && all_finite<T>(block, filled * row_step());
        for (int64_t r = band.top; r < band.bottom; r += kRows)
          for (int64_t p = 0; p < band.right; p += W) {
            const T* source = block + (r - band.top) * (kPooled ? 2 : 1) * pass.h.axis.stride * row_step() + p;
            if (kPooled && in_registers && tame) {
              tile_of_3x3<kKind>(source, n, r, band.bottom, p, chosen);
            } else if (!kPooled || tame) {
              for (int64_t c = 0; c < out.channels; c += kOut) tile<kKind, kPooled, true>(source, n, c, r, band.bottom, p, chosen);
            } else {
              for (int64_t c = 0; c < out.channels; c += kOut) tile<kKind, true, false>(source, n, c, r, band.bottom, p, chosen);
            }
            if (index.data) write_index(chosen, n, r, p);
          }
      }
    });
  }
};

// alpha and beta as in the epilogue, readable for whole groups of channels.
template <class T, class S>
void planar_forward(const ConvForward& call, const T* alpha, const T* beta) {
  constexpr int64_t W = kLanes<T>, kOut = PlanarTile<T>::kOut, kBlockBytes = 24 << 10;  // half of a first-level cache
  const Pass pass = gather_pass(call.conv);
  const Axis& w = pass.w.axis;
  const bool pooled = call.window.kind != Pooling::none;
  const int64_t phases = w.stride * (pooled ? 2 : 1), last_offset = (w.stride * (pooled ? 1 : 0) + (w.taps - 1) * w.dilation) / phases;
  const int64_t length = round_up(round_up(call.out.width, W) + last_offset, W);
  const int64_t depth = pass.depth(), groups = round_up(call.out.channels, kOut) / kOut;
  Bands bands = make_bands(pass.h.outputs(), pass.w.outputs(), call.window, pass.batch, pass.channels * w.stride * sizeof(T), kBlockBytes,
                           pooled ? 1 : PlanarTile<T>::kVectors);
  bands.columns = bands.width;
  const int64_t size = groups * kOut * depth;
  Scratch<T> weights(round_up(size, W));
  std::fill(weights.get() + size, weights.get() + round_up(size, W), T(0));
  std::vector<int64_t> offsets(2 * depth);
  const Image<const S> weight = call.weight.as<const S>();
  int64_t t = 0;
  for (int64_t c = 0; c < pass.channels; ++c)
    for (int64_t kh = 0; kh < pass.h.axis.taps; ++kh)
      for (int64_t kw = 0; kw < w.taps; ++kw, ++t) {
        for (int64_t odd = 0; odd < 2; ++odd) {
          const int64_t column = odd * w.stride + kw * w.dilation;
          offsets[2 * t + odd] =
              (kh * pass.h.axis.dilation * pass.channels + c) * phases * length + column % phases * length + column / phases;
        }
        for (int64_t o = 0; o < groups * kOut; ++o) {
          const bool real = o < call.out.channels;
          weights[(o / kOut * depth + t) * kOut + o % kOut] =
              real ? to_compute(weight.data[o * weight.n + c * weight.c + kh * weight.h + kw * weight.w]) * alpha[o] : T(0);
        }
      }
  const bool finite = all_finite<T>(weights.get(), round_up(size, W)) && all_finite<T>(beta, round_up(call.out.channels, W));
  const auto out = call.out.as<S>();
  const Planar<T, S> planar{pass,
                            bands,
                            phases,
                            length,
                            call.x.as<const S>(),
                            out,
                            call.index.as<uint8_t>(),
                            {call.activation, static_cast<T>(call.slope)},
                            finite,
                            out.h == out.width,
                            weights.get(),
                            beta,
                            offsets.data()};
  const auto run = [&](auto kind) { pooled ? planar.template run<kind.value, true>() : planar.template run<kind.value, false>(); };
  if (planar.activation.is_floor())
    run(std::integral_constant<Activation, Activation::none>());
  else if (call.activation == Activation::leaky_relu)
    run(std::integral_constant<Activation, Activation::leaky_relu>());
  else if (call.activation == Activation::tanh)
    run(std::integral_constant<Activation, Activation::tanh>());
  else
    run(std::integral_constant<Activation, Activation::sigmoid>());
}
