// Gradients of the weights of a depthwise convolution: weight_gradient (conv_wgrad.h) for one wide and one narrow channel per group.
// Included by for_each_isa.h inside the namespace of each instruction set.
//
// Lanes are channels, as in the pass (conv_depthwise.h), and tensors whose channels are adjacent are read where they lie. A tile
// is a few neighbouring narrow pixels: for each vector of channels they stay in registers while the wide pixels that any tap
// pairs them with go by, and their products are added to the partial sums, which stay in the first-level cache.
//
// Floor: bytes. The wide and the narrow side are read once.

template <class T>
struct DepthwiseGradientTile {
  int64_t rows, taps;      // of taps
  const T* const* wide;    // [rows][columns of the tile], see DepthwiseRow
  const T* const* narrow;  // [pixels]
  T* const* dw;            // [rows]
  int64_t dw_step;         // from one tap to the next
  int64_t channels;
};

template <int kTaps, int kStride, int kPixels, class T>
void depthwise_gradient_tile(const DepthwiseGradientTile<T>& tile) {
  constexpr int kColumns = (kPixels - 1) * kStride + kTaps;
  constexpr int64_t W = kLanes<T>;
  for (int64_t c = 0; c < tile.channels; c += W) {
    const int64_t lanes = tile.channels - c;
    vec<T> d[kPixels];
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) d[p] = read_lanes<T>(tile.narrow[p] + c, lanes);
    for (int64_t row = 0; row < tile.rows; ++row) {
      const T* const* wide = tile.wide + row * kColumns;
      T* dw = tile.dw[row] + c;
      vec<T> sum[kTaps] = {};
#pragma GCC unroll 32
      for (int j = 0; j < kColumns; ++j) {
        const vec<T> x = read_lanes<T>(wide[j] + c, lanes);
#pragma GCC unroll 8
        for (int k = 0; k < kTaps; ++k)
          if ((j - k) % kStride == 0 && j >= k && (j - k) / kStride < kPixels) sum[k] += x * d[(j - k) / kStride];
      }
#pragma GCC unroll 8
      for (int k = 0; k < kTaps; ++k) store(dw + k * tile.dw_step, load(dw + k * tile.dw_step) + sum[k]);
    }
  }
}

template <int kPixels, class T>
void depthwise_gradient_tile_of_any(const DepthwiseGradientTile<T>& tile) {
  constexpr int64_t W = kLanes<T>;
  for (int64_t c = 0; c < tile.channels; c += W) {
    const int64_t lanes = tile.channels - c;
    vec<T> d[kPixels];
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) d[p] = read_lanes<T>(tile.narrow[p] + c, lanes);
    for (int64_t row = 0; row < tile.rows; ++row)
      for (int64_t k = 0; k < tile.taps; ++k) {
        const T* const* wide = tile.wide + row * kPixels * tile.taps + k;
        T* dw = tile.dw[row] + k * tile.dw_step + c;
        vec<T> sum = load(dw);
#pragma GCC unroll 8
        for (int p = 0; p < kPixels; ++p) sum += read_lanes<T>(wide[p * tile.taps] + c, lanes) * d[p];
        store(dw, sum);
      }
  }
}

template <class T>
struct DepthwiseGradientKernels {
  using Codes = std::conditional_t<std::is_same_v<T, double>, std::integer_sequence<int>, std::integer_sequence<int, 31, 51, 71, 41, 32>>;
  using Kernel = void (*)(const DepthwiseGradientTile<T>&);
  template <int kTaps, int kStride, int kPixels>
  static Kernel shared() {
    return depthwise_gradient_tile<kTaps, kStride, kPixels, T>;
  }
  template <int kPixels>
  static Kernel any() {
    return depthwise_gradient_tile_of_any<kPixels, T>;
  }
};

// What one band adds to the weights' gradient.
template <class T>
struct DepthwiseGradientPlan {
  using Kernels = DepthwiseGradientKernels<T>;
  static constexpr int kSizes[] = {8, 4, 2, 1};  // of tiles: none reaches past the end of a row, where 0 would meet an infinity
  const Pass& pass;
  TapLine lines;
  DepthwiseRow row;
  typename Kernels::Kernel kernels[4];

  explicit DepthwiseGradientPlan(const Pass& pass)
      : pass(pass),
        lines(pass.h, 0),
        row(pass.w, 0),
        kernels{row.choose<Kernels, 8>(), row.choose<Kernels, 4>(), row.choose<Kernels, 2>(), row.choose<Kernels, 1>()} {}

