// Winograd's minimal filtering (Lavin & Gray, 2016) of 3x3 passes of stride 1: F(4x4, 3x3) with 49 products for 16 outputs in place of 144,
// or F(2x2, 3x3) with 16 for 4 in place of 36. Included by for_each_isa.h inside the namespace of each instruction set.
//
//   Y = A' [ (G w G') * (B' x B) ] A     for every tile x of the source and its tile Y of the output
//
// The sums over the channels are matrix products [tiles, channels] x [channels, output channels], one for each point of the rows with one
// of the columns. Tiles of 2 outputs have the points 0, 1, -1 and infinity along an axis; those of 4 have i and -i as well, which take
// three real products. (The usual points 2 and -2 lose 13 to 19 times as many digits as PyTorch's own convolution.) The numbers beside
// sources, weights and sums are 1, -1, 1/2 and 1/4, so inputs and weights that are small integers give exact results. A NaN or an infinity
// would spread over its tile, so a band that reads one is summed up directly.
//
// Floor, as parts of the direct products: 0.34 for tiles of 4 and 0.44 for tiles of 2. One Zen 4 core, 64-64 56² batch 4: direct 8.8 ms at
// the peak of 105 GFLOP/s, floor 3.0, measured 4.3 (tiles of 2: floor 3.9, measured 5.2). 128-128 56²: products take three quarters,
// packing of weights 7 %, the copies from and to NCHW 9, transforms 6.

// The product pays for the transforms from this many channels on either side; with fewer, the transforms' own roundings
// would show next to those of the sum as well.
inline constexpr int64_t kWinogradChannels = 32;
// More numbers than this in the transformed weights stay in no cache.
inline constexpr int64_t kCachedWeights = 2 << 20;

template <class T>
inline bool winograd_applies(const Pass& pass) {
  const bool square = pass.h.axis.taps == 3 && pass.w.axis.taps == 3;
  const bool dense =
      pass.groups == 1 && pass.h.axis.stride == 1 && pass.w.axis.stride == 1 && pass.h.axis.dilation == 1 && pass.w.axis.dilation == 1;
  return square && dense && pass.channels >= kWinogradChannels && pass.out_channels >= kWinogradChannels;
}

// Along an axis, the points of the kSide + 2 sources d of a tile, of the taps g, and what the sums m of their products add to the kSide
// outputs y. The points come in groups, which share what they are made of; one for tiles of 2.
template <int kSide>
struct TilePoints {
  static constexpr int kCount = 4, kGroups = 1, kMostOfGroup = 4;
  static constexpr int first(int group) { return 4 * group; }
  template <int kGroup, class T, class Sources>
  static INLINE void of_sources(const Sources& d, vec<T>* v) {
    const vec<T> d0 = d(0), d1 = d(1), d2 = d(2), d3 = d(3);
    v[0] = d0 - d2, v[1] = d1 + d2, v[2] = d2 - d1, v[3] = d3 - d1;
  }
  template <class T>
  static INLINE void of_weights(const vec<T> (&g)[3], vec<T> (&u)[4]) {
    const vec<T> sum = (g[0] + g[2]) * T(0.5), half = g[1] * T(0.5);
    u[0] = g[0], u[1] = sum + half, u[2] = sum - half, u[3] = g[2];
  }
  template <int kGroup, class T>
  static INLINE void add_outputs(const vec<T>* m, vec<T> (&y)[2]) {
    y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2] + m[3];
  }
};
// Groups of tiles of 4: 1 and -1; i and -i, a product of two numbers modulo x^2 + 1 by Karatsuba's three; 0 and infinity.
template <>
struct TilePoints<4> {
  static constexpr int kCount = 7, kGroups = 3, kMostOfGroup = 3;
  static constexpr int first(int group) { return group == 0 ? 0 : group == 1 ? 2 : group == 2 ? 5 : 7; }
  template <int kGroup, class T, class Sources>
  static INLINE void of_sources(const Sources& d, vec<T>* v) {
    if constexpr (kGroup == 0) {
      const vec<T> even = d(2) + d(4), odd = d(1) + d(3);
      v[0] = even + odd, v[1] = even - odd;
    } else if constexpr (kGroup == 1) {
      const vec<T> even = d(4) - d(2), odd = d(3) - d(1);
      v[0] = even + odd, v[1] = odd - even, v[2] = odd;
    } else {
      v[0] = d(0) - d(4), v[1] = d(5) - d(1);
    }
  }
  template <class T>
  static INLINE void of_weights(const vec<T> (&g)[3], vec<T> (&u)[7]) {
    const vec<T> sum = (g[0] + g[2]) * T(0.25), quarter = g[1] * T(0.25), difference = (g[0] - g[2]) * T(0.5), half = g[1] * T(0.5);
    u[0] = sum + quarter, u[1] = sum - quarter, u[2] = difference, u[3] = half, u[4] = difference + half, u[5] = g[0], u[6] = g[2];
  }
  template <int kGroup, class T>
  static INLINE void add_outputs(const vec<T>* m, vec<T> (&y)[4]) {
    if constexpr (kGroup == 0) {
      y[0] = y[2] = m[0] + m[1], y[1] = y[3] = m[0] - m[1];
    } else if constexpr (kGroup == 1) {
      const vec<T> even = m[0] - m[2], odd = m[1] - m[2];
      y[0] += even, y[1] += odd, y[2] -= even, y[3] -= odd;
    } else {
      y[0] += m[0], y[3] += m[1];
    }
  }
};

