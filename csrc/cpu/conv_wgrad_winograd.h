// Gradients of the weights by Winograd's minimal filtering: 3x3 of stride 1, and 3 or 4 taps an axis of stride 2. Included by
// for_each_isa.h inside the namespace of each instruction set.
//
// The transpose of what conv_winograd.h and conv_phases.h compute: where an output is y = A' [(G w) * (B' d)], its gradient dy gives
//
//   dw = G' [ sum over tiles of (A dy) * (B' d) ]
//
// with 16 products for 36 of 3x3, 36 for 64 of 4x4 and 25 for 36 of 3x3 with stride 2. Along an axis, a tile is two narrow pixels dy and
// the taps + 1 wide pixels d that they meet (of stride 2 in each of two phases, every second pixel and every second tap):
//
//   3 taps:  z = dy0, dy0 + dy1, dy0 - dy1, dy1    v = d0 - d2, d1 + d2, d2 - d1, d3 - d1    u = sum of z v
//            dw0 = u0 + (u1 + u2) / 2,  dw1 = (u1 - u2) / 2,  dw2 = (u1 + u2) / 2 + u3
//   2 taps:  the first three of z, v and u, the first two of dw
//   1 tap:   z = dy0, dy0 + dy1                    v = d0 - d1, d1                           dw0 = u0 + u1
//
// Beside the values stand 1, -1 and 1/2 only, so small integers give exact results. A NaN or an infinity would spread over its tile, and
// from there over all taps: the caller is told, and sums up directly.
//
// For each pair of a point (z, v) of the rows and one of the columns the sum over tiles is a matrix product [wide channels, tiles] x
// [tiles, narrow channels]. A task owns a chunk of the batch, up to kPart wide and kPart (stride 2: twice that) narrow channels and their
// sums u, which stay in the second-level cache: band by band it copies both sides into blocks and transforms them, and for every kTiles
// tiles multiplies, point after point, with both operands and the sums of a point in the first-level cache. At its end it takes its sums
// back to taps, so that the partial sums of the chunks are no larger than those of weight_gradient. Sums begin anew with every batch of
// tiles, hence an error below that of PyTorch's gradient.
//
// Floor: the products at the multiply-add peak. 32 -> 64 channels on 14 x 14, per image on one Zen 5 core: floor 50,200 cycles, predicted
// 65,000, measured 84,000 with the way back through the pool (169,000 by weight_gradient); the products take 61,000 of them.

// The product pays for the transforms from this many channels on either side.
inline constexpr int64_t kFilteredChannels = 16;

// What the two kinds have in common. taps: of a phase, at most.
struct FilteredGradient {
  int64_t taps, phases;  // along an axis
  int64_t points() const { return taps + 1; }
};
template <class T>
inline FilteredGradient filtered_gradient(const Conv& conv) {
  const Axis &h = conv.h, &w = conv.w;
  const bool wide = std::min(conv.wide_channels, conv.narrow_channels) / conv.groups >= kFilteredChannels;
  if (!std::is_same_v<T, float> || !wide || h.dilation != 1 || w.dilation != 1) return {0, 0};
  if (h.stride == 1 && w.stride == 1 && h.taps == 3 && w.taps == 3) return {3, 1};
  const auto halves = [](const Axis& a) { return a.stride == 2 && (a.taps == 3 || a.taps == 4); };
  return halves(h) && halves(w) ? FilteredGradient{2, 2} : FilteredGradient{0, 0};
}

template <int kTaps, class T>
INLINE void gradient_points(const vec<T> (&dy)[2], vec<T> (&z)[kTaps + 1]) {
  z[0] = dy[0], z[1] = dy[0] + dy[1], z[2] = dy[0] - dy[1];
  if constexpr (kTaps == 3) z[3] = dy[1];
}
template <int kTaps, class T>
INLINE void taps_of_points(const vec<T> (&u)[kTaps + 1], vec<T> (&dw)[kTaps]) {
  if constexpr (kTaps == 1) {
    dw[0] = u[0] + u[1];
  } else {
    const vec<T> half = (u[1] + u[2]) * T(0.5);
    dw[0] = u[0] + half, dw[1] = (u[1] - u[2]) * T(0.5);
    if constexpr (kTaps == 3) dw[2] = half + u[3];
  }
}