  // dw [taps][dw_step], and the sums of the narrow side with what they lost (see add_compensated), unless null.
  void run(const Band& band, const Pixels<T>& wide, const Pixels<T>& narrow, int64_t channels, T* dw, int64_t dw_step, T* sums,
           T* lost) const {
    Scratch<const T*> sources(lines.count * row.tile_columns(kSizes[0]));
    Scratch<T*> dw_rows(lines.count);
    Scratch<int64_t> wide_rows(lines.count);
    const T* pixels[kSizes[0]];
    for (int64_t r = band.top; r < band.bottom; ++r) {
      int64_t count = 0;
      for (int64_t i = 0; i < lines.count; ++i) {
        const int64_t wide_row = pass.h.base(r) + i * lines.step;
        if (!wide.has_row(wide_row)) continue;
        wide_rows[count] = wide_row;
        dw_rows[count++] = dw + i * row.taps.count * dw_step;
      }
      const DepthwiseGradientTile<T> tile{count, row.taps.count, sources.get(), pixels, dw_rows.get(), dw_step, channels};
      const int64_t length = band.columns(), base = pass.w.base(band.left);
      for (int64_t tooth = 0; tooth < std::min(row.comb, length); ++tooth)
        for (int64_t p = tooth; p < length;) {
          const int64_t left = (length - p + row.comb - 1) / row.comb;
          int fit = 0;
          while (kSizes[fit] > left) ++fit;
          const int64_t size = kSizes[fit], columns = row.tile_columns(size);
          for (int64_t j = 0; j < columns; ++j)
            for (int64_t i = 0; i < count; ++i) sources[i * columns + j] = wide.at(wide_rows[i], base + row.source(p, j));
          for (int64_t i = 0; i < size; ++i) pixels[i] = narrow.at(r, band.left + p + i * row.comb);
          kernels[fit](tile);
          if (sums) add_compensated(sums, lost, pixels, size, channels);
          p += size * row.comb;
        }
    }
  }
};

// dw [group][taps][step], sums [group][step], of each `step` elements the first.
template <class T, class WideSource, class NarrowSource>
inline void depthwise_weight_gradient(const Conv& conv, const WideSource& wide, const NarrowSource& narrow, T* dw, T* sums, int64_t step) {
  constexpr int64_t kChunk = kDepthwiseChannels<T>;
  const Pass pass = gather_pass(conv);
  const int64_t padded = padded_channels<T>(conv.groups), taps = pass.depth(), stride = std::min(kChunk, padded);
  const int64_t channel_chunks = (conv.groups + kChunk - 1) / kChunk;
  const Bands bands = make_bands(conv.h.narrow, conv.w.narrow, Window{}, conv.batch * channel_chunks,
                                 stride * (conv.h.stride * conv.w.stride + 1) * sizeof(T), 96 << 10);
  const int64_t rows = pass.h.span(bands.rows), columns = pass.w.span(bands.columns);
  const DepthwiseGradientPlan<T> plan(pass);
  const auto whole = [](const auto* image) { return std::is_same_v<decltype(image), const Image<const T>*> && image && image->c == 1; };
  const bool wide_in_place = whole(wide.plain()), narrow_in_place = whole(narrow.plain());
  // Two rows more than there are taps: the sums of the narrow side, and what they lost.
  const int64_t size = (taps + 2) * padded;
  const Chunks chunks(conv.batch * bands.count(), size * sizeof(T));
  Scratch<T> partial(chunks.count * size), total(size);
  std::memset(partial.get(), 0, chunks.count * size * sizeof(T));
  torch::stable::parallel_for(0, chunks.count * channel_chunks, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> a(wide_in_place ? 0 : rows * columns * stride), b(narrow_in_place ? 0 : bands.rows * bands.columns * stride), zeros(stride);
    std::memset(zeros.get(), 0, stride * sizeof(T));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / channel_chunks, c0 = task % channel_chunks * kChunk, count = std::min(kChunk, conv.groups - c0);
      T* part = partial.get() + chunk * size + c0;
      for (int64_t unit = chunks.begin(chunk); unit < chunks.begin(chunk + 1); ++unit) {
        const int64_t n = unit / bands.count();
        const Band band = bands.full(unit % bands.count());
        const auto pixels = [&](const auto& source, bool in_place, T* block, int64_t block_columns, const Band& part) {
          if constexpr (std::is_same_v<typename std::decay_t<decltype(source)>::Stored, T>)
            if (in_place) return pixels_of(*source.plain(), n, c0, static_cast<const T*>(zeros.get()));
          source.load(block, stride, block_columns, n, c0, count, part.top, part.rows(), part.left, part.columns());
          return Pixels<T>{block, block_columns * stride, stride, part.top, part.bottom, part.left, part.right, zeros.get()};
        };
        const int64_t row = pass.h.lowest(band.top), column = pass.w.lowest(band.left);
        const Band read{row, row + pass.h.span(band.rows()), column, column + pass.w.span(band.columns())};
        plan.run(band, pixels(wide, wide_in_place, a.get(), columns, read), pixels(narrow, narrow_in_place, b.get(), bands.columns, band),
                 count, part, padded, sums ? part + taps * padded : nullptr, part + (taps + 1) * padded);
      }
    }
  });
  add_partials(total.get(), partial.get(), chunks.count, size);
  for (int64_t c = 0; c < conv.groups; ++c) {
    for (int64_t t = 0; t < taps; ++t) dw[(c * taps + t) * step] = total[t * padded + c];
    if (sums) sums[c * step] = total[taps * padded + c];
  }
}
