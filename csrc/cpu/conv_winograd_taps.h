// Winograd's minimal filtering for few input channels: kernels of any size, stride 1 or 2, forward. Included by for_each_isa.h inside the
// namespace of each instruction set.
//
// Along an axis a stride of 2 cuts the taps into two phases, and each phase is cut into runs of up to 3 taps g that meet the sources d of
// two neighbouring outputs y at the points 0, 1, -1 and infinity:
//
//   3 taps:  m0 = (d0 - d2) g0,  m1 = (d1 + d2) (g0 + g1 + g2) / 2,  m2 = (d2 - d1) (g0 - g1 + g2) / 2,  m3 = (d1 - d3) g2
//   2 taps:  m0 = (d0 - d2) g0,  m1 = (d1 + d2) (g0 + g1) / 2,       m2 = (d2 - d1) (g0 - g1) / 2
//   1 tap:   m0 = d0 g0,                                                                                 m3 = d1 (-g0)
//   y0 = m0 + m1 + m2,  y1 = m1 - m2 - m3
//
// The way from points to outputs is the same for all runs, so the products of a point are summed over runs, phases and channels before
// it is taken: 7 taps (of stride 2: 3 + 1 and 3; of stride 1: 3 + 3 + 1) take 10 products for 14, 5 taps 7 for 10, in two dimensions 100
// for 196 and 49 for 100. The numbers beside the sources are 1, -1 and 1/2, so inputs and weights that are small integers give exact
// results. (A fifth point would save a fifth more, and thirds would come in.) A NaN or an infinity would spread over its tile, so a row of
// tiles that reads one is summed up directly.
//
// Few channels do not fill vectors: lanes of the source's transform are tiles, for which the block holds the columns of the source that
// tiles have at the same place one after the other. A task owns a band of outputs. For each row of tiles it takes the rows of the source
// to points, then, for as many tiles as share a product, the columns; the sums of four points stay in the first-level cache until the
// way back adds them to the outputs. Tiles lie on even rows of the image, so that a row's results do not depend on the band.
//
// Floor: the products, 100/196 of the direct ones. 3 -> 64 channels, 7x7 of stride 2 on 224 x 224: floor 1.9 million cycles of one Zen 5
// core (3.7 direct), predicted 2.2, measured 3.2 with norm, ReLU and pool (4.2 direct).

// Up to 3 taps of an axis, `stride` apart, that are filtered together.
struct TapRun {
  int64_t count, first;
  bool has(int64_t point) const { return point == 0 || (point == 3 ? count != 2 : count > 1); }
};

struct TapRuns {
  std::vector<TapRun> runs;
  std::vector<std::array<int64_t, 4>> place;  // of a run among those that have a point
  int64_t count[4] = {};                      // of runs that have a point
  explicit TapRuns(const Axis& axis) {
    for (int64_t phase = 0; phase < std::min(axis.stride, axis.taps); ++phase)
      for (int64_t tap = phase; tap < axis.taps; tap += 3 * axis.stride) {
        const TapRun run{std::min<int64_t>(3, (axis.taps - tap + axis.stride - 1) / axis.stride), tap};
        place.push_back({count[0], count[1], count[2], count[3]});
        for (int64_t point = 0; point < 4; ++point) count[point] += run.has(point);
        runs.push_back(run);
      }
  }
  int64_t products() const { return count[0] + count[1] + count[2] + count[3]; }
  int64_t before(int64_t point) const {
    int64_t sum = 0;
    for (int64_t i = 0; i < point; ++i) sum += count[i];
    return sum;
  }
};

// The sum of point (i, j) has as many terms as runs of the rows have i times runs of the columns have j times channels, in this order.
struct TapPoints {
  TapRuns h, w;
  int64_t channels;
  explicit TapPoints(const Pass& pass) : h(pass.h.axis), w(pass.w.axis), channels(pass.channels) {}
  int64_t terms() const { return h.products() * w.products() * channels; }
  int64_t depth(int64_t i, int64_t j) const { return h.count[i] * w.count[j] * channels; }
  int64_t first(int64_t i, int64_t j) const { return (h.before(i) * w.products() + h.count[i] * w.before(j)) * channels; }
};

