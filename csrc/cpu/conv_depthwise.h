// Depthwise passes (see Pass in conv_geometry.h): one source channel and one output channel per group. Included by
// for_each_isa.h inside the namespace of each instruction set.
//
// Lanes are channels. A source whose channels are adjacent in memory is read where it lies, and an output of that kind is written
// from the registers, with bias, folded norm and ReLU, in one pass over memory; any other goes through padded blocks, channels
// innermost, and the sink of every other pass, whose group is a chunk of channels. Pixels outside the image are read from a row
// of zeros: a tile finds its sources by a table of pointers, one per column and row of taps, so no tap tests a border. A tile
// sums kPixels neighbouring outputs, of two rows where registers allow it; each source vector is loaded once and serves all of
// them that it reaches.
//
// Floor: bytes. The source read and the output written once; one multiply-add per tap and output at two vectors a cycle is
// below that up to 5x5, and above it for 7x7. On one Zen 5 core 3x3 takes 12 cycles per vector of outputs (floor 4.5 of
// multiply-adds), 7x7 takes 34 (floor 24.5). A ring of rows that fits the first-level cache, in chunks of two vectors, makes the
// sums faster and the whole slower: 23 cycles for 3x3, most of them the copy in runs of two cache lines. What memory does not find in
// the third-level cache took twice as long until tiles of 3x3 asked for the next one's sources.

template <class T>
inline constexpr int64_t kDepthwiseChannels = 16 * kLanes<T>;

inline bool is_depthwise(const Pass& pass) { return pass.channels == 1 && pass.out_channels == 1 && pass.groups > 1; }

// [KH][KW][channels padded to whole vectors].
template <class T, class S>
inline void pack_depthwise(T* packed, const Pass& pass, const Weights<T, S>& weights) {
  const int64_t padded = padded_channels<T>(pass.groups);
  std::memset(packed, 0, pass.depth() * padded * sizeof(T));
  for (int64_t kh = 0; kh < pass.h.axis.taps; ++kh)
    for (int64_t kw = 0; kw < pass.w.axis.taps; ++kw) {
      T* row = packed + (kh * pass.w.axis.taps + kw) * padded;
      for (int64_t c = 0; c < pass.groups; ++c)
        row[c] = to_compute(weights.data[c * weights.group + kh * weights.h + kw * weights.w]) *
                 (weights.scale ? to_compute(weights.scale[c]) : T(1));
    }
}

// Pixels [top, bottom) x [left, right) of a chunk of channels, `data` at the first; any other pixel is 0.
template <class E>
struct Pixels {
  const E* data;
  int64_t row_step, pixel_step;
  int64_t top, bottom, left, right;
  const E* zeros;  // of a whole chunk

  bool has_row(int64_t row) const { return row >= top && row < bottom; }
  const E* at(int64_t row, int64_t column) const {
    return column >= left && column < right ? data + (row - top) * row_step + (column - left) * pixel_step : zeros;
  }
};

// What a tile reads and writes. `sources` and `weights` hold one entry per row of taps. A tile of two rows of outputs reads the
// sources of both: the first `lead` rows are only those of the first, the last `trail` only those of the second.
template <class T, class E>
struct DepthwiseTile {
  int64_t rows, taps;       // of taps
  const E* const* sources;  // [rows][columns of the tile]
  const T* const* weights;  // [rows] of the first output row
  int64_t weight_step;      // from one tap to the next
  int64_t sum_length;
  int64_t channels;
  T* y;
  int64_t y_step;
  int64_t lead = 0, trail = 0;
  const T* const* second_weights = nullptr;
  int64_t y_row = 0;
  int64_t ahead = 0;  // from a source to that of the next tile
  const T *alpha = nullptr, *beta = nullptr;  // where given, y becomes max(y * alpha + beta, floor), NaN staying NaN
  T floor = 0;

