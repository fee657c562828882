// Winograd's minimal filtering F(2x2, 2x2) over the phases of a pass of stride 2 with 3 or 4 taps an axis: 9 products for 4 sums of 4
// terms in place of 16. Included by for_each_isa.h inside the namespace of each instruction set.
//
// The outputs of a scatter (a transposed convolution, the gradient of a convolution) fall into 2 x 2 phases, each a convolution of
// stride 1 with every second tap of the kernel; a gather is the sum of four such convolutions, one for each phase of its sources. Along
// an axis, with two taps g and the sources d of two neighbouring outputs of a phase, or with one tap:
//
//   m0 = (d0 - d2) g0,  m1 = (d1 + d2) (g0 + g1) / 2,  m2 = (d2 - d1) (g0 - g1) / 2,   y0 = m0 + m1 + m2,  y1 = m1 - m2
//   m0 = (d0 - d1) g0,  m1 = d1 g0,                                                    y0 = m0 + m1,       y1 = m1
//
// which are 3/4 of the products of 4 taps and 5/6 of those of 3: 36 for 64, and 25 for 36, in two dimensions. The sums over the channels
// are matrix products [tiles, channels] x [channels, output channels], one for each pair of an m of the rows and one of the columns
// ("point"). The numbers beside the sources are 1, -1 and 1/2, so inputs and weights that are small integers give exact results, and the
// largest error is below that of PyTorch's transposed convolution.
// A NaN or an infinity would spread over its tile, so a band that reads one is summed up directly.
//
// A task owns about 64 tiles, of one band or of several small images: each weight is read from the third-level cache or from memory once
// for all of them, and asked for one chain of a sum ahead. A phase's transformed sources, of up to 144 channels at a time, and its sums
// stay in the second-level cache. Floor: 36/64 of the direct operations at the multiply-add peak.

// The product pays for the transforms from this many channels on either side.
inline constexpr int64_t kPhasesChannels = 32;

template <class T>
inline bool phases_apply(const Pass& pass, const Window& window) {
  const auto fits = [](const Axis& a) { return a.stride == 2 && a.dilation == 1 && (a.taps == 3 || a.taps == 4); };
  const bool wide = pass.channels >= kPhasesChannels && pass.out_channels >= kPhasesChannels;
  // Tiles of a scatter begin at a multiple of 4, windows of a pool anywhere.
  const bool aligned = !pass.h.scatter || window.kind == Pooling::none;
  return std::is_same_v<T, float> && pass.groups == 1 && fits(pass.h.axis) && fits(pass.w.axis) && wide && aligned;
}

// One phase of an axis: the taps in the order of their sources, the source of the first of them for the first output of a band
// (counted from the lowest that the band reads), the distance to the next, and the first output.
struct Phase {
  int64_t count;
  int64_t taps[2];
  int64_t source, step, output;
  int64_t points() const { return count + 1; }
};
inline Phase phase_of_axis(const PassAxis& axis, int64_t phase) {
  const bool two = phase + 2 < axis.axis.taps;
  const int64_t count = two ? 2 : 1;
  if (!axis.scatter) return {count, {phase, phase + 2}, phase, 2, 0};
  const int64_t output = axis.first_of_phase(0, phase);
  return {count, {two ? phase + 2 : phase, phase}, axis.base(output) - axis.lowest(0) - (two ? 1 : 0), 1, output};
}

// f(taps of the rows, taps of the columns) as constants.
template <class F>
INLINE void with_taps(const Phase& h, const Phase& w, F f) {
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  if (h.count == 2)
    w.count == 2 ? f(Two{}, Two{}) : f(Two{}, One{});
  else
    w.count == 2 ? f(One{}, Two{}) : f(One{}, One{});
}

