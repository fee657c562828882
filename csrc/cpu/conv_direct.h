// Direct convolution: every pass (see Pass in conv_geometry.h) as products of strided windows of a source block with packed
// weights. Included by for_each_isa.h inside the namespace of each instruction set.
//
// A task owns one band of outputs of one image and group. It copies the sources the band needs into a padded block
// [rows][columns][channels], so that no tap tests a border, and computes R pixels x kVectors vectors of output channels
// at a time in registers: R + kVectors loads for R * kVectors multiply-adds a step, below the two load ports from R = 3 on.
// The outputs of the band stay in a block [rows][columns][channels] of the compute type, in the first or second cache level;
// the sink applies what follows (bias, activation, pool, ...) and is the only one to write memory.
//
// Floor: the multiply-adds at two vectors a cycle. 3 -> 64 channels, 7x7 of stride 2 on 224 x 224 with ReLU and the 3x3 max-pool
// of stride 2, on one Zen 5 core: floor 3.7 million cycles, measured 4.2 (4.9 before bands shared rows).

template <class T>
struct ConvTile {
  static constexpr int kVectors = 2;
#if ISA_VECTOR_BYTES == 64
  static constexpr int kRows = 14;  // 28 accumulators, 2 of weights and 1 broadcast, of 32 registers
#else
  static constexpr int kRows = 6;
#endif
  static constexpr int64_t kColumns = kVectors * kLanes<T>;
};

// Weights as weight(o, c, kh, kw) = data[g * group + o * out + c * in + kh * h + kw * w], times scale[g * channels + c].
template <class T, class S>
struct Weights {
  const S* data;
  int64_t group, out, in, h, w;
  const S* scale = nullptr;
};

// Output channels in panels of kColumns, the last one of a single vector where that is enough.
template <class T>
inline int64_t padded_channels(int64_t channels) {
  return round_up(channels, kLanes<T>);
}
template <class T>
inline int64_t packed_weights_size(const Pass& pass) {
  return pass.groups * pass.depth() * padded_channels<T>(pass.out_channels);
}

// How the weights of an output channel lie in memory: in one piece, [channel][tap] or [tap][channel], or not.
enum class WeightOrder { taps_inside, channels_inside, scattered };
template <class T, class S>
inline WeightOrder weight_order(const Pass& pass, const Weights<T, S>& weights) {
  const int64_t C = pass.channels, taps_h = pass.h.axis.taps, taps_w = pass.w.axis.taps;
  const auto lie = [&](int64_t in, int64_t h, int64_t w) {
    return (C == 1 || weights.in == in) && (taps_h == 1 || weights.h == h) && (taps_w == 1 || weights.w == w);
  };
  return lie(taps_h * taps_w, taps_w, 1) ? WeightOrder::taps_inside
         : lie(1, taps_w * C, C)         ? WeightOrder::channels_inside
                                         : WeightOrder::scattered;
}

// The weights of up to W output channels, lanes of a vector, at one tap and source channel; lanes past them are 0.
template <class T, class S>
INLINE vec<T> weight_vector(const S* source, int64_t step, int64_t lanes) {
  if (step == 1) return read_lanes<T>(source, lanes);
  T values[kLanes<T>] = {};
  for (int64_t j = 0; j < std::min<int64_t>(lanes, kLanes<T>); ++j) values[j] = to_compute(source[j * step]);
  return load(values);
}