  // Asks for the line that a sum will be stored to, which takes as long to come as the sum.
  INLINE void fetch(int64_t row, int64_t p, int64_t c) const { __builtin_prefetch(y + row * y_row + p * y_step + c, 1); }
  INLINE vec<T> finish(vec<T> sum, int64_t c) const {
    const vec<T> z = sum * load(alpha + c) + load(beta + c);
    return z < floor ? broadcast(floor) : z;
  }
  // The sums of kPixels outputs of one row.
  template <int kPixels>
  INLINE void put(const vec<T> (&sum)[kPixels], int64_t row, int64_t c) const {
    T* out = y + row * y_row + c;
    if (alpha) {
#pragma GCC unroll 16
      for (int p = 0; p < kPixels; ++p) store(out + p * y_step, finish(sum[p], c));
    } else {
#pragma GCC unroll 16
      for (int p = 0; p < kPixels; ++p) store(out + p * y_step, sum[p]);
    }
  }
};

// Channels in whole vectors. The last vector of those that are no multiple of one overlaps the one before it.
template <class T, class F>
INLINE void each_channel_vector(int64_t channels, F f) {
  constexpr int64_t W = kLanes<T>;
  for (int64_t c = 0; c + W <= channels; c += W) f(c);
  if (channels % W) f(channels - W);
}

// Outputs kStride sources apart, kTaps of them neighbours: column j of the tile is source j of the first output.
template <int kTaps, int kStride, int kPixels, class T, class E>
void depthwise_tile(const DepthwiseTile<T, E>& tile) {
  constexpr int kColumns = (kPixels - 1) * kStride + kTaps;
  const int64_t rows_per_sum = std::max<int64_t>(1, (tile.sum_length + kTaps - 1) / kTaps);
  each_channel_vector<T>(tile.channels, [&](int64_t c) __attribute__((always_inline)) {
    int64_t row = 0;
#pragma GCC unroll 16
    for (int p = 0; p < kPixels; ++p) tile.fetch(0, p, c);
    vec<T> total[kPixels] = {};
    do {
      vec<T> sum[kPixels] = {};
      for (const int64_t end = std::min(tile.rows, row + rows_per_sum); row < end; ++row) {
        const E* const* source = tile.sources + row * kColumns;
        const T* weight = tile.weights[row] + c;
        vec<T> w[kTaps];
#pragma GCC unroll 8
        for (int k = 0; k < kTaps; ++k) w[k] = load(weight + k * tile.weight_step);
#pragma GCC unroll 32
        for (int j = 0; j < kColumns; ++j) {
          const vec<T> x = load(source[j] + c);
#pragma GCC unroll 8
          for (int k = 0; k < kTaps; ++k)
            if ((j - k) % kStride == 0 && j >= k && (j - k) / kStride < kPixels) sum[(j - k) / kStride] += x * w[k];
        }
      }
#pragma GCC unroll 16
      for (int p = 0; p < kPixels; ++p) total[p] += sum[p];
    } while (row < tile.rows);
    tile.template put<kPixels>(total, 0, c);
  });
}

// The same for two rows of outputs whose taps, all of one sum, are one row apart: a source serves both, which halves what is
// read from the second-level cache and leaves the multiply-adds twice as many independent sums. A tile asks for the sources that the
// next one is the first to read, two rows of them: no hardware prefetcher follows so many runs at once.
template <int kTaps, int kStride, int kPixels, class T, class E>
void depthwise_pair_tile(const DepthwiseTile<T, E>& tile) {
  constexpr int kColumns = (kPixels - 1) * kStride + kTaps, kSecondLevel = 2;
  constexpr bool kFetches = kTaps <= 3;  // more taps leave the memory time enough
  each_channel_vector<T>(tile.channels, [&](int64_t c) __attribute__((always_inline)) {
    vec<T> first[kPixels] = {}, second[kPixels] = {};
#pragma GCC unroll 16
    for (int p = 0; p < kPixels; ++p) tile.fetch(0, p, c), tile.fetch(1, p, c);
    const auto add = [&](int64_t row, auto in_first, auto in_second) __attribute__((always_inline)) {
      const E* const* source = tile.sources + row * kColumns;
      vec<T> w[kTaps], v[kTaps];
#pragma GCC unroll 8
      for (int k = 0; k < kTaps; ++k) {
        if constexpr (in_first.value) w[k] = load(tile.weights[row] + c + k * tile.weight_step);
        if constexpr (in_second.value) v[k] = load(tile.second_weights[row] + c + k * tile.weight_step);
      }
#pragma GCC unroll 32
      for (int j = 0; j < kColumns; ++j) {
        const vec<T> x = load(source[j] + c);
        if constexpr (kFetches)
          if (j >= kTaps - kStride && row >= tile.rows - 2) __builtin_prefetch(source[j] + c + tile.ahead, 0, kSecondLevel);
#pragma GCC unroll 8
        for (int k = 0; k < kTaps; ++k)
          if ((j - k) % kStride == 0 && j >= k && (j - k) / kStride < kPixels) {
            if constexpr (in_first.value) first[(j - k) / kStride] += x * w[k];
            if constexpr (in_second.value) second[(j - k) / kStride] += x * v[k];
          }
      }
    };
    int64_t row = 0;
    for (; row < tile.lead; ++row) add(row, std::true_type(), std::false_type());
    for (; row < tile.rows - tile.trail; ++row) add(row, std::true_type(), std::true_type());
    for (; row < tile.rows; ++row) add(row, std::false_type(), std::true_type());
    tile.template put<kPixels>(first, 0, c);
    tile.template put<kPixels>(second, 1, c);
  });
}