// The points of one tile of 2 x 2 narrow pixels, `channels` of them in whole vectors.
template <int kTaps, class T>
NOINLINE void tile_of_gradient(const T* y, int64_t row_step, int64_t pixel_step, int64_t channels, T* z, int64_t z_step) {
  constexpr int P = kTaps + 1;
  for (int64_t c = 0; c < channels; c += kLanes<T>) {
    vec<T> t[2][P];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const vec<T> column[2] = {load(y + j * pixel_step + c), load(y + row_step + j * pixel_step + c)};
      gradient_points<kTaps, T>(column, t[j]);
    }
#pragma GCC unroll 4
    for (int a = 0; a < P; ++a) {
      const vec<T> row[2] = {t[0][a], t[1][a]};
      vec<T> points[P];
      gradient_points<kTaps, T>(row, points);
#pragma GCC unroll 4
      for (int b = 0; b < P; ++b) store(z + (a * P + b) * z_step + c, points[b]);
    }
  }
}

// u[channels][kVectors vectors] (+)= v[tiles][channels]' z[tiles][kVectors vectors]; rows are `stride`, `z_stride` and `u_stride` apart.
template <int kVectors, class T>
NOINLINE void point_sums(int64_t tiles, const T* v, int64_t stride, int64_t channels, const T* z, int64_t z_stride, T* u, int64_t u_stride,
                         bool add) {
  each_tile<T>(channels, [&](int64_t c, auto rows) {
    const int64_t chain = kFused ? tiles : kUnfusedChain;
    vec<T> acc[rows.value][kVectors] = {};
    for (int64_t t = 0; t < tiles; t += chain) {
      multiply_chain<rows.value, kVectors, T>(acc, v + t * stride + c, 1, stride, z + t * z_stride, z_stride, std::min(chain, tiles - t));
      flush<rows.value, kVectors, T>(acc, u + c * u_stride, u_stride, add || t > 0);
    }
  });
}

// The sums of one phase, [point][channels][u_stride] with u_step between points, to its taps: dw[tap][channel], `tap_step` and
// `channel_step` apart, `width` narrow channels in whole vectors.
template <int kH, int kW, class T>
NOINLINE void taps_of_sums(const T* u, int64_t u_step, int64_t u_stride, int64_t channels, int64_t width, T* const (&dw)[kH][kW],
                           int64_t channel_step) {
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t o = 0; o < width; o += kLanes<T>) {
      vec<T> t[kW + 1][kH];
#pragma GCC unroll 4
      for (int b = 0; b <= kW; ++b) {
        vec<T> points[kH + 1];
#pragma GCC unroll 4
        for (int a = 0; a <= kH; ++a) points[a] = load(u + (a * (kW + 1) + b) * u_step + c * u_stride + o);
        taps_of_points<kH, T>(points, t[b]);
      }
#pragma GCC unroll 3
      for (int kh = 0; kh < kH; ++kh) {
        vec<T> points[kW + 1], taps[kW];
#pragma GCC unroll 4
        for (int b = 0; b <= kW; ++b) points[b] = t[b][kh];
        taps_of_points<kW, T>(points, taps);
#pragma GCC unroll 3
        for (int kw = 0; kw < kW; ++kw) store(dw[kh][kw] + c * channel_step + o, taps[kw]);
      }
    }
}

// f(taps of the rows, taps of the columns) of a phase as constants.
template <class F>
INLINE void with_phase_taps(int64_t h, int64_t w, F f) {
  using Three = std::integral_constant<int, 3>;
  if (h == 3)
    f(Three{}, Three{});
  else
    with_constant<2>(h, [&](auto taps_h) { with_constant<2>(w, [&](auto taps_w) { f(taps_h, taps_w); }); });
}

