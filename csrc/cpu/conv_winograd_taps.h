// Winograd's minimal filtering for few input channels: kernels of any size, stride 1 or 2, forward. Included by for_each_isa.h inside the
// namespace of each instruction set.
//
// Along an axis a stride of 2 cuts the taps into two phases, and each phase is cut into runs. A run of taps g, as a polynomial g(x), meets
// the sources d of a tile of neighbouring outputs y at points p:
//
//   m_p = (B d)_p g(p) / prod_(q != p) (p - q),   y_k = sum_p p^k m_p,   and at infinity m = (B d) g_last, which the last y alone gets
//
// where row p of B holds the coefficients of prod_(q != p) (x - q). The way from points to outputs is the same for all runs, so the
// products of a point are summed over runs, phases and channels before it is taken. Columns come in tiles of 2 outputs, with the points 0,
// 1, -1, infinity and runs of up to 3 taps: 7 taps (of stride 2: 2 + 2 and 3; of stride 1: 3 + 2 + 2) take 10 products for 14, 5 taps 7
// for 10. Rows do the same, or come in tiles of 3 outputs with 2 and -1/2 as well and runs of up to 4: 7 taps (4 and 3) take 11 for 21. In
// two dimensions these are 100 for 196 and 110 for 294.
//
// The numbers beside the sources are dyadic, and so are those beside the weights, which tiles of 3 scale by 15: inputs and weights that are
// small integers give exact sums. The way back multiplies by 1/5 and then by 1/3 as float32 has them, which are too large by 2^-26 and
// 2^-25 of themselves: the product with a multiple of 5 or 3 is off by less than half a step and rounds to the quotient. (1/15 is off by
// 7 * 2^-27, and it would not.) A NaN or an infinity would spread over its tile, so a row of tiles that reads one is summed up directly.
//
// Few channels do not fill vectors: lanes of the source's transform are tiles, for which the block holds the columns of the source that
// tiles have at the same place one after the other. A task owns a band of outputs. For each row of tiles it takes the rows of the source
// to points, then, for as many tiles as share a product, the columns; the sums of half of the points stay near until the way back
// adds them to the outputs. Tiles lie on even rows of the image, or every third, so that a row's results do not depend on the band.
//
// Floor: the products, 110/294 of the direct ones. 3 -> 64 channels, 7x7 of stride 2 on 224 x 224, in multiply-adds of 16 lanes: 7.4
// million directly, 3.8 in tiles of 2 rows, 2.8 in tiles of 3. With norm, ReLU and pool tiles of 3 were predicted to take 0.86 of the time
// of tiles of 2 and measured 0.84 on one thread, 0.85 on two, on cores of one such multiply-add a cycle; products at 95 % of their floor.

// The points of an axis whose tiles have kOutputs outputs, infinity being the last.
template <int kOutputs>
struct TapPoint {
  static constexpr int kCount = kOutputs == 2 ? 4 : 6, kMostTaps = kCount + 1 - kOutputs;
  static constexpr double kAt[] = {0, 1, -1, 2, -0.5};
  static constexpr double kFactors[] = {5, 3};  // of the weights' scale
  static constexpr double kScale = kOutputs == 2 ? 1 : 15;
  static constexpr bool has(int taps, int point) { return point < kOutputs + taps - 1; }
};

// What a run of taps and its sources are multiplied by to get to the points: the coefficients of the product of all x - p but that of the
// point itself (of all, at infinity) and the powers of p over that product's value at p.
template <int kOutputs, int kTaps>
struct RunPoints {
  using Point = TapPoint<kOutputs>;
  static constexpr int kSources = kOutputs + kTaps - 1;  // and as many points
  double weights[kSources][kTaps] = {}, sources[kSources][kSources] = {};
  constexpr RunPoints() {
    for (int i = 0; i < kSources; ++i) {
      const bool infinite = i == Point::kCount - 1;
      double value = 1, power = Point::kScale;
      sources[i][0] = 1;
      for (int j = 0; j < std::min(kSources, Point::kCount - 1); ++j) {
        if (j == i) continue;
        for (int k = kSources - 1; k >= 0; --k) sources[i][k] = (k > 0 ? sources[i][k - 1] : 0) - sources[i][k] * Point::kAt[j];
        if (!infinite) value *= Point::kAt[i] - Point::kAt[j];
      }
      for (int k = 0; k < kTaps; ++k) {
        weights[i][k] = infinite ? (k == kTaps - 1 ? Point::kScale : 0) : power / value;
        if (!infinite) power *= Point::kAt[i];
      }
    }
  }
};