// f(the number of a group as a constant), for each group of points.
template <class Points, class F>
INLINE void each_group(const F& f) {
  f(std::integral_constant<int, 0>{});
  if constexpr (Points::kGroups == 3) f(std::integral_constant<int, 1>{}), f(std::integral_constant<int, 2>{});
}

// [group of rows][panel][point][channels][columns of the panel], from the packed weights of the direct pass, which have their taps in
// the order in which an output meets its sources.
template <int kSide, class T>
inline void pack_winograd(T* u, const Pass& pass, const T* packed) {
  using P = TilePoints<kSide>;
  constexpr int64_t kColumns = ConvTile<T>::kColumns, W = kLanes<T>;
  const int64_t padded = padded_channels<T>(pass.out_channels), C = pass.channels;
  const int64_t panels = (padded + kColumns - 1) / kColumns, chunk = 16, chunks = (C + chunk - 1) / chunk;
  torch::stable::parallel_for(0, panels * chunks, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / chunks * kColumns, columns = std::min(kColumns, padded - first);
      const T* panel = packed + first * 9 * C;
      for (int64_t c = i % chunks * chunk; c < std::min(C, (i % chunks + 1) * chunk); ++c)
        for (int64_t j = 0; j < columns; j += W) {
          vec<T> rows[3][P::kCount];  // the points of the rows, for each column of taps
#pragma GCC unroll 3
          for (int64_t kw = 0; kw < 3; ++kw) {
            vec<T> g[3];
          // A scatter meets rows from the last tap to the first as well; its columns are already packed that way.
#pragma GCC unroll 3
            for (int64_t kh = 0; kh < 3; ++kh) g[kh] = load(panel + (((pass.h.scatter ? 2 - kh : kh) * 3 + kw) * C + c) * columns + j);
            P::template of_weights<T>(g, rows[kw]);
          }
          each_group<P>([&](auto group) {
            constexpr int kFirst = P::first(group.value), kEnd = P::first(group.value + 1);
            T* out = u + (kFirst * padded + (kEnd - kFirst) * first) * P::kCount * C;
#pragma GCC unroll 4
            for (int a = kFirst; a < kEnd; ++a) {
              const vec<T> g[3] = {rows[0][a], rows[1][a], rows[2][a]};
              vec<T> points[P::kCount];
              P::template of_weights<T>(g, points);
#pragma GCC unroll 7
              for (int b = 0; b < P::kCount; ++b) store(out + (((a - kFirst) * P::kCount + b) * C + c) * columns + j, points[b]);
            }
          });
        }
    }
  });
}