// Any number of taps, any distance between outputs and between taps: column p * taps + k of the tile is source k of output p.
template <int kPixels, class T, class E>
void depthwise_tile_of_any(const DepthwiseTile<T, E>& tile) {
  each_channel_vector<T>(tile.channels, [&](int64_t c) __attribute__((always_inline)) {
    vec<T> sum[kPixels] = {}, total[kPixels] = {};
    int64_t terms = 0;
    for (int64_t row = 0; row < tile.rows; ++row)
      for (int64_t k = 0; k < tile.taps; ++k) {
        if (terms++ == tile.sum_length) {
          terms = 1;
#pragma GCC unroll 16
          for (int p = 0; p < kPixels; ++p) total[p] += sum[p], sum[p] = vec<T>{};
        }
        const vec<T> w = load(tile.weights[row] + k * tile.weight_step + c);
        const E* const* source = tile.sources + row * kPixels * tile.taps + k;
#pragma GCC unroll 16
        for (int p = 0; p < kPixels; ++p) sum[p] += load(source[p * tile.taps] + c) * w;
      }
#pragma GCC unroll 16
    for (int p = 0; p < kPixels; ++p) total[p] += sum[p];
    tile.template put<kPixels>(total, 0, c);
  });
}

// The taps of one phase of an axis (see PassAxis), in the order of their sources: tap `first` + i * tap_step reads the source
// `offset` + i * step from the base.
struct TapLine {
  int64_t count = 0, first = 0, tap_step = 0, offset = 0, step = 1;

  TapLine(const PassAxis& axis, int64_t phase) {
    for (int64_t tap = 0, at; tap < axis.axis.taps; ++tap) {
      if (!axis.tap_offset(phase, tap, &at)) continue;
      if (count == 0) first = tap, offset = at;
      if (count == 1) tap_step = tap - first, step = at - offset;
      ++count;
    }
    if (step < 0) {
      first += (count - 1) * tap_step, offset += (count - 1) * step;
      tap_step = -tap_step, step = -step;
    }
  }
};

// How the outputs of one phase of a row share their sources.
struct DepthwiseRow {
  TapLine taps;
  int64_t stride;  // sources from one output to the next
  int64_t comb;    // taps this far apart take every comb-th output at a time
  bool shared;     // each source serves several outputs

  DepthwiseRow(const PassAxis& axis, int64_t phase) : taps(axis, phase), stride(axis.source_step()) {
    comb = stride == 1 ? taps.step : 1;
    shared = taps.step == comb;
  }
  // The kernel of a tile of kPixels: one of Kernels that share sources, or null.
  template <class Kernels, int kPixels>
  typename Kernels::Kernel find() const {
    return shared ? find_code<Kernels, kPixels>(typename Kernels::Codes()) : nullptr;
  }
  // The same, or the one for any taps.
  template <class Kernels, int kPixels>
  typename Kernels::Kernel choose() {
    if (const auto kernel = find<Kernels, kPixels>()) return kernel;
    shared = false, comb = 1;
    return Kernels::template any<kPixels>();
  }