// The products pay for the transforms where they are few enough and each output channel's vector is multiplied often enough; sums of few
// terms have so small an error that the transforms' own roundings would show.
template <class T>
inline bool taps_apply(const Pass& pass) {
  constexpr int64_t kMostTerms = 1600, kLeastColumns = 12;
  const auto fits = [](const PassAxis& a) { return !a.scatter && a.axis.dilation == 1 && a.axis.stride <= 2 && a.axis.taps > 3; };
  if (!std::is_same_v<T, float> || pass.groups > 1 || !fits(pass.h) || !fits(pass.w)) return false;
  const int64_t least_vectors = pass.h.axis.taps == 4 && pass.w.axis.taps == 4 ? 4 : 2;
  return pass.depth() > kSumLength && TapPoints(pass).terms() <= kMostTerms && pass.out_channels >= least_vectors * kLanes<T> &&
         pass.w.outputs() >= kLeastColumns;
}

// f(taps of the run as a constant).
template <class F>
INLINE void with_run(const TapRun& run, F f) {
  with_constant<3>(run.count, f);
}
template <int kTaps, class T>
INLINE void run_weights(const vec<T> (&g)[kTaps], vec<T> (&u)[4]) {
  u[0] = g[0];
  if constexpr (kTaps == 1) {
    u[3] = -g[0];
  } else if constexpr (kTaps == 2) {
    u[1] = (g[0] + g[1]) * T(0.5), u[2] = (g[0] - g[1]) * T(0.5);
  } else {
    const vec<T> sum = (g[0] + g[2]) * T(0.5), half = g[1] * T(0.5);
    u[1] = sum + half, u[2] = sum - half, u[3] = g[2];
  }
}
template <int kTaps, class T>
INLINE void run_sources(const vec<T> (&d)[kTaps + 1], vec<T> (&v)[4]) {
  if constexpr (kTaps == 1) {
    v[0] = d[0], v[3] = d[1];
  } else {
    v[0] = d[0] - d[2], v[1] = d[1] + d[2], v[2] = d[2] - d[1];
    if constexpr (kTaps == 3) v[3] = d[1] - d[3];
  }
}

// [panel][terms][columns of the panel], from the packed weights of the direct pass.
template <class T>
inline void pack_taps(T* u, const Pass& pass, const TapPoints& points, const T* packed) {
  constexpr int64_t kColumns = ConvTile<T>::kColumns, W = kLanes<T>;
  const int64_t padded = padded_channels<T>(pass.out_channels), C = pass.channels, vectors = padded / W;
  torch::stable::parallel_for(0, vectors * C, std::max<int64_t>(1, 4096 / pass.depth() * C), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t lane = item / C * W, c = item % C, panel = lane / kColumns * kColumns;
      const int64_t columns = std::min(kColumns, padded - panel);
      const T* in = packed + panel * pass.depth() + lane - panel;
      T* out = u + panel * points.terms() + lane - panel;
      for (size_t a = 0; a < points.h.runs.size(); ++a)
        for (size_t b = 0; b < points.w.runs.size(); ++b) {
          const TapRun &h = points.h.runs[a], &w = points.w.runs[b];
          with_run(h, [&](auto rows) {
            with_run(w, [&](auto cols) {
              constexpr int kH = rows.value, kW = cols.value;
              vec<T> t[kW][4] = {};
#pragma GCC unroll 3
              for (int j = 0; j < kW; ++j) {
                vec<T> g[kH];
#pragma GCC unroll 3
                for (int i = 0; i < kH; ++i)
                  g[i] = load(in + (pass.weight_row(h.first + i * pass.h.axis.stride, w.first + j * pass.w.axis.stride) + c) * columns);
                run_weights<kH, T>(g, t[j]);
              }
#pragma GCC unroll 4
              for (int i = 0; i < 4; ++i) {
                if (!h.has(i)) continue;
                vec<T> g[kW], row[4] = {};
#pragma GCC unroll 3
                for (int j = 0; j < kW; ++j) g[j] = t[j][i];
                run_weights<kW, T>(g, row);
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) {
                  if (!w.has(j)) continue;
                  const int64_t place = (points.h.place[a][i] * points.w.count[j] + points.w.place[b][j]) * C + c;
                  store(out + (points.first(i, j) + place) * columns, row[j]);
                }
              }
            });
          });
        }
    }
  });
}