// Taps of an axis, `stride` apart, that are filtered together.
struct TapRun {
  int64_t count, first;
};

// The runs of an axis whose tiles have kOutputs outputs: as few as can be, of as equal a length as can be.
struct TapRuns {
  static constexpr int kPoints = 6;
  std::vector<TapRun> runs;
  std::vector<std::array<int64_t, kPoints>> place;  // of a run among those that have a point
  std::array<int64_t, kPoints> count = {};          // of runs that have a point
  template <int kOutputs>
  static TapRuns of(const Axis& axis) {
    using Point = TapPoint<kOutputs>;
    TapRuns all;
    for (int64_t phase = 0; phase < axis.stride; ++phase) {
      const int64_t taps = (axis.taps - phase + axis.stride - 1) / axis.stride, parts = (taps + Point::kMostTaps - 1) / Point::kMostTaps;
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t first = (taps * part + parts - 1) / parts, end = (taps * (part + 1) + parts - 1) / parts;
        const TapRun run{end - first, phase + first * axis.stride};
        all.place.push_back(all.count);
        for (int point = 0; point < Point::kCount; ++point) all.count[point] += Point::has(run.count, point);
        all.runs.push_back(run);
      }
    }
    return all;
  }
  int64_t products() const {
    int64_t sum = 0;
    for (const int64_t runs_of_point : count) sum += runs_of_point;
    return sum;
  }
};

// The sum of point i of the rows and j of the columns has as many terms as runs of the rows have i times runs of the columns have j times
// channels. They come in the order in which the way back takes them: j = 1 and -1 for all i, then 0 and infinity.
struct TapPoints {
  static constexpr int kColumns = 4, kOrder[kColumns] = {1, 2, 0, 3};
  int64_t outputs, rows, channels, terms = 0;  // rows: points of the rows
  TapRuns h, w;
  int64_t first[TapRuns::kPoints][kColumns] = {}, depths[TapRuns::kPoints * kColumns] = {};
  template <int kOutputs>
  static TapPoints of(const Pass& pass) {
    TapPoints all{kOutputs, TapPoint<kOutputs>::kCount, pass.channels, 0, TapRuns::of<kOutputs>(pass.h.axis), TapRuns::of<2>(pass.w.axis)};
    for (int64_t k = 0; k < all.rows * kColumns; ++k) {
      const int64_t i = k / 2 % all.rows, j = kOrder[k / (2 * all.rows) * 2 + k % 2];
      all.first[i][j] = all.terms;
      all.terms += all.depths[k] = all.h.count[i] * all.w.count[j] * pass.channels;
    }
    return all;
  }
};

// The products pay for the transforms where they are few enough and each output channel's vector is multiplied often enough; sums of few
// terms have so small an error that the transforms' own roundings would show.
template <class T>
inline bool taps_apply(const Pass& pass) {
  constexpr int64_t kMostTerms = 1600, kLeastColumns = 12;
  const auto fits = [](const PassAxis& a) { return !a.scatter && a.axis.dilation == 1 && a.axis.stride <= 2 && a.axis.taps > 3; };
  if (!std::is_same_v<T, float> || pass.groups > 1 || !fits(pass.h) || !fits(pass.w)) return false;
  const int64_t least_vectors = pass.h.axis.taps == 4 && pass.w.axis.taps == 4 ? 4 : 2;
  return pass.depth() > kSumLength && TapPoints::of<2>(pass).terms <= kMostTerms && pass.out_channels >= least_vectors * kLanes<T> &&
         pass.w.outputs() >= kLeastColumns;
}

// Rows of a tile: 3 where that saves a fifth of an image's products and the sums are long enough for its larger roundings. Over seeds and
// kinds of inputs its largest error was at most 0.85 of what the rule allows; with 4 rows of taps 0.98, where PyTorch's sums are short.
inline int64_t rows_of_tiles(const Pass& pass) {
  constexpr int64_t kLeastTerms = 144, kLeastTaps = 7;
  const auto products = [&](const TapPoints& points) { return points.terms * ((pass.h.outputs() + points.outputs - 1) / points.outputs); };
  const bool accurate = pass.depth() >= kLeastTerms && pass.h.axis.taps >= kLeastTaps;
  return accurate && 5 * products(TapPoints::of<3>(pass)) <= 4 * products(TapPoints::of<2>(pass)) ? 3 : 2;
}

// f(taps of the run as a constant).
template <int kOutputs, class F>
INLINE void with_run(const TapRun& run, F f) {
  with_constant<TapPoint<kOutputs>::kMostTaps - 1>(run.count - 1, [&](auto n) { f(std::integral_constant<int, n.value + 1>{}); });
}