// [group][panel][taps * channels][columns of the panel]; a panel begins at (its first column) * depth.
template <class T, class S>
NOINLINE void pack_weights(T* packed, const Pass& pass, const Weights<T, S>& weights) {
  constexpr int64_t kColumns = ConvTile<T>::kColumns, W = kLanes<T>;
  const int64_t depth = pass.depth(), padded = padded_channels<T>(pass.out_channels), C = pass.channels;
  const int64_t vectors = padded / W, taps_h = pass.h.axis.taps, taps_w = pass.w.axis.taps;
  // Where the weights of an output channel lie in one piece, squares of W x W are transposed in registers.
  const WeightOrder order = weight_order(pass, weights);
  const bool rows = order != WeightOrder::scattered;
  // A scatter finds the taps of two channels in one piece and the next output channel's beside them.
  const bool tap_pieces = !rows && weights.w == 1 && (taps_h == 1 || weights.h == taps_w);
  const bool taps_inside = order == WeightOrder::taps_inside || tap_pieces;
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, depth * W));
  torch::stable::parallel_for(0, pass.groups * vectors, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = i / vectors, first = i % vectors * W, panel = first / kColumns * kColumns;
      const int64_t columns = std::min(kColumns, padded - panel), lanes = std::min(W, pass.out_channels - first);
      T* out = packed + (g * padded + panel) * depth + first - panel;
      const S* source = weights.data + g * weights.group + first * weights.out;
      const auto scaled = [&](vec<T> v, int64_t c) { return weights.scale ? v * to_compute(weights.scale[g * C + c]) : v; };
      if (rows || tap_pieces) {
        const int64_t pieces = rows ? 1 : C, length = rows ? depth : taps_h * taps_w;
        for (int64_t piece = 0; piece < pieces; ++piece)
          for (int64_t k = 0, c = piece, kh = 0, kw = 0; k < length; k += W) {
            const int64_t count = std::min(W, length - k);
            vec<T> m[W];
#pragma GCC unroll 16
            for (int j = 0; j < W; ++j)
              m[j] = j < lanes ? read_lanes<T>(source + piece * weights.in + j * weights.out + k, count) : vec<T>{};
            transpose<T>(m);
            for (int64_t j = 0; j < count; ++j) {
              store(out + (pass.weight_row(kh, kw) + c) * columns, scaled(m[j], c));
              if (!taps_inside && ++c < C) continue;
              if (!taps_inside) c = 0;
              if (++kw == taps_w) kw = 0, ++kh;
              if (taps_inside && kh == taps_h) kh = 0, ++c;
            }
          }
      } else {
        for (int64_t kh = 0; kh < taps_h; ++kh)
          for (int64_t kw = 0; kw < taps_w; ++kw)
            for (int64_t c = 0; c < C; ++c)
              store(out + (pass.weight_row(kh, kw) + c) * columns,
                    scaled(weight_vector<T>(source + c * weights.in + kh * weights.h + kw * weights.w, weights.out, lanes), c));
      }
    }
  });
}

// [group][panel][taps * pairs of channels][columns of the panel][2], from the packed weights of pack_weights.
template <class T>
inline void pack_pairs(bfloat16* pairs, const Pass& pass, const T* packed) {
  constexpr int64_t kColumns = ConvTile<T>::kColumns, W = kLanes<T>;
  const int64_t C = pass.channels, E = round_up(C, 2), taps = pass.h.axis.taps * pass.w.axis.taps;
  const int64_t padded = padded_channels<T>(pass.out_channels), panels = (padded + kColumns - 1) / kColumns;
  const int64_t grain = std::max<int64_t>(1, 32768 / (C * kColumns));
  torch::stable::parallel_for(0, pass.groups * panels * taps, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = i / (panels * taps), first = i / taps % panels * kColumns, tap = i % taps;
      const int64_t columns = std::min(kColumns, padded - first);
      const T* in = packed + (g * padded + first) * taps * C + tap * C * columns;
      bfloat16* out = pairs + (g * padded + first) * taps * E + tap * E * columns;
      for (int64_t c = 0; c < C; c += 2)
        for (int64_t j = 0; j < columns; j += W) {
          const T* row = in + c * columns + j;
          const auto both = round_pairs(load(row), c + 1 < C ? load(row + columns) : vec<T>{});
          std::memcpy(out + c * columns + 2 * j, &both, sizeof both);
        }
    }
  });
}