// m[point][tile][kColumns] = v[terms of the point][step] u[terms of the point][kVectors vectors], for four points one after the other; sums
// of at most kSumLength terms.
template <int kVectors, class T>
NOINLINE void taps_products(int64_t tiles, const int64_t* depths, const T* v, int64_t step, const T* u, T* m, int64_t m_step) {
  with_constant<ConvTile<T>::kRows>(tiles, [&](auto rows) {
    vec<T> acc[rows.value][kVectors] = {};
    for (int64_t point = 0; point < 4; ++point, m += m_step) {
      bool add = false;
      for (int64_t left = depths[point]; left > 0 || !add; left -= kSumLength, add = true) {
        const int64_t depth = std::min(left, kSumLength);
        multiply_rows<rows.value, kVectors, T>(acc, v, 1, u, depth, step);
        flush<rows.value, kVectors, T>(acc, m, ConvTile<T>::kColumns, add);
        v += depth * step, u += depth * kVectors * kLanes<T>;
      }
    }
  });
}

CONV_PRODUCT void taps_products<1, float>(int64_t, const int64_t*, const float*, int64_t, const float*, float*, int64_t);
CONV_PRODUCT void taps_products<2, float>(int64_t, const int64_t*, const float*, int64_t, const float*, float*, int64_t);

// What a band is computed from and in: sizes of a task's scratch memory and the steps from the source to the outputs.
template <class T>
struct TapTiles {
  static constexpr int64_t W = kLanes<T>, kColumns = ConvTile<T>::kColumns, kTiles = ConvTile<T>::kRows;  // of a product
  static constexpr int64_t kTileLanes = (kTiles + W - 1) / W * W;
  const Pass& pass;
  const TapPoints& points;
  const T* u;
  int64_t places, length;  // columns of the source that a tile begins anew after, and tiles (and what they reach) of each
  int64_t rows, padded;
  int64_t depths[16];

  TapTiles(const Pass& pass, const TapPoints& points, const T* u, int64_t output_rows, int64_t output_columns)
      : pass(pass), points(points), u(u) {
    const int64_t across = (output_columns + 1) / 2, reach = pass.w.axis.taps + pass.w.axis.stride - 1;
    places = 2 * pass.w.axis.stride;
    length = round_up(across - 1 + kTileLanes + reach / places, W);
    rows = pass.h.span(output_rows);
    padded = padded_channels<T>(pass.out_channels);
    for (int64_t point = 0; point < 16; ++point) depths[point] = points.depth(point / 4, point % 4);
  }
  int64_t row_size() const { return pass.channels * places * length; }
  int64_t block_size() const { return rows * row_size(); }
  int64_t rows_size() const { return points.h.products() * row_size(); }
  int64_t v_size() const { return points.terms() * kTileLanes; }
  static constexpr int64_t kSums = kTiles * kColumns + W;  // one vector more: the points do not fall onto the same sets of a cache

