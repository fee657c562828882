// Winograd's minimal filtering F(2x2, 3x3) (Lavin & Gray, 2016): 3x3 passes of stride 1 with 16 products for 4 outputs in
// place of 36. Included by for_each_isa.h inside the namespace of each instruction set.
//
//   Y = A' [ (G w G') * (B' x B) ] A     for every 4 x 4 tile x of the source and the 2 x 2 tile Y of the output
//
// The sums over the channels are 16 matrix products [tiles, channels] x [channels, output channels], one for each element
// of the 4 x 4 tile. The matrices hold 0, 1, -1 and 1/2, so inputs and weights that are small integers give exact results.
// A NaN or an infinity would spread over its tile, so a band that reads one is summed up directly.
// A 2 x 2 max-pool meets exactly one tile. Floor: 16/36 of the direct operations, plus about a tenth for the transforms.
// 32 -> 64 channels on 14 x 14 with ReLU and 2x2 max-pool, per image on one Zen 5 core: floor 50,200 cycles (112,900 for the
// direct sum), predicted 60,000, measured 72,000, of which the products take 51,000; the gradient of its input,
// read back through the pool: 89,000.

// The product pays for the transforms from this many channels on either side; with fewer, the transforms' own roundings
// would show next to those of the sum as well.
inline constexpr int64_t kWinogradChannels = 32;

template <class T>
inline bool winograd_applies(const Pass& pass) {
  const bool square = pass.h.axis.taps == 3 && pass.w.axis.taps == 3;
  const bool dense =
      pass.groups == 1 && pass.h.axis.stride == 1 && pass.w.axis.stride == 1 && pass.h.axis.dilation == 1 && pass.w.axis.dilation == 1;
  return std::is_same_v<T, float> && square && dense && pass.channels >= kWinogradChannels && pass.out_channels >= kWinogradChannels;
}

// w[3][3] of 16 taps: G w G', lanes are output channels.
template <class T>
INLINE void transform_weight(const vec<T> (&w)[9], vec<T> (&u)[16]) {
  vec<T> t[4][3];
#pragma GCC unroll 4
  for (int j = 0; j < 3; ++j) {
    const vec<T> sum = (w[j] + w[6 + j]) * T(0.5), half = w[3 + j] * T(0.5);
    t[0][j] = w[j], t[1][j] = sum + half, t[2][j] = sum - half, t[3][j] = w[6 + j];
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const vec<T> sum = (t[i][0] + t[i][2]) * T(0.5), half = t[i][1] * T(0.5);
    u[4 * i] = t[i][0], u[4 * i + 1] = sum + half, u[4 * i + 2] = sum - half, u[4 * i + 3] = t[i][2];
  }
}

// [panel][16][channels][columns of the panel], from the packed weights of the direct pass, which have their taps in the
// order in which an output meets its sources.
template <class T>
inline void pack_winograd(T* u, const Pass& pass, const T* packed) {
  constexpr int64_t kColumns = ConvTile<T>::kColumns, W = kLanes<T>;
  const int64_t padded = padded_channels<T>(pass.out_channels), C = pass.channels;
  const int64_t panels = (padded + kColumns - 1) / kColumns, chunk = 16, chunks = (C + chunk - 1) / chunk;
  torch::stable::parallel_for(0, panels * chunks, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / chunks * kColumns, columns = std::min(kColumns, padded - first);
      const T* panel = packed + first * 9 * C;
      T* out = u + first * 16 * C;
      for (int64_t c = i % chunks * chunk; c < std::min(C, (i % chunks + 1) * chunk); ++c)
        for (int64_t j = 0; j < columns; j += W) {
          vec<T> w[9], transformed[16];
          for (int64_t kh = 0; kh < 3; ++kh)
            for (int64_t kw = 0; kw < 3; ++kw) {
              // A scatter meets rows from the last tap to the first as well; its columns are already packed that way.
              const int64_t row = pass.h.scatter ? 2 - kh : kh;
              w[kh * 3 + kw] = load(panel + ((row * 3 + kw) * C + c) * columns + j);
            }
          transform_weight<T>(w, transformed);
#pragma GCC unroll 16
          for (int k = 0; k < 16; ++k) store(out + (k * C + c) * columns + j, transformed[k]);
        }
    }
  });
}

// B' x B of the 4 x 4 pixels at x: v[k * step], k = 0..15.
template <class T>
INLINE void transform_source(const T* x, int64_t row_step, int64_t pixel_step, T* v, int64_t step) {
  vec<T> t[4][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const vec<T> x0 = load(x + j * pixel_step), x1 = load(x + row_step + j * pixel_step);
    const vec<T> x2 = load(x + 2 * row_step + j * pixel_step), x3 = load(x + 3 * row_step + j * pixel_step);
    t[0][j] = x0 - x2, t[1][j] = x1 + x2, t[2][j] = x2 - x1, t[3][j] = x1 - x3;
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    store(v + (4 * i + 0) * step, t[i][0] - t[i][2]);
    store(v + (4 * i + 1) * step, t[i][1] + t[i][2]);
    store(v + (4 * i + 2) * step, t[i][2] - t[i][1]);
    store(v + (4 * i + 3) * step, t[i][1] - t[i][3]);
  }
}

// A' m A into the 2 x 2 pixels at y.
template <class T>
INLINE void transform_output(const T* m, int64_t step, T* y, int64_t row_step, int64_t pixel_step) {
  vec<T> t[2][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const vec<T> m0 = load(m + j * step), m1 = load(m + (4 + j) * step), m2 = load(m + (8 + j) * step), m3 = load(m + (12 + j) * step);
    t[0][j] = m0 + m1 + m2, t[1][j] = m1 - m2 - m3;
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    store(y + i * row_step, t[i][0] + t[i][1] + t[i][2]);
    store(y + i * row_step + pixel_step, t[i][1] - t[i][2] - t[i][3]);
  }
}