// out[i] = the sum of matrix[i][k] x[k], whose coefficients the compiler knows.
template <class T, int kOut, int kIn>
INLINE void combine(const double (&matrix)[kOut][kIn], const vec<T> (&x)[kIn], vec<T> (&out)[kOut]) {
#pragma GCC unroll 6
  for (int i = 0; i < kOut; ++i) {
    bool begun = false;
#pragma GCC unroll 6
    for (int k = 0; k < kIn; ++k) {
      if (matrix[i][k] == 0) continue;
      const vec<T> term = x[k] * static_cast<T>(matrix[i][k]);
      out[i] = begun ? out[i] + term : term;
      begun = true;
    }
  }
}
template <int kOutputs, int kTaps>
inline constexpr RunPoints<kOutputs, kTaps> kRunPoints{};

// [panel][terms][columns of the panel], from the packed weights of the direct pass.
template <int kDown, class T>
inline void pack_taps(T* u, const Pass& pass, const TapPoints& points, const T* packed) {
  constexpr int64_t kColumns = ConvTile<T>::kColumns, W = kLanes<T>;
  const int64_t padded = padded_channels<T>(pass.out_channels), C = pass.channels, vectors = padded / W;
  torch::stable::parallel_for(0, vectors * C, std::max<int64_t>(1, 4096 / pass.depth() * C), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t lane = item / C * W, c = item % C, panel = lane / kColumns * kColumns;
      const int64_t columns = std::min(kColumns, padded - panel);
      const T* in = packed + panel * pass.depth() + lane - panel;
      T* out = u + panel * points.terms + lane - panel;
      for (size_t a = 0; a < points.h.runs.size(); ++a)
        for (size_t b = 0; b < points.w.runs.size(); ++b) {
          const TapRun &h = points.h.runs[a], &w = points.w.runs[b];
          with_run<kDown>(h, [&](auto rows) {
            with_run<2>(w, [&](auto cols) {
              constexpr int kH = rows.value, kW = cols.value, kRows = kDown + kH - 1, kCols = kW + 1;
              vec<T> t[kW][kRows];
#pragma GCC unroll 3
              for (int j = 0; j < kW; ++j) {
                vec<T> g[kH];
#pragma GCC unroll 4
                for (int i = 0; i < kH; ++i)
                  g[i] = load(in + (pass.weight_row(h.first + i * pass.h.axis.stride, w.first + j * pass.w.axis.stride) + c) * columns);
                combine<T>(kRunPoints<kDown, kH>.weights, g, t[j]);
              }
#pragma GCC unroll 6
              for (int i = 0; i < kRows; ++i) {
                vec<T> g[kW], row[kCols];
#pragma GCC unroll 3
                for (int j = 0; j < kW; ++j) g[j] = t[j][i];
                combine<T>(kRunPoints<2, kW>.weights, g, row);
#pragma GCC unroll 4
                for (int j = 0; j < kCols; ++j) {
                  const int64_t place = (points.h.place[a][i] * points.w.count[j] + points.w.place[b][j]) * C + c;
                  store(out + (points.first[i][j] + place) * columns, row[j]);
                }
              }
            });
          });
        }
    }
  });
}