// The points of weights, of sources and, the other way, of outputs, along one axis.
template <int kTaps, class T>
INLINE void weight_points(const vec<T> (&g)[kTaps], vec<T> (&u)[kTaps + 1]) {
  if constexpr (kTaps == 2)
    u[0] = g[0], u[1] = (g[0] + g[1]) * T(0.5), u[2] = (g[0] - g[1]) * T(0.5);
  else
    u[0] = u[1] = g[0];
}
template <int kTaps, class T>
INLINE void source_points(const vec<T> (&d)[kTaps + 1], vec<T> (&v)[kTaps + 1]) {
  if constexpr (kTaps == 1) {
    v[0] = d[0] - d[1], v[1] = d[1];
  } else {
    v[0] = d[0] - d[2], v[1] = d[1] + d[2], v[2] = d[2] - d[1];
    if constexpr (kTaps == 3) v[3] = d[3] - d[1];
  }
}
template <int kTaps, class T>
INLINE void outputs_of_points(const vec<T> (&m)[kTaps + 1], vec<T> (&y)[2]) {
  if constexpr (kTaps == 2)
    y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2];
  else
    y[0] = m[0] + m[1], y[1] = m[1];
}

// [phase][panel][point][channels][columns of the panel], from the packed weights of the direct pass.
template <class T>
inline void pack_phases(T* u, const Pass& pass, const T* packed) {
  constexpr int64_t kColumns = ConvTile<T>::kColumns, W = kLanes<T>;
  const int64_t padded = padded_channels<T>(pass.out_channels), C = pass.channels;
  const int64_t panels = (padded + kColumns - 1) / kColumns, chunk = 16, chunks = (C + chunk - 1) / chunk;
  for (int64_t ph = 0; ph < 2; ++ph)
    for (int64_t pw = 0; pw < 2; ++pw) {
      const Phase h = phase_of_axis(pass.h, ph), w = phase_of_axis(pass.w, pw);
      const int64_t points = h.points() * w.points();
      torch::stable::parallel_for(0, panels * chunks, 8, [&](int64_t begin, int64_t end) {
        with_taps(h, w, [&](auto taps_h, auto taps_w) {
          constexpr int kH = taps_h.value, kW = taps_w.value;
          for (int64_t i = begin; i < end; ++i) {
            const int64_t first = i / chunks * kColumns, columns = std::min(kColumns, padded - first);
            const T* panel = packed + first * pass.depth();
            T* out = u + first * points * C;
            for (int64_t c = i % chunks * chunk; c < std::min(C, (i % chunks + 1) * chunk); ++c)
              for (int64_t j = 0; j < columns; j += W) {
                vec<T> t[kW][kH + 1];  // the points of the rows
#pragma GCC unroll 2
                for (int kw = 0; kw < kW; ++kw) {
                  vec<T> g[kH];
#pragma GCC unroll 2
                  for (int kh = 0; kh < kH; ++kh)
                    g[kh] = load(panel + (pass.weight_row(h.taps[kh], w.taps[kw]) + c) * columns + j);
                  weight_points<kH, T>(g, t[kw]);
                }
#pragma GCC unroll 3
                for (int a = 0; a <= kH; ++a) {
                  vec<T> g[kW], row[kW + 1];
#pragma GCC unroll 2
                  for (int kw = 0; kw < kW; ++kw) g[kw] = t[kw][a];
                  weight_points<kW, T>(g, row);
#pragma GCC unroll 3
                  for (int b = 0; b <= kW; ++b) store(out + ((a * (kW + 1) + b) * C + c) * columns + j, row[b]);
                }
              }
          }
        });
      });
      u += points * C * padded;
    }
}

// The points of one tile of sources, `channels` of them in whole vectors.
template <int kH, int kW, class T>
NOINLINE void phase_sources(const T* x, int64_t row_step, int64_t pixel_step, int64_t channels, T* v, int64_t v_step) {
  for (int64_t c = 0; c < channels; c += kLanes<T>) {
    vec<T> t[kW + 1][kH + 1];
#pragma GCC unroll 4
    for (int j = 0; j <= kW; ++j) {
      vec<T> d[kH + 1];
#pragma GCC unroll 4
      for (int i = 0; i <= kH; ++i) d[i] = load(x + i * row_step + j * pixel_step + c);
      source_points<kH, T>(d, t[j]);
    }
#pragma GCC unroll 4
    for (int a = 0; a <= kH; ++a) {
      vec<T> d[kW + 1], row[kW + 1];
#pragma GCC unroll 4
      for (int j = 0; j <= kW; ++j) d[j] = t[j][a];
      source_points<kW, T>(d, row);
#pragma GCC unroll 4
      for (int b = 0; b <= kW; ++b) store(v + (a * (kW + 1) + b) * v_step + c, row[b]);
    }
  }
}