// acc += rows of A (at a, one `row_stride` apart, their elements one `step`) times `depth` packed rows of kVectors vectors.
// Rows in fours share a pointer: x86 addresses three multiples of one stride, so no row needs a register of its own.
template <int kRows, int kVectors, class T>
INLINE void multiply_rows(vec<T> (&acc)[kRows][kVectors], const T* a, int64_t row_stride, const T* b, int64_t depth, int64_t step = 1) {
  constexpr int W = kLanes<T>, kGroups = (kRows + 3) / 4;
  const int64_t row_stride3 = 3 * row_stride;
  const T* p[kGroups];
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) p[g] = a + 4 * g * row_stride;
  for (int64_t k = 0; k < depth; ++k) {
    vec<T> bk[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) bk[v] = load(b + v * W);
    b += kVectors * W;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const T* row = p[r / 4];
      const vec<T> ar = broadcast<T>(r % 4 == 0   ? row[0]
                                     : r % 4 == 1 ? row[row_stride]
                                     : r % 4 == 2 ? row[2 * row_stride]
                                                  : row[row_stride3]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] += ar * bk[v];
    }
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) p[g] += step;
  }
}

// y (+)= acc, and acc = 0.
template <int kRows, int kVectors, class T>
INLINE void flush(vec<T> (&acc)[kRows][kVectors], T* y, int64_t y_stride, bool add) {
  constexpr int W = kLanes<T>;
  const auto write = [&](bool adds) {
    asm("" : "+r"(y));  // else GCC computes the address of every vector before the products, whose registers it then lacks
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        T* out = y + r * y_stride + v * W;
        store(out, adds ? load(out) + acc[r][v] : acc[r][v]);
        acc[r][v] = vec<T>{};
      }
  };
  if (add)
    write(true);
  else
    write(false);
}

// kRows outputs, `row_stride` apart in the source block and `y_stride` apart in y. add: to what y holds.
template <int kRows, int kVectors, class T>
NOINLINE void conv_tile(const T* a, int64_t row_stride, const Tap* taps, int64_t count, const T* panel, T* y, int64_t y_stride, bool add) {
  constexpr int W = kLanes<T>;
  vec<T> acc[kRows][kVectors] = {};
  for (int64_t i = 0; i < count; ++i) {
    if (taps[i].begins && i > 0) {
      flush<kRows, kVectors, T>(acc, y, y_stride, add);
      add = true;
    }
    multiply_rows<kRows, kVectors, T>(acc, a + taps[i].source, row_stride, panel + taps[i].weight * kVectors * W, taps[i].depth);
  }
  flush<kRows, kVectors, T>(acc, y, y_stride, add);
}

#if ISA_VECTOR_BYTES == 64
// As multiply_rows, of bfloat16 numbers whose steps come in pairs: row k of B is [kVectors vectors of columns][2].
template <int kRows, int kVectors>
__attribute__((target("avx512bf16"), always_inline)) inline void multiply_row_pairs(vec<float> (&acc)[kRows][kVectors], const bfloat16* a,
                                                                                    int64_t row_stride, const bfloat16* b, int64_t pairs) {
  constexpr int W = kLanes<float>, kGroups = (kRows + 3) / 4;
  const int64_t row_stride3 = 3 * row_stride;
  const bfloat16* p[kGroups];
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) p[g] = a + 4 * g * row_stride;
  for (int64_t k = 0; k < pairs; ++k) {
    __m512bh bk[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) std::memcpy(&bk[v], b + v * 2 * W, sizeof bk[v]);
    b += kVectors * 2 * W;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const bfloat16* row = p[r / 4];
      int32_t pair;
      std::memcpy(&pair,
                  r % 4 == 0   ? row
                  : r % 4 == 1 ? row + row_stride
                  : r % 4 == 2 ? row + 2 * row_stride
                               : row + row_stride3,
                  sizeof pair);
      const __m512bh both = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        acc[r][v] = reinterpret_cast<vec<float>>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(acc[r][v]), both, bk[v]));
    }
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) p[g] += 2;
  }
}