// m[point][tile][kColumns] = v[terms of the point][step] u[terms of the point][kVectors vectors], for `points` one after the other; sums
// of at most kSumLength terms.
template <int kVectors, class T>
NOINLINE void taps_products(int64_t tiles, int64_t points, const int64_t* depths, const T* v, int64_t step, const T* u, T* m,
                            int64_t m_step) {
  with_constant<ConvTile<T>::kRows>(tiles, [&](auto rows) {
    vec<T> acc[rows.value][kVectors] = {};
    for (int64_t point = 0; point < points; ++point, m += m_step) {
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

CONV_PRODUCT void taps_products<1, float>(int64_t, int64_t, const int64_t*, const float*, int64_t, const float*, float*, int64_t);
CONV_PRODUCT void taps_products<2, float>(int64_t, int64_t, const int64_t*, const float*, int64_t, const float*, float*, int64_t);

// What a band is computed from and in: sizes of a task's scratch memory and the steps from the source to the outputs.
template <class T, int kDown>
struct TapTiles {
  using Point = TapPoint<kDown>;
  static constexpr int64_t W = kLanes<T>, kColumns = ConvTile<T>::kColumns, kTiles = ConvTile<T>::kRows;  // of a product
  static constexpr int64_t kTileLanes = (kTiles + W - 1) / W * W;
  const Pass& pass;
  const TapPoints& points;
  const T* u;
  int64_t places, length;  // columns of the source that a tile begins anew after, and tiles (and what they reach) of each
  int64_t rows, padded;

  TapTiles(const Pass& pass, const TapPoints& points, const T* u, int64_t output_rows, int64_t output_columns)
      : pass(pass), points(points), u(u) {
    const int64_t across = (output_columns + 1) / 2, reach = pass.w.axis.taps + pass.w.axis.stride - 1;
    places = 2 * pass.w.axis.stride;
    length = round_up(across - 1 + kTileLanes + reach / places, W);
    rows = pass.h.span(output_rows);
    padded = padded_channels<T>(pass.out_channels);
  }
  int64_t row_size() const { return pass.channels * places * length; }
  int64_t block_size() const { return rows * row_size(); }
  int64_t rows_size() const { return points.h.products() * row_size(); }
  int64_t v_size() const { return points.terms * kTileLanes; }
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
          // No hardware prefetcher follows the rows: the one below is asked for.
          const auto* below = image->data + n * image->n + c * image->c + std::min(row + r + 1, image->height - 1) * image->h;
          for (int64_t i = 0; row + r >= 0 && i < image->width; i += 64 / sizeof *below) __builtin_prefetch(below + i);
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
      T* to[Point::kCount];
      for (int64_t i = 0, before = 0; i < Point::kCount; before += points.h.count[i++]) to[i] = t + (before + points.h.place[a][i]) * size;
      const T* from = block + run.first * size;
      with_run<kDown>(run, [&](auto taps) {
        constexpr int kSources = kDown + taps.value - 1;
        for (int64_t x = 0; x < size; x += W) {
          vec<T> d[kSources], v[kSources];
#pragma GCC unroll 6
          for (int i = 0; i < kSources; ++i) d[i] = load(from + i * step + x);
          combine<T>(kRunPoints<kDown, taps.value>.sources, d, v);
#pragma GCC unroll 6
          for (int i = 0; i < kSources; ++i) store(to[i] + x, v[i]);
        }
      });
    }
  }

  // The points of the columns of up to kTiles tiles from `tile` on: v[terms][kTileLanes].
  NOINLINE void take_columns(const T* t, int64_t tile, T* v) const {
    const int64_t C = pass.channels, size = row_size();
    for (size_t b = 0; b < points.w.runs.size(); ++b) {
      const TapRun& run = points.w.runs[b];
      with_run<2>(run, [&](auto taps) {
        constexpr int kSources = taps.value + 1;
        const T* from[kSources];
        for (int i = 0; i < kSources; ++i) {
          const int64_t column = run.first + i * pass.w.axis.stride;
          from[i] = t + column % places * C * length + column / places + tile;
        }
        for (int64_t point = 0, row = 0; point < Point::kCount; ++point) {
          T* to[kSources];
          for (int j = 0; j < kSources; ++j) to[j] = v + (points.first[point][j] + points.w.place[b][j] * C) * kTileLanes;
          for (int64_t i = 0; i < points.h.count[point]; ++i, ++row) {
            for (int64_t c = 0; c < C; ++c)
#pragma GCC unroll 2
              for (int64_t lane = 0; lane < kTileLanes; lane += W) {
                vec<T> d[kSources], p[kSources];
#pragma GCC unroll 4
                for (int k = 0; k < kSources; ++k) d[k] = load(from[k] + row * size + c * length + lane);
                combine<T>(kRunPoints<2, taps.value>.sources, d, p);
#pragma GCC unroll 4
                for (int j = 0; j < kSources; ++j) store(to[j] + c * kTileLanes + lane, p[j]);
              }
            for (int j = 0; j < kSources; ++j) to[j] += points.w.count[j] * C * kTileLanes;
          }
        }
      });
    }
  }

  // The rows' points of one of the columns', kSums apart in pairs, to kDown outputs.
  static INLINE void rows_of_points(const T* m, vec<T> (&y)[kDown]) {
    vec<T> at[Point::kCount];
#pragma GCC unroll 6
    for (int i = 0; i < Point::kCount; ++i) at[i] = load(m + 2 * i * kSums);
    const vec<T> sum = at[1] + at[2], difference = at[1] - at[2];
    if constexpr (kDown == 2) {
      y[0] = at[0] + sum, y[1] = difference + at[3];
    } else {
      y[0] = at[0] + sum + (at[3] + at[4]);
      y[1] = difference - at[4] * T(0.5) + at[3] * T(2);
      y[2] = sum + at[4] * T(0.25) + at[3] * T(4) + at[5];
    }
  }

  // What the points 1 and -1 of the columns add to the kDown x 2 outputs at y; with those the others, which complete them.
  template <bool kLast>
  INLINE void add_outputs(const T* m, T* y, int64_t y_row) const {
    vec<T> first[kDown], second[kDown];
    rows_of_points(m, first);
    rows_of_points(m + kSums, second);
#pragma GCC unroll 3
    for (int i = 0; i < kDown; ++i, y += y_row) {
      if constexpr (kLast) {
        vec<T> left = load(y) + first[i], right = load(y + padded) + second[i];
        if constexpr (kDown == 3)
          for (const double factor : Point::kFactors) left *= static_cast<T>(1 / factor), right *= static_cast<T>(1 / factor);
        store(y, left), store(y + padded, right);
      } else {
        store(y, first[i] + second[i]), store(y + padded, first[i] - second[i]);
      }
    }
  }

  // All output channels of the tiles whose sources are v; the first of them is to be at y.
  void multiply(const T* v, int64_t tiles, T* m, T* y, int64_t y_row) const {
    constexpr int64_t kHalf = 2 * Point::kCount;
    for (int64_t first = 0; first < padded; first += kColumns) {
      const int64_t width = std::min(kColumns, padded - first);
      // Half of the points at a time, whose sums stay in the first-level cache until the way back adds them up.
      const T *sources = v, *weights = u + first * points.terms;
      const auto half = [&](const int64_t* depths, auto last) {
        if (width == kColumns)
          taps_products<2, T>(tiles, kHalf, depths, sources, kTileLanes, weights, m, kSums);
        else
          taps_products<1, T>(tiles, kHalf, depths, sources, kTileLanes, weights, m, kSums);
        for (int64_t tile = 0; tile < tiles; ++tile)
          for (int64_t c = 0; c < width; c += W) add_outputs<last.value>(m + tile * kColumns + c, y + 2 * tile * padded + first + c, y_row);
        sources += points.first[0][0] * kTileLanes, weights += points.first[0][0] * width;
      };
      half(points.depths, std::false_type{});
      half(points.depths + kHalf, std::true_type{});
    }
  }
};

// As direct_pass; `packed` are its weights, u those of pack_taps.
template <int kDown, class T, class Source, class Sink>
inline void taps_pass(const Pass& pass, const Bands& bands, const TapPoints& points, const T* packed, const T* u, const Source& source,
                      const Sink& sink) {
  using Tiles = TapTiles<T, kDown>;
  const int64_t padded = padded_channels<T>(pass.out_channels), C = pass.channels;
  const int64_t y_columns = round_up(bands.full_columns(), 2), y_row = y_columns * padded;
  const Tiles tiles(pass, points, u, bands.full_rows() + 2 * (kDown - 1), y_columns);
  const int64_t scratch = tiles.block_size() + tiles.rows_size() + tiles.v_size() + 2 * Tiles::Point::kCount * Tiles::kSums;
  const int64_t columns = pass.w.span(y_columns), tile_rows = pass.h.span(kDown), tile_step = kDown * pass.h.axis.stride;
  const auto taps = pass.taps(columns, C);
  each_band<T, T>(pass, bands, y_columns, scratch, kDown - 1, sink, [&](T* block, int64_t n, int64_t, const Band& band, T* y) {
    T *t = block + tiles.block_size(), *v = t + tiles.rows_size(), *m = v + tiles.v_size();
    const int64_t top = band.top / kDown * kDown, down = (band.bottom - top + kDown - 1) / kDown, across = (band.columns() + 1) / 2;
    const int64_t rows = pass.h.span(kDown * down), row = pass.h.lowest(top), column = pass.w.lowest(band.left);
    tiles.load_source(block, source, n, row, rows, column);
    int64_t finite = 0;  // the rows of the source before this one, from the first of the tiles on
    y -= (band.top - top) * y_row;
    for (int64_t r = 0; r < down; ++r) {
      T* out = y + kDown * r * y_row;
      const int64_t first = r * tile_step;
      for (finite = std::max(finite, first); finite < first + tile_rows; ++finite)
        if (!all_finite(block + finite * tiles.row_size(), tiles.row_size())) break;
      if (finite < first + tile_rows) {
        Band few = band;
        few.top = std::max(band.top, top + kDown * r), few.bottom = std::min(band.bottom, top + kDown * (r + 1));
        Scratch<T> pixels(tile_rows * columns * C);
        source.load(pixels.get(), C, columns, n, 0, C, pass.h.lowest(few.top), pass.h.span(few.rows()), column, columns);
        direct_band<T>(pass, few, taps, packed, pixels.get(), columns * C, C, out + (few.top - top - kDown * r) * y_row, y_columns);
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