// The 2 x 2 outputs of one tile and phase, `columns` channels of them in whole vectors. kFinish: with alpha, beta and floor of `out`.
template <int kH, int kW, bool kFinish, class T>
NOINLINE void phase_outputs(const T* m, int64_t m_step, int64_t columns, T* y, const DirectOutput<T>& out, int64_t first) {
  for (int64_t c = 0; c < columns; c += kLanes<T>) {
    vec<T> t[kW + 1][2];
#pragma GCC unroll 3
    for (int b = 0; b <= kW; ++b) {
      vec<T> points[kH + 1];
#pragma GCC unroll 3
      for (int a = 0; a <= kH; ++a) points[a] = load(m + (a * (kW + 1) + b) * m_step + c);
      outputs_of_points<kH, T>(points, t[b]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      vec<T> points[kW + 1], pair[2];
#pragma GCC unroll 3
      for (int b = 0; b <= kW; ++b) points[b] = t[b][i];
      outputs_of_points<kW, T>(points, pair);
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        if constexpr (kFinish) {
          const vec<T> z = pair[j] * load(out.alpha + first + c) + load(out.beta + first + c);
          pair[j] = z < out.floor ? broadcast(out.floor) : z;
        }
        store(y + i * out.row_step + j * out.pixel_step + c, pair[j]);
      }
    }
  }
}

inline TileTasks phase_tasks(const Pass& pass, const Window& window) { return tile_tasks(pass, window, pass.h.scatter ? 4 : 2, 64); }