  int64_t tile_columns(int64_t pixels) const { return shared ? (pixels - 1) * stride + taps.count : pixels * taps.count; }
  // The source, from that of the row's first output, of a column of a tile whose first output is `pixel`.
  int64_t source(int64_t pixel, int64_t column) const {
    if (shared) return taps.offset + pixel % comb + (pixel / comb * stride + column) * comb;
    return taps.offset + (pixel + column / taps.count) * stride + column % taps.count * taps.step;
  }

 private:
  // Codes are ten times the number of taps, plus the stride.
  template <class Kernels, int kPixels, int... kCodes>
  typename Kernels::Kernel find_code(std::integer_sequence<int, kCodes...>) const {
    typename Kernels::Kernel kernel = nullptr;
    ((taps.count == kCodes / 10 && stride == kCodes % 10 ? kernel = Kernels::template shared<kCodes / 10, kCodes % 10, kPixels>() : kernel),
     ...);
    return kernel;
  }
};

template <class T, class E>
struct DepthwiseKernels {
  // Double precision is there to check the gradients, not for speed.
  using Codes = std::conditional_t<std::is_same_v<T, double>, std::integer_sequence<int>,
                                   std::integer_sequence<int, 31, 51, 71, 11, 21, 41, 32, 52, 72>>;
  using Kernel = void (*)(const DepthwiseTile<T, E>&);
  template <int kTaps, int kStride, int kPixels>
  static Kernel shared() {
    return depthwise_tile<kTaps, kStride, kPixels, T, E>;
  }
  template <int kPixels>
  static Kernel any() {
    return depthwise_tile_of_any<kPixels, T, E>;
  }
};

template <class T, class E>
struct DepthwisePairKernels {
  // Two rows of sums and the weights of both need 32 registers.
  using Codes = std::conditional_t<ISA_VECTOR_BYTES == 64 && !std::is_same_v<T, double>, std::integer_sequence<int, 31, 51, 71>,
                                   std::integer_sequence<int>>;
  using Kernel = void (*)(const DepthwiseTile<T, E>&);
  template <int kTaps, int kStride, int kPixels>
  static Kernel shared() {
    return depthwise_pair_tile<kTaps, kStride, kPixels, T, E>;
  }
};

// Everything about a pass that does not depend on where its sources lie.
template <class T, class E>
struct DepthwisePlan {
  static constexpr int kPixels = 8, kFewPixels = 4;  // of a tile, and of the last one of a row where that is enough
  using Tile = DepthwiseTile<T, E>;
  using Kernel = void (*)(const Tile&);
  struct Phase {
    DepthwiseRow row;
    Kernel kernel, last_kernel, pair_kernel, last_pair_kernel;
    Phase(const PassAxis& axis, int64_t phase);
  };
  const Pass& pass;
  std::vector<TapLine> rows;
  std::vector<Phase> columns;
  int64_t most_columns = 0, most_comb = 1, overhang = 0;  // of a tile; of outputs past the end of a row
  bool pairs;                                             // rows of outputs are computed two at a time

  explicit DepthwisePlan(const Pass& pass) : pass(pass) {
    for (int64_t phase = 0; phase < pass.h.phases(); ++phase) rows.emplace_back(pass.h, phase);
    for (int64_t phase = 0; phase < pass.w.phases(); ++phase) {
      const DepthwiseRow& row = columns.emplace_back(pass.w, phase).row;
      most_columns = std::max(most_columns, row.tile_columns(kPixels));
      most_comb = std::max(most_comb, row.comb);
      overhang = std::max(overhang, kPixels * row.comb * pass.w.phases());
    }
    // A row may not be written past its end while the next one is under way, so that pairs need room between rows.
    pairs = rows.size() == 1 && columns.size() == 1 && columns[0].pair_kernel && columns[0].row.comb == 1 && rows[0].step == 1 &&
            pass.h.source_step() == 1 && rows[0].count > 1 && rows[0].count * columns[0].row.taps.count <= pass.sum_length + 1;
  }
  // Whether no tile reaches past the end of a row of `columns` outputs.
  bool fits(int64_t columns) const { return columns >= pass.w.phases() * kFewPixels * most_comb; }
  // The columns of y for rows of `columns` outputs.
  int64_t y_columns(int64_t columns) const { return pairs ? std::max<int64_t>(columns, kFewPixels) : columns; }

