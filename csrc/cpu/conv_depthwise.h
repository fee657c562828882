// Depthwise passes (see Pass in conv_geometry.h): one source channel and one output channel per group. Included by
// for_each_isa.h inside the namespace of each instruction set.
//
// Lanes are channels. A task owns a band of outputs of one image and up to kDepthwiseChannels channels: it copies the sources the
// band needs into a padded block, channels innermost, and sums kPixels neighbouring outputs in registers over all of the taps:
// kPixels + 1 loads for kPixels multiply-adds. The sink is that of every other pass; a chunk of channels is its group.
//
// Floor: bytes. The source read and the output written once, from and to wherever they lie; one multiply-add per tap and output
// at two vectors a cycle is below that up to 3x3 for images in the last-level cache.

template <class T>
inline constexpr int64_t kDepthwiseChannels = 16 * kLanes<T>;

inline bool is_depthwise(const Pass& pass) { return pass.channels == 1 && pass.out_channels == 1 && pass.groups > 1; }

// [taps][channels padded to whole vectors], in the order of Pass::weight_row.
template <class T, class S>
inline void pack_depthwise(T* packed, const Pass& pass, const Weights<T, S>& weights) {
  const int64_t padded = padded_channels<T>(pass.groups);
  std::memset(packed, 0, pass.depth() * padded * sizeof(T));
  for (int64_t kh = 0; kh < pass.h.axis.taps; ++kh)
    for (int64_t kw = 0; kw < pass.w.axis.taps; ++kw) {
      T* row = packed + pass.weight_row(kh, kw) * padded;
      for (int64_t c = 0; c < pass.groups; ++c)
        row[c] = to_compute(weights.data[c * weights.group + kh * weights.h + kw * weights.w]) *
                 (weights.scale ? to_compute(weights.scale[c]) : T(1));
    }
}

// kPixels outputs of one vector of channels, `a_step` apart in the source block and `y_step` apart in y.
template <int kPixels, class T>
INLINE void depthwise_tile(const T* a, int64_t a_step, const Tap* taps, int64_t count, const T* weights, int64_t weight_step, T* y,
                           int64_t y_step) {
  vec<T> sum[kPixels] = {}, total[kPixels] = {};
  for (int64_t i = 0; i < count; ++i) {
    if (taps[i].begins) {
#pragma GCC unroll 8
      for (int p = 0; p < kPixels; ++p) total[p] += sum[p], sum[p] = vec<T>{};
    }
    const vec<T> w = load(weights + taps[i].weight * weight_step);
    const T* x = a + taps[i].source;
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) sum[p] += load(x + p * a_step) * w;
  }
#pragma GCC unroll 8
  for (int p = 0; p < kPixels; ++p) store(y + p * y_step, total[p] + sum[p]);
}

// `pixels` outputs in tiles of kPixels and one tile of each power of two of the rest.
template <class T, int kPixels = 8>
INLINE void depthwise_row(int64_t pixels, const T* a, int64_t a_step, const Tap* taps, int64_t count, const T* weights, int64_t weight_step,
                          T* y, int64_t y_step) {
  for (; pixels >= kPixels; pixels -= kPixels, a += kPixels * a_step, y += kPixels * y_step)
    depthwise_tile<kPixels, T>(a, a_step, taps, count, weights, weight_step, y, y_step);
  if constexpr (kPixels > 1) depthwise_row<T, kPixels / 2>(pixels, a, a_step, taps, count, weights, weight_step, y, y_step);
}

// As direct_pass; packed by pack_depthwise.
template <class T, class Source, class Sink>
inline void depthwise_pass(const Pass& pass, const Bands& bands, const T* packed, const Source& source, const Sink& sink) {
  constexpr int64_t kChunk = kDepthwiseChannels<T>, W = kLanes<T>;
  const int64_t padded = padded_channels<T>(pass.groups), per_image = bands.count();
  const int64_t chunks = (pass.groups + kChunk - 1) / kChunk;
  const int64_t y_columns = bands.full_columns(), y_rows = bands.full_rows();
  const int64_t columns = pass.w.span(y_columns), rows = pass.h.span(y_rows), stride = std::min(kChunk, padded);
  const auto taps = pass.taps(columns, stride);
  torch::stable::parallel_for(0, pass.batch * chunks * per_image, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> block(rows * columns * stride), y(y_rows * y_columns * stride + W);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / (chunks * per_image), chunk = task / per_image % chunks, i = task % per_image;
      const int64_t c0 = chunk * kChunk, count = std::min(kChunk, pass.groups - c0);
      const Band band = bands.full(i);
      const int64_t row0 = pass.h.lowest(band.top), column0 = pass.w.lowest(band.left);
      source.load(block.get(), stride, columns, n, c0, count, row0, pass.h.span(band.rows()), column0, pass.w.span(band.columns()));
      for (int64_t r = band.top; r < band.bottom; ++r)
        for (int64_t phase = 0; phase < pass.w.phases(); ++phase) {
          const int64_t column = pass.w.first_of_phase(band.left, phase), step = pass.w.phases();
          if (column >= band.right) continue;
          const int64_t pixels = (band.right - column + step - 1) / step;
          const auto& list = taps[pass.h.phase_of(r) * step + phase];
          const T* a = block.get() + ((pass.h.base(r) - row0) * columns + pass.w.base(column) - column0) * stride;
          T* out = y.get() + ((r - band.top) * y_columns + column - band.left) * stride;
          for (int64_t c = 0; c < count; c += W)
            depthwise_row<T>(pixels, a + c, pass.w.source_step() * stride, list.data(), list.size(), packed + c0 + c, padded, out + c,
                             step * stride);
        }
      sink(n, chunk, i, y.get(), y_columns, stride);
    }
  });
}