// As direct_pass; `packed` are the weights of direct_pass, u those of pack_phases.
template <class T, class Source, class Sink>
inline void phases_pass(const Pass& pass, const TileTasks& plan, const T* packed, const T* u, const Source& source, const Sink& sink) {
  constexpr int64_t kColumns = ConvTile<T>::kColumns, W = kLanes<T>, kDepth = 144;
  const Bands& bands = plan.bands;
  const bool scatter = pass.h.scatter;
  const int64_t side = scatter ? 4 : 2, source_side = scatter ? 2 : 4;  // of a tile
  const int64_t padded = padded_channels<T>(pass.out_channels), C = pass.channels, block_stride = round_up(C, W);
  // The channels are transformed and summed up in parts.
  const int64_t parts = (C + kDepth - 1) / kDepth, part = round_up((C + parts - 1) / parts, W);
  // One vector more than the channels, so that rows of tiles do not fall onto the same sets of the first-level cache.
  const int64_t stride = part + W;
  const int64_t across = (bands.full_columns() + side - 1) / side, down = (bands.full_rows() + side - 1) / side;
  const int64_t columns = across * source_side + 2, rows = down * source_side + 2, block_size = rows * columns * block_stride;
  const int64_t y_columns = across * side, y_row = y_columns * padded, y_size = down * side * y_row + W;
  const int64_t most = plan.images * across * down, v_step = most * stride + W, m_step = most * kColumns + W;
  const int64_t m_panels = scatter && parts == 1 ? 1 : (padded + kColumns - 1) / kColumns, m_size = 9 * m_step;
  const auto taps = pass.taps(columns, block_stride);
  const int64_t per_image = bands.count(), whole = pass.batch * per_image;
  // Where whole tiles and vectors of channels fill the output, they may be stored there.
  const bool filled = padded == pass.out_channels && bands.full_height % side == 0 && bands.full_width % side == 0;
  const bool direct = filled && bands.window.kind == Pooling::none && sink.direct(0, 0, bands.full(0)).data;
  torch::stable::parallel_for(0, plan.tasks, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> blocks(plan.images * block_size), v(9 * v_step), m(m_panels * m_size), y(plan.images * y_size);
    std::vector<const T*> from(most);  // where tiles begin
    std::vector<T*> to(most);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first_unit = whole * task / plan.tasks, units = whole * (task + 1) / plan.tasks - first_unit;
      int64_t tiles = 0;
      DirectOutput<T> out{nullptr, y_row, padded};
      std::vector<bool> finite(units);
      for (int64_t unit = 0; unit < units; ++unit) {
        const int64_t n = (first_unit + unit) / per_image;
        const Band band = bands.full((first_unit + unit) % per_image);
        T *block = blocks.get() + unit * block_size, *corner = y.get() + unit * y_size;
        source.load(block, block_stride, columns, n, 0, C, pass.h.lowest(band.top), rows, pass.w.lowest(band.left), columns);
        finite[unit] = all_finite(block, block_size);
        if (!finite[unit]) {
          direct_band<T>(pass, band, taps, packed, block, columns * block_stride, block_stride, corner, y_columns);
          continue;
        }
        if (direct) out = sink.direct(n, 0, band), corner = out.data;
        for (int64_t r = 0; r * side < band.rows(); ++r)
          for (int64_t p = 0; p * side < band.columns(); ++p, ++tiles) {
            from[tiles] = block + (r * columns + p) * source_side * block_stride;
            to[tiles] = corner + (r * out.row_step + p * out.pixel_step) * side;
          }
      }
      DirectOutput<T> step = out;
      if (scatter) step.row_step *= 2, step.pixel_step *= 2;
      const T* weights = u;
      for (int64_t i = 0; tiles > 0 && i < 4; ++i) {
        const Phase h = phase_of_axis(pass.h, i / 2), w = phase_of_axis(pass.w, i % 2);
        const int64_t points = h.points() * w.points(), first_pixel = (h.source * columns + w.source) * block_stride;
        const auto finish = [&](const T* sums, int64_t first, int64_t width) {
          const int64_t first_output = h.output * out.row_step + w.output * out.pixel_step + first;
          const auto outputs = [&](auto taps_h, auto taps_w) {
            constexpr int kH = taps_h.value, kW = taps_w.value;
            for (int64_t t = 0; t < tiles; ++t) {
              if (out.alpha)
                phase_outputs<kH, kW, true, T>(sums + t * kColumns, m_step, width, to[t] + first_output, step, first);
              else
                phase_outputs<kH, kW, false, T>(sums + t * kColumns, m_step, width, to[t] + first_output, step, first);
            }
          };
          if (scatter)
            with_taps(h, w, outputs);
          else
            outputs(std::integral_constant<int, 2>{}, std::integral_constant<int, 2>{});
        };
        for (int64_t c = 0; c < C; c += part) {
          const int64_t depth = std::min(part, C - c), chains = (depth + kSumLength - 1) / kSumLength, chain = (depth + chains - 1) / chains;
          const bool add = c > 0 || (!scatter && i > 0), last = c + part >= C && (scatter || i == 3);
          with_taps(h, w, [&](auto taps_h, auto taps_w) {
            for (int64_t t = 0; t < tiles; ++t)
              phase_sources<taps_h.value, taps_w.value, T>(from[t] + first_pixel + c, h.step * columns * block_stride,
                                                           w.step * block_stride, round_up(depth, W), v.get() + t * stride, v_step);
          });
          for (int64_t first = 0; first < padded; first += kColumns) {
            const int64_t width = std::min(kColumns, padded - first);
            T* sums = m.get() + (m_panels > 1 ? first / kColumns * m_size : 0);
            for (int64_t point = 0; point < points; ++point) {
              const T* panel = weights + first * points * C + (point * C + c) * width;
              // Of a gather every phase adds to the points of the first, which has as many as any.
              T* of_point = sums + (scatter ? point : point / w.points() * 3 + point % w.points()) * m_step;
              const PointSteps steps{0, C * width, 0};
              if (width == kColumns)
                point_products<2, T>(1, tiles, v.get() + point * v_step, stride, depth, chain, panel, of_point, steps, add, true);
              else
                point_products<1, T>(1, tiles, v.get() + point * v_step, stride, depth, chain, panel, of_point, steps, add, true);
            }
            if (last) finish(sums, first, width);
          }
        }
        weights += points * C * padded;
      }
      for (int64_t unit = 0; unit < units; ++unit)
        if (!direct || !finite[unit])
          sink((first_unit + unit) / per_image, 0, (first_unit + unit) % per_image, y.get() + unit * y_size, y_columns, padded);
    }
  });
}