template <int kRows, int kVectors, class T>
__attribute__((target("avx512bf16"))) inline void conv_tile(const bfloat16* a, int64_t row_stride, const Tap* taps, int64_t count,
                                                            const bfloat16* panel, T* y, int64_t y_stride, bool add) {
  vec<T> acc[kRows][kVectors] = {};
  for (int64_t i = 0; i < count; ++i) {
    if (taps[i].begins && i > 0) {
      flush<kRows, kVectors, T>(acc, y, y_stride, add);
      add = true;
    }
    const bfloat16* weights = panel + taps[i].weight * kVectors * kLanes<T>;
    multiply_row_pairs<kRows, kVectors>(acc, a + taps[i].source, row_stride, weights, taps[i].depth / 2);
  }
  flush<kRows, kVectors, T>(acc, y, y_stride, add);
}
#endif

// f(first, count, rows as a constant) for runs of `count` tiles of the same size; they are of as equal a size as can be and cover `pixels`.
template <class T, class F>
INLINE void each_run_of_tiles(int64_t pixels, F f) {
  constexpr int kRows = ConvTile<T>::kRows;
  int64_t tiles = (pixels + kRows - 1) / kRows;
  for (int64_t p = 0; tiles > 0;) {
    const int64_t rows = (pixels - p + tiles - 1) / tiles, larger = (pixels - p) % tiles, count = larger > 0 ? larger : tiles;
    with_constant<kRows>(rows, [&](auto constant) { f(p, count, constant); });
    p += count * rows, tiles -= count;
  }
}
// f(first, rows as a constant) for each of those tiles.
template <class T, class F>
INLINE void each_tile(int64_t pixels, F f) {
  each_run_of_tiles<T>(pixels, [&](int64_t first, int64_t count, auto rows) {
    for (int64_t i = 0; i < count; ++i) f(first + i * rows.value, rows);
  });
}

template <int kVectors, class T, class M>
NOINLINE void conv_row(int64_t pixels, const M* a, int64_t row_stride, const Tap* taps, int64_t count, const M* panel, T* y,
                        int64_t y_stride, bool add) {
  each_tile<T>(pixels, [&](int64_t p, auto rows) {
    conv_tile<rows.value, kVectors, T>(a + p * row_stride, row_stride, taps, count, panel, y + p * y_stride, y_stride, add);
  });
}

#define CONV_ROW(vectors, T) \
  CONV_PRODUCT void conv_row<vectors, T>(int64_t, const T*, int64_t, const Tap*, int64_t, const T*, T*, int64_t, bool);
CONV_ROW(1, float)
CONV_ROW(2, float)
CONV_ROW(1, double)
CONV_ROW(2, double)
#undef CONV_ROW
#if ISA_VECTOR_BYTES == 64
CONV_PRODUCT void conv_row<1, float>(int64_t, const bfloat16*, int64_t, const Tap*, int64_t, const bfloat16*, float*, int64_t, bool);
CONV_PRODUCT void conv_row<2, float>(int64_t, const bfloat16*, int64_t, const Tap*, int64_t, const bfloat16*, float*, int64_t, bool);
#endif
CONV_PRODUCT void pack_weights(float*, const Pass&, const Weights<float, float>&);
CONV_PRODUCT void pack_weights(float*, const Pass&, const Weights<float, bfloat16>&);
CONV_PRODUCT void pack_weights(double*, const Pass&, const Weights<double, double>&);

// Terms summed up before the next row of pixels: their part of a panel of weights stays in the first-level cache.
template <class M>
inline constexpr int64_t kDepthBlock = 192 * sizeof(float) / std::min(sizeof(M), sizeof(float));