// acc[t] += sum over the pixels of a band of wide[.. + offset[t]] * narrow, for kTaps taps and one vector of channels.
template <int kTaps, class T>
INLINE void depthwise_gradient(const GradientBand& band, const T* a, const int64_t* offset, const T* b, T* dw, int64_t dw_step) {
  vec<T> acc[kTaps] = {};
  for (int64_t r = 0; r < band.rows; ++r) {
    const T *x = a + r * band.a_row, *d = b + r * band.b_row;
    for (int64_t p = 0; p < band.columns; ++p, x += band.a_step, d += band.b_step) {
      const vec<T> dp = load(d);
#pragma GCC unroll 16
      for (int t = 0; t < kTaps; ++t) acc[t] += load(x + offset[t]) * dp;
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < kTaps; ++t) store(dw + t * dw_step, load(dw + t * dw_step) + acc[t]);
}
template <class T, int kTaps = 9>
INLINE void depthwise_gradients(int64_t taps, const GradientBand& band, const T* a, const int64_t* offset, const T* b, T* dw,
                                int64_t dw_step) {
  for (; taps >= kTaps; taps -= kTaps, offset += kTaps, dw += kTaps * dw_step)
    depthwise_gradient<kTaps, T>(band, a, offset, b, dw, dw_step);
  if constexpr (kTaps > 1) depthwise_gradients<T, kTaps / 2>(taps, band, a, offset, b, dw, dw_step);
}

// As weight_gradient, for one wide and one narrow channel per group: dw [group][taps][step], sums [group][step], of each `step`
// elements the first.
template <class T, class WideSource, class NarrowSource>
inline void depthwise_weight_gradient(const Conv& conv, const WideSource& wide, const NarrowSource& narrow, T* dw, T* sums, int64_t step) {
  constexpr int64_t kChunk = kDepthwiseChannels<T>, W = kLanes<T>;
  const Pass pass = gather_pass(conv);
  const int64_t padded = padded_channels<T>(conv.groups), taps = pass.depth(), stride = std::min(kChunk, padded);
  const int64_t channel_chunks = (conv.groups + kChunk - 1) / kChunk;
  const Bands bands = make_bands(conv.h.narrow, conv.w.narrow, Window{}, conv.batch * channel_chunks,
                                 stride * (conv.h.stride * conv.w.stride + 1) * sizeof(T), 96 << 10);
  const int64_t rows = pass.h.span(bands.rows), columns = pass.w.span(bands.columns);
  std::vector<int64_t> offsets;
  for (int64_t kh = 0; kh < conv.h.taps; ++kh)
    for (int64_t kw = 0; kw < conv.w.taps; ++kw) offsets.push_back((kh * conv.h.dilation * columns + kw * conv.w.dilation) * stride);
  // One row more than there are taps: the sums of the narrow side.
  const int64_t size = (taps + 1) * padded;
  const Chunks chunks(conv.batch * bands.count(), size * sizeof(T));
  Scratch<T> partial(chunks.count * size), total(size);
  std::memset(partial.get(), 0, chunks.count * size * sizeof(T));
  torch::stable::parallel_for(0, chunks.count * channel_chunks, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> a(rows * columns * stride), b(bands.rows * bands.columns * stride);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / channel_chunks, c0 = task % channel_chunks * kChunk, count = std::min(kChunk, conv.groups - c0);
      T* part = partial.get() + chunk * size + c0;
      for (int64_t unit = chunks.begin(chunk); unit < chunks.begin(chunk + 1); ++unit) {
        const int64_t n = unit / bands.count();
        const Band band = bands.full(unit % bands.count());
        narrow.load(b.get(), stride, bands.columns, n, c0, count, band.top, band.rows(), band.left, band.columns());
        wide.load(a.get(), stride, columns, n, c0, count, pass.h.lowest(band.top), pass.h.span(band.rows()), pass.w.lowest(band.left),
                  pass.w.span(band.columns()));
        const GradientBand shape{
            band.rows(), band.columns(), conv.h.stride * columns * stride, conv.w.stride * stride, bands.columns * stride, stride};
        for (int64_t c = 0; c < count; c += W)
          depthwise_gradients<T>(taps, shape, a.get() + c, offsets.data(), b.get() + c, part + c, padded);
        if (sums) add_pixels(part + taps * padded, b.get(), band, bands.columns, std::min(stride, round_up(count, W)), stride);
      }
    }
  });
  add_partials(total.get(), partial.get(), chunks.count, size);
  for (int64_t c = 0; c < conv.groups; ++c) {
    for (int64_t t = 0; t < taps; ++t) dw[(c * taps + t) * step] = total[t * padded + c];
    if (sums) sums[c * step] = total[taps * padded + c];
  }
}