  // Rows [row, row + count) of the source from `column` on, as [row][place][channel][length].
  template <class Source>
  void load_source(T* block, const Source& source, int64_t n, int64_t row, int64_t count, int64_t column) const {
    const int64_t C = pass.channels, width = places * length;
    const auto* image = source.plain();
    if (image && image->w == 1) {
      Scratch<T> line(width);
      for (int64_t r = 0; r < count; ++r)
        for (int64_t c = 0; c < C; ++c) {
          load_block<T>(line.get(), 1, width, *image, n, c, 1, row + r, 1, column, width);
          part_columns(block + r * row_size() + c * length, line.get());
        }
      return;
    }
    Scratch<T> pixels(width * C + W);
    for (int64_t r = 0; r < count; ++r) {
      source.load(pixels.get(), C, width, n, 0, C, row + r, 1, column, width);
      const Image<T> parted{block + r * row_size(), 0, length, 0, 1, places * C, 1, length};
      store_block<T>(pixels.get(), places * C, length, parted, 0, 0, places * C, 0, 1, 0, length);
    }
  }
  // Columns 0, places, 2 places.. of a line of one channel, then those from 1 on, ..
  void part_columns(T* out, const T* line) const {
    const int64_t step = pass.channels * length;
    for (int64_t i = 0; i < length; i += W, line += places * W) {
      vec<T> a[4];
      if (places == 2) {
        part<T>(load(line), load(line + W), a[0], a[1]);
      } else {
        vec<T> even[2], odd[2];
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) part<T>(load(line + 2 * j * W), load(line + (2 * j + 1) * W), even[j], odd[j]);
        part<T>(even[0], even[1], a[0], a[2]);
        part<T>(odd[0], odd[1], a[1], a[3]);
        store(out + 2 * step + i, a[2]);
        store(out + 3 * step + i, a[3]);
      }
      store(out + i, a[0]);
      store(out + step + i, a[1]);
    }
  }

  // The points of a row of tiles' rows: t[point][run][place][channel][length], from the block of the first of the rows.
  NOINLINE void take_rows(const T* block, T* t) const {
    const int64_t size = row_size(), step = pass.h.axis.stride * size;
    for (size_t a = 0; a < points.h.runs.size(); ++a) {
      const TapRun& run = points.h.runs[a];
      T* to[4];
      for (int64_t i = 0; i < 4; ++i) to[i] = t + (points.h.before(i) + points.h.place[a][i]) * size;
      const T* from = block + run.first * size;
      with_run(run, [&](auto taps) {
        for (int64_t x = 0; x < size; x += W) {
          vec<T> d[taps.value + 1], v[4] = {};
#pragma GCC unroll 4
          for (int i = 0; i <= taps.value; ++i) d[i] = load(from + i * step + x);
          run_sources<taps.value, T>(d, v);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i)
            if (TapRun{taps.value, 0}.has(i)) store(to[i] + x, v[i]);
        }
      });
    }
  }

  // The points of the columns of up to kTiles tiles from `tile` on: v[terms][kTileLanes].
  NOINLINE void take_columns(const T* t, int64_t tile, T* v) const {
    const int64_t C = pass.channels, size = row_size();
    for (size_t b = 0; b < points.w.runs.size(); ++b) {
      const TapRun& run = points.w.runs[b];
      with_run(run, [&](auto taps) {
        constexpr int kTaps = taps.value;
        const T* from[kTaps + 1];
        for (int i = 0; i <= kTaps; ++i) {
          const int64_t column = run.first + i * pass.w.axis.stride;
          from[i] = t + column % places * C * length + column / places + tile;
        }
        for (int64_t point = 0, row = 0; point < 4; ++point) {
          T* to[4];
          for (int64_t j = 0; j < 4; ++j) to[j] = v + (points.first(point, j) + points.w.place[b][j] * C) * kTileLanes;
          for (int64_t i = 0; i < points.h.count[point]; ++i, ++row) {
            for (int64_t c = 0; c < C; ++c)
#pragma GCC unroll 2
              for (int64_t lane = 0; lane < kTileLanes; lane += W) {
                vec<T> d[kTaps + 1], p[4] = {};
#pragma GCC unroll 4
                for (int k = 0; k <= kTaps; ++k) d[k] = load(from[k] + row * size + c * length + lane);
                run_sources<kTaps, T>(d, p);
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j)
                  if (TapRun{kTaps, 0}.has(j)) store(to[j] + c * kTileLanes + lane, p[j]);
              }
            for (int64_t j = 0; j < 4; ++j) to[j] += points.w.count[j] * C * kTileLanes;
          }
        }
      });
    }
  }

  // What point kPoint of the rows adds to the 2 x 2 outputs at y.
  template <int kPoint>
  INLINE void add_outputs(const T* m, T* y, int64_t y_row) const {
    const vec<T> m0 = load(m), m1 = load(m + kSums), m2 = load(m + 2 * kSums), m3 = load(m + 3 * kSums);
    const vec<T> sum[2] = {m0 + m1 + m2, m1 - m2 - m3};
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      T *upper = y + j * padded, *lower = upper + y_row;
      if constexpr (kPoint == 0) store(upper, sum[j]);
      if constexpr (kPoint == 1) store(upper, load(upper) + sum[j]), store(lower, sum[j]);
      if constexpr (kPoint == 2) store(upper, load(upper) + sum[j]);
      if constexpr (kPoint >= 2) store(lower, load(lower) - sum[j]);
    }
  }

  // All output channels of the tiles whose sources are v; the first of them is to be at y.
  void multiply(const T* v, int64_t tiles, T* m, T* y, int64_t y_row) const {
    for (int64_t first = 0; first < padded; first += kColumns) {
      const int64_t width = std::min(kColumns, padded - first);
      const T* panel = u + first * points.terms();
      // Four points of the columns at a time, whose sums stay in the first-level cache until the way back adds them up.
      const T *sources = v, *weights = panel;
      for (int64_t i = 0; i < 4; ++i) {
        if (width == kColumns)
          taps_products<2, T>(tiles, depths + 4 * i, sources, kTileLanes, weights, m, kSums);
        else
          taps_products<1, T>(tiles, depths + 4 * i, sources, kTileLanes, weights, m, kSums);
        const int64_t terms = points.h.count[i] * points.w.products() * pass.channels;
        sources += terms * kTileLanes, weights += terms * width;
        with_constant<4>(i + 1, [&](auto number) {
          for (int64_t tile = 0; tile < tiles; ++tile)
            for (int64_t c = 0; c < width; c += W)
              add_outputs<number.value - 1>(m + tile * kColumns + c, y + 2 * tile * padded + first + c, y_row);
        });
      }
    }
  }
};