// As weight_gradient, for what filtered_gradient applies to. False: not computed, there is a value that is not finite, or no pixel.
template <class T, class WideSource, class NarrowSource>
inline bool filtered_weight_gradient(const Conv& conv, const FilteredGradient& kind, const WideSource& wide, const NarrowSource& narrow,
                                     T* dw, T* sums) {
  constexpr int64_t W = kLanes<T>, kColumns = ConvTile<T>::kColumns, kTiles = 96, kBandTiles = 64, kPart = 64, kTasks = 16;
  const Pass pass = gather_pass(conv);
  const int64_t C = pass.channels, O = pass.out_channels, padded = padded_channels<T>(O), depth = pass.depth(), stride = conv.h.stride;
  const auto part_of = [](int64_t channels, int64_t most) {
    const int64_t parts = (channels + most - 1) / most;
    return round_up((channels + parts - 1) / parts, W);
  };
  const int64_t wide_part = part_of(C, kPart), narrow_part = part_of(O, kPart * kind.phases);
  const int64_t wide_parts = (C + wide_part - 1) / wide_part, narrow_parts = (O + narrow_part - 1) / narrow_part;
  const int64_t parts = conv.groups * wide_parts * narrow_parts;

  const Bands bands = make_bands(conv.h.narrow, conv.w.narrow, Window{}, conv.batch, 1, 4 * kBandTiles, 2);
  const int64_t across = (bands.columns + 1) / 2, down = (bands.rows + 1) / 2, units = conv.batch * bands.count();
  if (units == 0) return false;
  const Chunks chunks(units, conv.groups * depth * padded * sizeof(T),
                      std::clamp<int64_t>(units * across * down / kTiles, 1, (kTasks + parts - 1) / parts));
  const int64_t columns = 2 * stride * across + 2, rows = 2 * stride * down + 2;  // of the wide side in a block
  // One vector more than the data, so that the points do not fall onto the same sets of the first-level cache.
  const int64_t v_step = kTiles * wide_part + W, z_step = kTiles * narrow_part + W, u_step = wide_part * narrow_part + W;
  const int64_t points = kind.points() * kind.points(), points_of_phases = (conv.h.taps + kind.phases) * (conv.w.taps + kind.phases);

  const int64_t dw_size = conv.groups * depth * padded, sums_size = conv.groups * padded;
  const bool partial = chunks.count > 1;
  Scratch<T> partial_dw(partial ? chunks.count * dw_size : 0), partial_sums(partial ? chunks.count * sums_size : 0);
  std::vector<char> finite(chunks.count * parts, true);
  torch::stable::parallel_for(0, chunks.count * parts, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> block(rows * columns * wide_part), pixels(4 * across * down * narrow_part), lost(narrow_part);
    Scratch<T> v(points_of_phases * v_step), z(points * z_step), u(points_of_phases * u_step);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / parts, part = task % parts, g = part / (wide_parts * narrow_parts);
      const int64_t c0 = part / narrow_parts % wide_parts * wide_part, wide_count = std::min(wide_part, C - c0);
      const int64_t o0 = part % narrow_parts * narrow_part, narrow_count = std::min(narrow_part, O - o0), width = round_up(narrow_count, W);
      const int64_t vectors = round_up(wide_count, W);
      T* out = (partial ? partial_dw.get() + chunk * dw_size : dw) + (g * depth + c0) * padded + o0;
      T* out_sums = !sums || c0 > 0 ? nullptr : (partial ? partial_sums.get() + chunk * sums_size : sums) + g * padded + o0;
      if (out_sums) std::fill_n(out_sums, width, T(0)), std::fill_n(lost.get(), width, T(0));

      // f(taps of the rows, of the columns, the first tap of each, the points before those of the phase) for every phase.
      const auto each_phase = [&](auto f) {
        int64_t first = 0;
        for (int64_t ph = 0; ph < kind.phases; ++ph)
          for (int64_t pw = 0; pw < kind.phases; ++pw) {
            const int64_t taps_h = (conv.h.taps - ph + stride - 1) / stride, taps_w = (conv.w.taps - pw + stride - 1) / stride;
            with_phase_taps(taps_h, taps_w, [&](auto h, auto w) { f(h, w, ph, pw, first); });
            first += (taps_h + 1) * (taps_w + 1);
          }
      };
      int64_t tiles = 0;
      bool add = false;
      const auto multiply = [&] {
        each_phase([&](auto taps_h, auto taps_w, int64_t, int64_t, int64_t first) {
          constexpr int kH = taps_h.value, kW = taps_w.value;
          for (int64_t i = 0; i < (kH + 1) * (kW + 1); ++i) {
            // Of fewer taps the points of the narrow side are the first of those of more.
            const T* of_point = z.get() + (i / (kW + 1) * kind.points() + i % (kW + 1)) * z_step;
            const T* wide_point = v.get() + (first + i) * v_step;
            T* sums_of_point = u.get() + (first + i) * u_step;
            for (int64_t o = 0; o < width; o += kColumns)
              if (width - o >= kColumns)
                point_sums<2, T>(tiles, wide_point, wide_part, wide_count, of_point + o, narrow_part, sums_of_point + o, narrow_part, add);
              else
                point_sums<1, T>(tiles, wide_point, wide_part, wide_count, of_point + o, narrow_part, sums_of_point + o, narrow_part, add);
          }
        });
        tiles = 0;
        add = true;
      };
      for (int64_t unit = chunks.begin(chunk); unit < chunks.begin(chunk + 1) && finite[task]; ++unit) {
        const int64_t n = unit / bands.count();
        const Band band = bands.full(unit % bands.count());
        const int64_t h = (band.rows() + 1) / 2, w = (band.columns() + 1) / 2;
        const int64_t used_rows = 2 * stride * h + 2, used_columns = 2 * stride * w + 2;
        wide.load(block.get(), wide_part, used_columns, n, g * C + c0, wide_count, pass.h.lowest(band.top), used_rows,
                  pass.w.lowest(band.left), used_columns);
        narrow.load(pixels.get(), narrow_part, 2 * w, n, g * O + o0, narrow_count, band.top, 2 * h, band.left, 2 * w);
        finite[task] = all_finite(block.get(), used_rows * used_columns * wide_part) && all_finite(pixels.get(), 4 * h * w * narrow_part);
        if (out_sums) add_pixels<T>(out_sums, lost, pixels, band, 2 * w, width, narrow_part);
        for (int64_t i = 0; i < h * w;) {
          const int64_t count = std::min(kTiles - tiles, h * w - i);
          for (int64_t t = 0; t < count; ++t) {
            const T* y = pixels + 2 * ((i + t) / w * 2 * w + (i + t) % w) * narrow_part;
            if (kind.taps == 3)
              tile_of_gradient<3, T>(y, 2 * w * narrow_part, narrow_part, width, z + (tiles + t) * narrow_part, z_step);
            else
              tile_of_gradient<2, T>(y, 2 * w * narrow_part, narrow_part, width, z + (tiles + t) * narrow_part, z_step);
          }
          each_phase([&](auto taps_h, auto taps_w, int64_t ph, int64_t pw, int64_t first) {
            for (int64_t t = 0; t < count; ++t)
              phase_sources<taps_h.value, taps_w.value, T>(
                  block + (2 * stride * ((i + t) / w * used_columns + (i + t) % w) + ph * used_columns + pw) * wide_part,
                  stride * used_columns * wide_part, stride * wide_part, vectors, v + first * v_step + (tiles + t) * wide_part, v_step);
          });
          tiles += count, i += count;
          if (tiles == kTiles) multiply();
        }
      }
      if (!finite[task]) continue;
      if (tiles > 0) multiply();
      each_phase([&](auto taps_h, auto taps_w, int64_t ph, int64_t pw, int64_t first) {
        T* taps[taps_h.value][taps_w.value];
        for (int64_t kh = 0; kh < taps_h.value; ++kh)
          for (int64_t kw = 0; kw < taps_w.value; ++kw)
            taps[kh][kw] = out + ((ph + kh * stride) * conv.w.taps + pw + kw * stride) * C * padded;
        taps_of_sums<taps_h.value, taps_w.value, T>(u + first * u_step, u_step, narrow_part, wide_count, width, taps, padded);
      });
    }
  });
  for (const char f : finite)
    if (!f) return false;
  if (partial) add_partials(dw, partial_dw.get(), chunks.count, dw_size);
  if (partial && sums) add_partials(sums, partial_sums.get(), chunks.count, sums_size);
  return true;
}