  // The outputs of a band into out, whose rows may be written past their ends unless they fit. `weights` begin at the chunk.
  void run(const Band& band, const Pixels<E>& x, const T* weights, int64_t channels, const DirectOutput<T>& out) const;

 private:
  // The table of a tile of `size` outputs from the p-th of its row on.
  static void find_sources(const DepthwiseRow& row, const Pixels<E>& x, const int64_t* source_rows, int64_t rows, int64_t base, int64_t p,
                           int64_t size, const E** sources) {
    if (row.taps.count == 0) return;  // outputs between those that a tap reaches have no sources
    const int64_t count = row.tile_columns(size), first = base + row.source(p, 0);
    if (row.shared && first >= x.left && first + (count - 1) * row.comb < x.right) {
      for (int64_t i = 0; i < rows; ++i) {
        const E* source = x.at(source_rows[i], first);
        for (int64_t j = 0; j < count; ++j) sources[i * count + j] = source + j * row.comb * x.pixel_step;
      }
      return;
    }
    for (int64_t j = 0; j < count; ++j)
      for (int64_t i = 0; i < rows; ++i) sources[i * count + j] = x.at(source_rows[i], base + row.source(p, j));
  }
};

template <class T, class E>
DepthwisePlan<T, E>::Phase::Phase(const PassAxis& axis, int64_t phase)
    : row(axis, phase),
      kernel(row.choose<DepthwiseKernels<T, E>, kPixels>()),
      last_kernel(row.choose<DepthwiseKernels<T, E>, kFewPixels>()),
      pair_kernel(row.find<DepthwisePairKernels<T, E>, kPixels>()),
      last_pair_kernel(row.find<DepthwisePairKernels<T, E>, kFewPixels>()) {}

template <class T, class E>
void DepthwisePlan<T, E>::run(const Band& band, const Pixels<E>& x, const T* weights, int64_t channels, const DirectOutput<T>& out) const {
  const int64_t weight_step = padded_channels<T>(pass.groups), taps_w = pass.w.axis.taps, phases = pass.w.phases(),
                most = pass.h.axis.taps + 1;
  Scratch<const E*> sources(most * most_columns);
  Scratch<const T*> weight_rows(2 * most);
  Scratch<int64_t> source_rows(most);
  for (int64_t r = band.top; r < band.bottom; ++r) {
    const TapLine& line = rows[pass.h.phase_of(r)];
    const int64_t row0 = pass.h.base(r) + line.offset;
    const bool pair = pairs && r + 1 < band.bottom;
    for (int64_t phase = 0; phase < phases; ++phase) {
      const int64_t first = pass.w.first_of_phase(band.left, phase);
      if (first >= band.right) continue;
      const DepthwiseRow& row = columns[phase].row;
      Tile tile{0,
                row.taps.count,
                sources.get(),
                weight_rows.get(),
                row.taps.tap_step * weight_step,
                pass.sum_length,
                channels,
                nullptr,
                row.comb * phases * out.pixel_step,
                0,
                0,
                weight_rows.get() + most,
                out.row_step,
                kPixels * row.stride * x.pixel_step,
                out.alpha,
                out.beta,
                out.floor};
      for (int64_t i = 0; i < line.count + pair && row.taps.count > 0; ++i) {
        if (!x.has_row(row0 + i * line.step)) continue;
        const T* taps = weights + ((line.first + i * line.tap_step) * taps_w + row.taps.first) * weight_step;
        if (pair && i == 0) tile.lead = 1;
        if (pair && i == line.count) tile.trail = 1;
        source_rows[tile.rows] = row0 + i * line.step;
        weight_rows[tile.rows] = taps;
        weight_rows[most + tile.rows++] = taps - line.tap_step * taps_w * weight_step;
      }
      const int64_t pixels = (band.right - first + phases - 1) / phases, base = pass.w.base(first);
      T* y = out.data + (r - band.top) * out.row_step + (first - band.left) * out.pixel_step;
      for (int64_t tooth = 0; tooth < std::min(row.comb, pixels); ++tooth) {
        const int64_t count = (pixels - tooth + row.comb - 1) / row.comb;
        for (int64_t done = 0; done < count;) {
          // The last tile moves back over outputs that are there already, rather than past the end of the row.
          const int64_t size = count - done > kFewPixels && count >= kPixels ? kPixels : kFewPixels;
          const int64_t p = tooth + std::max<int64_t>(0, std::min(done, count - size)) * row.comb;
          find_sources(row, x, source_rows.get(), tile.rows, base, p, size, sources.get());
          tile.y = y + p * phases * out.pixel_step;
          const Phase& kernels = columns[phase];
          (size == kPixels ? pair ? kernels.pair_kernel : kernels.kernel : pair ? kernels.last_pair_kernel : kernels.last_kernel)(tile);
          done += size;
        }
      }
    }
    r += pair;
  }
}