// The outputs of one band and group into y, from sources whose first row and column are the lowest that the band reads.
template <class T, class M>
inline void direct_band(const Pass& pass, const Band& band, const std::vector<std::vector<Tap>>& taps, const M* packed, const M* source,
                        int64_t row_step, int64_t pixel_step, T* y, int64_t y_columns) {
  constexpr int64_t kColumns = ConvTile<T>::kColumns;
  const int64_t padded = padded_channels<T>(pass.out_channels), depth = pass.depth(), step = pass.w.phases();
  const int64_t row0 = pass.h.lowest(band.top), column0 = pass.w.lowest(band.left);
  const int64_t blocks = std::max<int64_t>(1, depth / (pass.h.phases() * step * kDepthBlock<M>));
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t first = 0; first < padded; first += kColumns) {
      const M* panel = packed + first * depth;
      for (int64_t r = band.top; r < band.bottom; ++r)
        for (int64_t phase = 0; phase < step; ++phase) {
          const int64_t column = pass.w.first_of_phase(band.left, phase);
          if (column >= band.right) continue;
          const int64_t pixels = (band.right - column + step - 1) / step;
          const auto& list = taps[pass.h.phase_of(r) * step + phase];
          const int64_t size = list.size(), begin = size * block / blocks, count = size * (block + 1) / blocks - begin;
          if (block > 0 && count == 0) continue;
          const M* a = source + (pass.h.base(r) - row0) * row_step + (pass.w.base(column) - column0) * pixel_step;
          T* out = y + ((r - band.top) * y_columns + column - band.left) * padded + first;
          const int64_t row_stride = pass.w.source_step() * pixel_step, y_stride = step * padded;
          if (padded - first >= kColumns)
            conv_row<2, T>(pixels, a, row_stride, list.data() + begin, count, panel, out, y_stride, block > 0);
          else
            conv_row<1, T>(pixels, a, row_stride, list.data() + begin, count, panel, out, y_stride, block > 0);
        }
    }
}

// Runs compute(scratch, n, group, band, y) and then sink(n, group, i, y, y_columns, y_stride) for band i of each image and group. Rows
// that the windows of a band share with those of the band above it are computed once, where the same thread has just done so: `band`
// is what is left. y is where its first row belongs; `rim` rows before and after those of the band may be written as well. `scratch` is
// `scratch_size` numbers of type M.
template <class T, class M, class Sink, class Compute>
inline void each_band(const Pass& pass, const Bands& bands, int64_t y_columns, int64_t scratch_size, int64_t rim, const Sink& sink,
                      const Compute& compute) {
  const int64_t padded = padded_channels<T>(pass.out_channels), y_row = y_columns * padded;
  const int64_t per_image = bands.count(), per_group = pass.batch * per_image;
  const int64_t shared_rows = bands.across() == 1 ? std::max<int64_t>(0, bands.window.h - bands.window.stride_h) : 0;
  torch::stable::parallel_for(0, pass.groups * per_group, 1, [&](int64_t begin, int64_t end) {
    Scratch<M> scratch(scratch_size);
    Scratch<T> with_rim((bands.full_rows() + 2 * rim) * y_row + kLanes<T>), kept(shared_rows * y_row);
    T* y = with_rim.get() + rim * y_row;
    int64_t kept_bottom = -1;  // the row of the image below those that are kept
    for (int64_t task = begin; task < end; ++task) {
      const int64_t g = task / per_group, n = task % per_group / per_image, i = task % per_image;
      const Band whole = bands.full(i);
      Band band = whole;
      if (i > 0 && kept_bottom > whole.top) band.top = kept_bottom;
      const int64_t known = band.top - whole.top;
      compute(scratch.get(), n, g, band, y + known * y_row);
      // Afterwards: the row before the band may have been written, and need not be the one that is kept.
      if (known > 0) std::memcpy(y, kept.get() + (shared_rows - known) * y_row, known * y_row * sizeof(T));
      if (shared_rows > 0 && whole.rows() >= shared_rows) {  // before the sink, which may change what it is given
        std::memcpy(kept.get(), y + (whole.rows() - shared_rows) * y_row, shared_rows * y_row * sizeof(T));
        kept_bottom = whole.bottom;
      } else {
        kept_bottom = -1;
      }
      sink(n, g, i, y, y_columns, padded);
    }
  });
}