// As direct_pass; `packed` are its weights, u those of pack_taps.
template <class T, class Source, class Sink>
inline void taps_pass(const Pass& pass, const Bands& bands, const TapPoints& points, const T* packed, const T* u, const Source& source,
                      const Sink& sink) {
  using Tiles = TapTiles<T>;
  const int64_t padded = padded_channels<T>(pass.out_channels), C = pass.channels;
  const int64_t y_columns = round_up(bands.full_columns(), 2), y_row = y_columns * padded;
  const Tiles tiles(pass, points, u, bands.full_rows() + 2, y_columns);
  const int64_t scratch = tiles.block_size() + tiles.rows_size() + tiles.v_size() + 4 * Tiles::kSums;
  const int64_t columns = pass.w.span(y_columns), tile_rows = pass.h.span(2), tile_step = 2 * pass.h.axis.stride;
  const auto taps = pass.taps(columns, C);
  each_band<T, T>(pass, bands, y_columns, scratch, sink, [&](T* block, int64_t n, int64_t, const Band& band, T* y) {
    T *t = block + tiles.block_size(), *v = t + tiles.rows_size(), *m = v + tiles.v_size();
    const int64_t top = band.top / 2 * 2, down = (band.bottom - top + 1) / 2, across = (band.columns() + 1) / 2;
    const int64_t rows = pass.h.span(2 * down), row = pass.h.lowest(top), column = pass.w.lowest(band.left);
    tiles.load_source(block, source, n, row, rows, column);
    int64_t finite = 0;  // the rows of the source before this one, from the first of the tiles on
    y -= (band.top - top) * y_row;
    for (int64_t r = 0; r < down; ++r) {
      T* out = y + 2 * r * y_row;
      const int64_t first = r * tile_step;
      for (finite = std::max(finite, first); finite < first + tile_rows; ++finite)
        if (!all_finite(block + finite * tiles.row_size(), tiles.row_size())) break;
      if (finite < first + tile_rows) {
        Band two = band;
        two.top = std::max(band.top, top + 2 * r), two.bottom = std::min(band.bottom, top + 2 * r + 2);
        Scratch<T> pixels(tile_rows * columns * C);
        source.load(pixels.get(), C, columns, n, 0, C, pass.h.lowest(two.top), pass.h.span(two.rows()), column, columns);
        direct_band<T>(pass, two, taps, packed, pixels.get(), columns * C, C, out + (two.top - top - 2 * r) * y_row, y_columns);
        continue;
      }
      tiles.take_rows(block + first * tiles.row_size(), t);
      const int64_t parts = (across + Tiles::kTiles - 1) / Tiles::kTiles;
      for (int64_t part = 0, tile = 0; part < parts; ++part) {
        const int64_t count = across * (part + 1) / parts - tile;
        tiles.take_columns(t, tile, v);
        tiles.multiply(v, count, m, out + 2 * tile * padded, y_row);
        tile += count;
      }
    }
  });
}