// The points of one group of rows and of all columns, of the sources of one tile, `channels` of them in whole vectors.
template <int kSide, int kGroup, class T>
NOINLINE void tile_sources(const T* x, int64_t row_step, int64_t pixel_step, int64_t channels, T* v, int64_t v_step) {
  using P = TilePoints<kSide>;
  constexpr int kRows = P::first(kGroup + 1) - P::first(kGroup);
  for (int64_t c = 0; c < channels; c += kLanes<T>) {
    vec<T> t[kSide + 2][kRows];
#pragma GCC unroll 6
    for (int j = 0; j < kSide + 2; ++j)
      P::template of_sources<kGroup, T>([&](int64_t i) { return load(x + i * row_step + j * pixel_step + c); }, t[j]);
#pragma GCC unroll 4
    for (int a = 0; a < kRows; ++a) {
      vec<T> points[P::kCount];
      each_group<P>(
          [&](auto group) { P::template of_sources<group.value, T>([&](int64_t j) { return t[j][a]; }, points + P::first(group.value)); });
#pragma GCC unroll 7
      for (int b = 0; b < P::kCount; ++b) store(v + (a * P::kCount + b) * v_step + c, points[b]);
    }
  }
}

// What those points add to the outputs of one tile, `columns` channels of them in whole vectors.
template <int kSide, int kGroup, class T>
NOINLINE void tile_outputs(const T* m, int64_t m_step, int64_t columns, T* y, int64_t row_step, int64_t pixel_step) {
  using P = TilePoints<kSide>;
  constexpr int kRows = P::first(kGroup + 1) - P::first(kGroup);
  for (int64_t c = 0; c < columns; c += kLanes<T>) {
    vec<T> t[kSide][kRows];
#pragma GCC unroll 4
    for (int a = 0; a < kRows; ++a) {
      vec<T> points[P::kCount], row[kSide];
#pragma GCC unroll 7
      for (int b = 0; b < P::kCount; ++b) points[b] = load(m + (a * P::kCount + b) * m_step + c);
      each_group<P>([&](auto group) { P::template add_outputs<group.value, T>(points + P::first(group.value), row); });
#pragma GCC unroll 4
      for (int j = 0; j < kSide; ++j) t[j][a] = row[j];
    }
#pragma GCC unroll 4
    for (int j = 0; j < kSide; ++j) {
      vec<T> column[kSide];
      T* to = y + j * pixel_step + c;
#pragma GCC unroll 4
      for (int i = 0; i < kSide; ++i)
        if (kGroup > 0) column[i] = load(to + i * row_step);
      P::template add_outputs<kGroup, T>(t[j], column);
#pragma GCC unroll 4
      for (int i = 0; i < kSide; ++i)
        if (kGroup < 2 || i == 0 || i == kSide - 1) store(to + i * row_step, column[i]);
    }
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

// From a point to the next.
struct PointSteps {
  int64_t v, u, m;
};
// m[point][tile][kColumns] (+)= v[point][tile][channels] u[point][channels][kVectors vectors]; sums of at most `chain` terms one after
// another. With `in_memory`, the weights of the next sum are asked for during each.
template <int kVectors, class T>
NOINLINE void point_products(int64_t points, int64_t tiles, const T* v, int64_t stride, int64_t channels, int64_t chain, const T* u, T* m,
                             const PointSteps& steps, bool add, bool in_memory) {
  constexpr int64_t kColumns = ConvTile<T>::kColumns, kWidth = kVectors * kLanes<T>, kLine = 64 / sizeof(T);
  each_run_of_tiles<T>(tiles, [&](int64_t first, int64_t count, auto rows) {
    for (int64_t point = 0; point < points; ++point)
      for (int64_t c = 0; c < channels; c += chain) {
        const int64_t depth = std::min(chain, channels - c);
        const T* ahead = u + (c + depth < channels ? point * steps.u + (c + depth) * kWidth : (point + 1) * steps.u);
        const int64_t lines = in_memory ? depth * kWidth / count / kLine + 1 : 0;
        const T* from = v + point * steps.v + first * stride + c;
        T* to = m + point * steps.m + first * kColumns;
        for (int64_t i = 0; i < count; ++i, from += rows.value * stride, to += rows.value * kColumns) {
          for (int64_t line = 0; line < lines; ++line, ahead += kLine) __builtin_prefetch(ahead, 0, 2);  // the first-level cache is full
          vec<T> acc[rows.value][kVectors] = {};
          multiply_rows<rows.value, kVectors, T>(acc, from, stride, u + point * steps.u + c * kWidth, depth);
          flush<rows.value, kVectors, T>(acc, to, kColumns, add || c > 0);
        }
      }
  });
}

#define POINT_PRODUCTS(vectors)                                                                                                     \
  CONV_PRODUCT void point_products<vectors, float>(int64_t, int64_t, const float*, int64_t, int64_t, int64_t, const float*, float*, \
                                                   const PointSteps&, bool, bool);
POINT_PRODUCTS(1)
POINT_PRODUCTS(2)
#undef POINT_PRODUCTS

// How the tiles of a pass fall into tasks: bands of one image, or `images` images that are one band each.
struct TileTasks {
  Bands bands;
  int64_t tasks, images;  // images: of a task at most
};
// For tasks of about `tiles` tiles of side x side outputs.
inline TileTasks tile_tasks(const Pass& pass, const Window& window, int64_t side, int64_t tiles) {
  constexpr int64_t kFewTasks = 4;
  const Bands bands = make_bands(pass.h.outputs(), pass.w.outputs(), window, pass.batch, 1, tiles * side * side, side);
  if (bands.count() > 1) return {bands, pass.batch * bands.count(), 1};
  const int64_t of_image = ((bands.full_height + side - 1) / side) * ((bands.full_width + side - 1) / side);
  const int64_t images = std::max<int64_t>(1, std::min((tiles + of_image / 2) / of_image, pass.batch / kFewTasks));
  const int64_t tasks = (pass.batch + images - 1) / images;
  return {bands, tasks, (pass.batch + tasks - 1) / tasks};
}

// The side of the tiles. A row of weights costs about as much to transform as to multiply with kTransform tiles; the rows of tiles are
// shared out to two threads at least, so that an image of seven rows of tiles takes the time of eight.
inline int64_t winograd_side(const Pass& pass) {
  constexpr int64_t kTransform = 32;
  const auto cost = [&](int64_t side, int64_t points) {
    const int64_t rows = pass.batch * ((pass.h.outputs() + side - 1) / side), columns = (pass.w.outputs() + side - 1) / side;
    return points * (kTransform + round_up(rows, 2) * columns);
  };
  constexpr int64_t kFour = TilePoints<4>::kCount * TilePoints<4>::kCount, kTwo = TilePoints<2>::kCount * TilePoints<2>::kCount;
  return kFour * pass.channels * pass.out_channels <= kCachedWeights && cost(4, kFour) < cost(2, kTwo) ? 4 : 2;
}

// As direct_pass; `packed` are the weights of direct_pass. A task's tiles are computed in chunks: their transformed sources and their sums
// stay in the second-level cache, and the weights are read once for each chunk.
template <int kSide, class T, class Source, class MakeSink>
inline void winograd_pass(const Pass& pass, const Window& window, const T* packed, const Source& source, const MakeSink& make_sink) {
  using P = TilePoints<kSide>;
  constexpr int64_t kColumns = ConvTile<T>::kColumns, W = kLanes<T>, kTile = ConvTile<T>::kRows, kMostPoints = P::kMostOfGroup * P::kCount;
  // Of the sources and outputs of a task, of the transformed sources of a chunk.
  constexpr int64_t kTaskBytes = 384 << 10, kChunkBytes = 320 << 10;
  const int64_t padded = padded_channels<T>(pass.out_channels), C = pass.channels, block_stride = round_up(C, W);
  const int64_t u_size = P::kCount * P::kCount * C * padded;
  const bool in_memory = u_size > kCachedWeights;
  Scratch<T> u(u_size);
  pack_winograd<kSide, T>(u.get(), pass, packed);
  const int64_t most_of_task = std::clamp<int64_t>(kTaskBytes / ((C + padded) * kSide * kSide * sizeof(T)), 2 * kTile, 8 * kTile);
  // Tiles of a chunk, which may have half as many again.
  const int64_t usual = std::clamp<int64_t>(kChunkBytes / (kMostPoints * C * sizeof(T)) / kTile, 2, 4) * kTile;
  const TileTasks plan = tile_tasks(pass, window, kSide, most_of_task);
  const Bands& bands = plan.bands;
  const auto sink = make_sink(bands);
  // One vector more than the channels, so that rows of tiles do not fall onto the same sets of the first-level cache.
  const int64_t stride = block_stride + W, v_step = 3 * usual / 2 * stride + W, m_step = 3 * usual / 2 * kColumns + W;
  const int64_t across = (bands.full_columns() + kSide - 1) / kSide, down = (bands.full_rows() + kSide - 1) / kSide;
  const int64_t columns = across * kSide + 2, rows = down * kSide + 2, block_size = rows * columns * block_stride;
  const int64_t y_columns = across * kSide, y_row = y_columns * padded, y_size = down * kSide * y_row + W;
  const int64_t chains = (C + pass.sum_length - 1) / pass.sum_length, chain = (C + chains - 1) / chains;
  const auto taps = pass.taps(columns, block_stride);
  const int64_t per_image = bands.count(), whole = pass.batch * per_image;
  torch::stable::parallel_for(0, plan.tasks, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> blocks(plan.images * block_size), v(kMostPoints * v_step), m(kMostPoints * m_step), y(plan.images * y_size);
    std::vector<const T*> from(plan.images * across * down);  // where tiles begin
    std::vector<T*> to(from.size());
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first_unit = whole * task / plan.tasks, units = whole * (task + 1) / plan.tasks - first_unit;
      int64_t tiles = 0;
      for (int64_t unit = 0; unit < units; ++unit) {
        const Band band = bands.full((first_unit + unit) % per_image);
        T *block = blocks.get() + unit * block_size, *corner = y.get() + unit * y_size;
        source.load(block, block_stride, columns, (first_unit + unit) / per_image, 0, C, pass.h.lowest(band.top), rows,
                    pass.w.lowest(band.left), columns);
        if (!all_finite(block, block_size)) {
          direct_band<T>(pass, band, taps, packed, block, columns * block_stride, block_stride, corner, y_columns);
          continue;
        }
        for (int64_t r = 0; r < band.rows(); r += kSide)
          for (int64_t p = 0; p < band.columns(); p += kSide, ++tiles) {
            from[tiles] = block + (r * columns + p) * block_stride;
            to[tiles] = corner + r * y_row + p * padded;
          }
      }
      const int64_t chunks = std::max<int64_t>(1, (tiles + usual / 2) / usual), chunk = (tiles + chunks - 1) / chunks;
      for (int64_t begin_of_chunk = 0; begin_of_chunk < tiles; begin_of_chunk += chunk) {
        const int64_t count = std::min(chunk, tiles - begin_of_chunk);
        const T* const* chunk_from = from.data() + begin_of_chunk;
        T* const* chunk_to = to.data() + begin_of_chunk;
        each_group<P>([&](auto group) {
          constexpr int64_t kFirst = P::first(group.value), kPoints = (P::first(group.value + 1) - kFirst) * P::kCount;
          for (int64_t t = 0; t < count; ++t)
            tile_sources<kSide, group.value, T>(chunk_from[t], columns * block_stride, block_stride, block_stride, v.get() + t * stride,
                                                v_step);
          for (int64_t first = 0; first < padded; first += kColumns) {
            const int64_t width = std::min(kColumns, padded - first);
            const T* panel = u.get() + (kFirst * P::kCount * padded + kPoints * first) * C;
            const PointSteps steps{v_step, C * width, m_step};
            if (width == kColumns)
              point_products<2, T>(kPoints, count, v.get(), stride, C, chain, panel, m.get(), steps, false, in_memory);
            else
              point_products<1, T>(kPoints, count, v.get(), stride, C, chain, panel, m.get(), steps, false, in_memory);
            for (int64_t t = 0; t < count; ++t)
              tile_outputs<kSide, group.value, T>(m.get() + t * kColumns, m_step, width, chunk_to[t] + first, y_row, padded);
          }
        });
      }
      for (int64_t unit = 0; unit < units; ++unit)
        sink((first_unit + unit) / per_image, 0, (first_unit + unit) % per_image, y.get() + unit * y_size, y_columns, padded);
    }
  });
}