// Runs the pass over all bands. A pointwise pass reads a source whose channels are adjacent where it lies. `packed` are weights in the
// compute type or in pairs.
template <class T, class M, class Source, class Sink>
inline void direct_pass(const Pass& given, const Bands& bands, const M* packed, const Source& source, const Sink& sink) {
  const Pass pass = std::is_same_v<T, M> ? given : pass_of_pairs(given);
  const int64_t group_weights = padded_channels<T>(pass.out_channels) * pass.depth(), C = pass.channels, source_channels = given.channels;
  const int64_t y_columns = bands.full_columns(), columns = pass.w.span(y_columns), rows = pass.h.span(bands.full_rows());
  const auto taps = pass.taps(columns, C);
  const Image<const M> in_place = sources_in_place<T, M>(given, source);
  const int64_t block_size = in_place.data ? 0 : rows * columns * C;
  each_band<T, M>(pass, bands, y_columns, block_size, 0, sink, [&](M* block, int64_t n, int64_t g, const Band& band, T* y) {
    const M* weights = packed + g * group_weights;
    if (in_place.data) {
      const M* first = in_place.data + n * in_place.n + g * C + band.top * in_place.h + band.left * in_place.w;
      direct_band<T>(pass, band, taps, weights, first, in_place.h, in_place.w, y, y_columns);
    } else {
      load_operands<T>(block, C, columns, source, n, g * source_channels, source_channels, pass.h.lowest(band.top),
                       pass.h.span(band.rows()), pass.w.lowest(band.left), pass.w.span(band.columns()));
      direct_band<T>(pass, band, taps, weights, block, columns * C, C, y, y_columns);
    }
  });
}

// As direct_pass, of pixels that lie side by side and whose taps of a row are channels (row_pairs_apply). The 0 at the end of a row of
// weights meets the pixel after it, which must be finite.
template <class T, class Source, class Sink>
inline void row_pairs_pass(const Pass& given, const Bands& bands, const bfloat16* packed, const Source& source, const Sink& sink) {
  const Pass pass = pass_of_pairs(pass_of_rows(given));
  const int64_t C = given.channels, y_columns = bands.full_columns(), columns = given.w.span(y_columns);
  const auto taps = pass.taps(columns, C);
  const int64_t block_size = given.h.span(bands.full_rows()) * columns * C + 1;
  each_band<T, bfloat16>(given, bands, y_columns, block_size, 0, sink, [&](bfloat16* block, int64_t n, int64_t, const Band& band, T* y) {
    const int64_t rows = given.h.span(band.rows());
    load_operands<T>(block, C, columns, source, n, 0, C, given.h.lowest(band.top), rows, given.w.lowest(band.left), columns);
    block[rows * columns * C] = {0};
    direct_band<T>(pass, band, taps, packed, block, columns * C, C, y, y_columns);
  });
}

// The sink of a pass whose result is a plain tensor.
template <class T, class S>
struct TensorSink {
  Image<S> out;
  const Bands* bands;
  int64_t channels;  // per group; the last may have fewer
  DirectOutput<T> direct(int64_t n, int64_t g, const Band& band) const { return direct_output<T>(out, n, g * channels, band); }
  void operator()(int64_t n, int64_t g, int64_t i, T* y, int64_t y_columns, int64_t y_stride) const {
    const Band band = bands->full(i);
    const int64_t count = std::min(channels, out.channels - g * channels);
    store_block<T>(y, y_stride, y_columns, out, n, g * channels, count, band.top, band.rows(), band.left, band.columns());
  }
};