// Whether all of `size` elements, whole vectors of them, are finite: 0 times anything else is a NaN.
template <class T>
inline bool all_finite(const T* x, int64_t size) {
  constexpr int W = kLanes<T>;
  vec<T> zeros[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= size; i += 4 * W)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) zeros[j] += load(x + i + j * W) * T(0);
  for (; i < size; i += W) zeros[0] += load(x + i) * T(0);
  return reduce_add((zeros[0] + zeros[1]) + (zeros[2] + zeros[3])) == 0;
}

// m[k][tile][kColumns] = v[k][tile][channels] u[k][channels][kVectors vectors] for the 16 elements k of up to kRows tiles; sums of
// at most `chain` terms one after another.
template <int kVectors, class T>
NOINLINE void winograd_products(int64_t tiles, const T* v, int64_t v_step, int64_t stride, int64_t channels, int64_t chain, const T* u,
                                T* m, int64_t m_step) {
  with_constant<ConvTile<T>::kRows>(tiles, [&](auto rows) {
    vec<T> acc[rows.value][kVectors] = {};
    for (int64_t k = 0; k < 16; ++k)
      for (int64_t c = 0; c < channels; c += chain) {
        const int64_t depth = std::min(chain, channels - c);
        multiply_rows<rows.value, kVectors, T>(acc, v + k * v_step + c, stride, u + (k * channels + c) * kVectors * kLanes<T>, depth);
        flush<rows.value, kVectors, T>(acc, m + k * m_step, ConvTile<T>::kColumns, c > 0);
      }
  });
}

CONV_PRODUCT void winograd_products<1, float>(int64_t, const float*, int64_t, int64_t, int64_t, int64_t, const float*, float*, int64_t);
CONV_PRODUCT void winograd_products<2, float>(int64_t, const float*, int64_t, int64_t, int64_t, int64_t, const float*, float*, int64_t);

// As direct_pass, for bands of even rows and columns; `packed` are the weights of direct_pass, u those of pack_winograd.
// A band is computed in chunks of up to kTiles tiles: what is between the source block and y stays in the caches.
template <class T, class Source, class Sink>
inline void winograd_pass(const Pass& pass, const Bands& bands, const T* packed, const T* u, const Source& source, const Sink& sink) {
  constexpr int64_t kColumns = ConvTile<T>::kColumns, W = kLanes<T>, kTiles = ConvTile<T>::kRows;
  const int64_t padded = padded_channels<T>(pass.out_channels), C = pass.channels, stride = round_up(C, W);
  const int64_t across = (bands.full_columns() + 1) / 2, down = (bands.full_rows() + 1) / 2;
  const int64_t columns = 2 * across + 2, rows = 2 * down + 2, y_columns = 2 * across, per_image = bands.count();
  // One vector more than the data, so that the 16 matrices do not fall onto the same sets of the first-level cache.
  const int64_t v_step = kTiles * stride + W, m_step = kTiles * kColumns + W;
  const int64_t chains = (C + pass.sum_length - 1) / pass.sum_length, chain = (C + chains - 1) / chains;
  const auto taps = pass.taps(columns, stride);
  torch::stable::parallel_for(0, pass.batch * per_image, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> block(rows * columns * stride), v(16 * v_step), m(16 * m_step), y(2 * down * y_columns * padded + W);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / per_image, i = task % per_image;
      const Band band = bands.full(i);
      const int64_t band_across = (band.columns() + 1) / 2, tiles = band_across * ((band.rows() + 1) / 2);
      source.load(block.get(), stride, columns, n, 0, C, pass.h.lowest(band.top), rows, pass.w.lowest(band.left), columns);
      if (!all_finite(block.get(), rows * columns * stride)) {
        direct_band<T>(pass, band, taps, packed, block.get(), columns * stride, stride, y.get(), y_columns);
        sink(n, 0, i, y.get(), y_columns, padded);
        continue;
      }
      const int64_t chunks = (tiles + kTiles - 1) / kTiles;
      for (int64_t chunk = 0, row = 0, column = 0, done = 0; chunk < chunks; ++chunk) {
        const int64_t count = tiles * (chunk + 1) / chunks - done;
        done += count;
        T* to[kTiles];  // the upper left pixels of the tiles in y
        for (int64_t t = 0; t < count; ++t) {
          const T* from = block.get() + (row * columns + column) * stride;
          for (int64_t c = 0; c < stride; c += W) transform_source<T>(from + c, columns * stride, stride, v.get() + t * stride + c, v_step);
          to[t] = y.get() + (row * y_columns + column) * padded;
          column += 2;
          if (column == 2 * band_across) column = 0, row += 2;
        }
        for (int64_t first = 0; first < padded; first += kColumns) {
          const int64_t width = std::min(kColumns, padded - first);
          const T* panel = u + first * 16 * C;
          if (width == kColumns)
            winograd_products<2, T>(count, v, v_step, stride, C, chain, panel, m, m_step);
          else
            winograd_products<1, T>(count, v, v_step, stride, C, chain, panel, m, m_step);
          for (int64_t t = 0; t < count; ++t)
            for (int64_t j = 0; j < width; j += W)
              transform_output<T>(m.get() + t * kColumns + j, m_step, to[t] + first + j, y_columns * padded, padded);
        }
      }
      sink(n, 0, i, y.get(), y_columns, padded);
    }
  });
}