CONV_PRODUCT struct DepthwisePlan<float, float>;
CONV_PRODUCT struct DepthwisePlan<float, bfloat16>;
CONV_PRODUCT struct DepthwisePlan<double, double>;

// Whether the chunks of a tensor's channels can be read where they lie: adjacent, and each with one whole vector at least.
template <class T, class S>
inline bool reads_in_place(const Image<const S>* image) {
  if (!image || image->c != 1) return false;
  const int64_t last = image->channels % kDepthwiseChannels<T>;
  return last == 0 || last >= kLanes<T>;
}

template <class E>
inline Pixels<E> pixels_of(const Image<const E>& image, int64_t n, int64_t c0, const E* zeros) {
  return {image.data + n * image.n + c0, image.h, image.w, 0, image.height, 0, image.width, zeros};
}

// As direct_pass; packed by pack_depthwise.
template <class T, class Source, class Sink>
inline void depthwise_pass(const Pass& pass, const Bands& bands, const T* packed, const Source& source, const Sink& sink) {
  using S = typename Source::Stored;
  constexpr int64_t kChunk = kDepthwiseChannels<T>, W = kLanes<T>;
  const int64_t padded = padded_channels<T>(pass.groups), per_image = bands.count();
  const int64_t chunks = (pass.groups + kChunk - 1) / kChunk;
  const Image<const S>* image = source.plain();
  const bool in_place = reads_in_place<T>(image);
  const DepthwisePlan<T, S> plan(pass);
  const DepthwisePlan<T, T> block_plan(pass);
  const int64_t y_columns = plan.y_columns(bands.full_columns()), y_rows = bands.full_rows(), stride = std::min(kChunk, padded);
  const int64_t columns = pass.w.span(bands.full_columns()), rows = pass.h.span(y_rows);
  torch::stable::parallel_for(0, pass.batch * chunks * per_image, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> block(in_place ? 0 : rows * columns * stride), y((y_rows * y_columns + plan.overhang) * stride + W);
    Scratch<S> zeros(kChunk);
    std::memset(zeros.get(), 0, kChunk * sizeof(S));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / (chunks * per_image), chunk = task / per_image % chunks, i = task % per_image;
      const int64_t c0 = chunk * kChunk, count = std::min(kChunk, pass.groups - c0);
      const Band band = bands.full(i);
      DirectOutput<T> out;
      if (in_place && plan.fits(band.columns())) out = sink.direct(n, chunk, band);
      const bool direct = out.data != nullptr;
      if (!direct) out = {y.get(), y_columns * stride, stride};
      if (in_place) {
        plan.run(band, pixels_of(*image, n, c0, zeros.get()), packed + c0, count, out);
      } else {
        const int64_t row = pass.h.lowest(band.top), column = pass.w.lowest(band.left);
        const int64_t height = pass.h.span(band.rows()), width = pass.w.span(band.columns());
        source.load(block.get(), stride, columns, n, c0, count, row, height, column, width);
        const Pixels<T> x{block.get(), columns * stride, stride, row, row + height, column, column + width, block.get()};
        block_plan.run(band, x, packed + c0, round_up(count, W), out);
      }
      if (!direct) sink(n, chunk, i, y.get(), y_columns, stride);
    }
  });
}
