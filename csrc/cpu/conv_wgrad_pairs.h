// Gradients of the weights by the CPU's dot products of bfloat16 numbers, float32 sums. Included by for_each_isa.h inside the
// namespace of each instruction set.
//
// As conv_wgrad.h, with the pixels in pairs: two rows r and r + 1 of the narrow side, and the two wide rows that a tap joins them
// with, r stride + tap and one stride further, lie interleaved. Of the wide side there is a copy for every remainder of the
// taps' rows modulo 2 strides (two copies of 3x3, one of 1x1); along a row the taps only begin elsewhere. An image of one row, a
// sequence, is turned by 90 degrees. A last row without a second one is multiplied by itself: beside a wide row that holds a NaN, zeros
// would not do.
//
// A register tile is up to 12 wide channels of one tap x 2 vectors of narrow channels, over a band. A task owns a chunk of the bands
// and up to kPart narrow channels. What reaches the products is rounded to bfloat16 once, which changes nothing but a gradient taken back
// through an activation. Floor: as many operations as the direct forward pass, at the dot products' peak.
#if ISA_VECTOR_BYTES == 64

// Fewer channels of the wide side do not fill a tile.
inline constexpr int64_t kPairedChannels = 8;

inline bool paired_gradient_applies(const Conv& conv) {
  return selected_isa() == Isa::avx512_bf16 && conv.wide_channels / conv.groups >= kPairedChannels &&
         conv.batch * conv.h.narrow * conv.w.narrow > 0;
}

// An image of one row as one of one column.
template <class Source>
struct TurnedSource {
  const Source& of;
  void load(float* block, int64_t stride, int64_t, int64_t n, int64_t c0, int64_t channels, int64_t row, int64_t rows, int64_t,
            int64_t) const {
    of.load(block, stride, rows, n, c0, channels, 0, 1, row, rows);
  }
};

// Pairs of rows: `outer` runs of `inner` pairs, and `last` single pixels after them, whose pairs are not whole.
struct PairedBand {
  int64_t outer, inner, last;
  int64_t a_row, a_step, b_row, b_step, a_last, b_last;
};

template <int R, int NV>
__attribute__((target("avx512bf16"))) void paired_gradient_tile(const bfloat16* a, const bfloat16* b, const PairedBand& band, float* dw,
                                                                int64_t dw_step, bool add) {
  vec<float> acc[R][NV] = {};
  for (int64_t r = 0; r < band.outer; ++r)
    multiply_pairs<R, NV>(acc, a + r * band.a_row, 2, band.a_step, b + r * band.b_row, band.inner, band.b_step);
  a += band.a_last, b += band.b_last;
  for (int64_t p = 0; p < band.last; ++p, a += band.a_step, b += band.b_step) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m512i first = _mm512_set1_epi32(a[2 * r].bits);  // beside it a 0, so that the second row does not count
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v)
        acc[r][v] = reinterpret_cast<vec<float>>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(acc[r][v]), reinterpret_cast<__m512bh>(first),
                                                                  reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + v * 32))));
    }
  }
  store_tile<R, NV, float>(acc, dw, dw_step, NV * kLanes<float>, add);
}

// Two rows of `count` numbers interleaved; without the second one it counts as 0. Reads and writes whole vectors.
__attribute__((target("avx512bf16"))) inline void interleave_rows(bfloat16* out, const float* first, const float* second, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<float>)
    _mm512_storeu_si512(out + 2 * i, interleaved(load(first + i), second ? load(second + i) : vec<float>{}));
}

// As weight_gradient. `whole`: the narrow side can only be loaded with all its channels.
template <class WideSource, class NarrowSource>
inline void paired_weight_gradient(const Conv& conv, bool whole, const WideSource& wide, const NarrowSource& narrow, float* dw,
                                   float* sums) {
  using T = float;
  constexpr int64_t W = kLanes<T>, kRows = 12, kVectors = 2, kPart = 128, kTasks = 16, kBudget = 256 << 10;
  const Pass pass = gather_pass(conv);
  const int64_t C = pass.channels, O = pass.out_channels, padded = padded_channels<T>(O), depth = pass.depth();
  const int64_t narrow_parts = whole ? 1 : (padded + kPart - 1) / kPart;
  const int64_t narrow_part = round_up((padded + narrow_parts - 1) / narrow_parts, kVectors * W), parts = conv.groups * narrow_parts;
  const int64_t stride = conv.h.stride;
  const Bands bands = make_bands(conv.h.narrow, conv.w.narrow, Window{}, conv.batch,
                                 (C * stride * conv.w.stride + std::min(padded, narrow_part)) * sizeof(T), kBudget, 2);
  const int64_t columns = pass.w.span(bands.columns), rows = pass.h.span(bands.rows), units = conv.batch * bands.count();

  // Tap kh reads copy copy_of[kh], from its pair of rows kh * dilation / (2 stride) on.
  std::vector<int64_t> remainders, copy_of;
  for (int64_t kh = 0; kh < conv.h.taps; ++kh) {
    const int64_t remainder = kh * conv.h.dilation % (2 * stride);
    const auto known = std::find(remainders.begin(), remainders.end(), remainder);
    copy_of.push_back(known - remainders.begin());
    if (known == remainders.end()) remainders.push_back(remainder);
  }
  const int64_t reach = (conv.h.taps - 1) * conv.h.dilation / (2 * stride), a_row = 2 * columns * C;
  const int64_t copy_pairs = (bands.rows + 1) / 2 + reach, copy_size = copy_pairs * a_row;

  const Chunks chunks(units, conv.groups * depth * padded * sizeof(T), (kTasks + parts - 1) / parts);
  const int64_t dw_size = conv.groups * depth * padded, sums_size = conv.groups * padded;
  const bool partial = chunks.count > 1;
  Scratch<T> partial_dw(partial ? chunks.count * dw_size : 0), partial_sums(partial ? chunks.count * sums_size : 0);
  torch::stable::parallel_for(0, chunks.count * parts, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> block(rows * columns * C + W), pixels(bands.rows * bands.columns * narrow_part + W), lost(narrow_part);
    Scratch<bfloat16> a(remainders.size() * copy_size + 2 * W), b((bands.rows + 1) * bands.columns * narrow_part + 2 * W);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / parts, part = task % parts, g = part / narrow_parts, o0 = part % narrow_parts * narrow_part;
      const int64_t count = std::min(narrow_part, O - o0), width = round_up(count, W);
      T* out = (partial ? partial_dw.get() + chunk * dw_size : dw) + g * depth * padded + o0;
      T* out_sums = sums ? (partial ? partial_sums.get() + chunk * sums_size : sums) + g * padded + o0 : nullptr;
      if (out_sums) std::fill_n(out_sums, width, T(0)), std::fill_n(lost.get(), width, T(0));
      for (int64_t unit = chunks.begin(chunk); unit < chunks.begin(chunk + 1); ++unit) {
        const int64_t n = unit / bands.count();
        const Band band = bands.full(unit % bands.count());
        const int64_t used = pass.h.span(band.rows()), used_columns = pass.w.span(band.columns()), b_row = 2 * band.columns() * width;
        wide.load(block.get(), C, columns, n, g * C, C, pass.h.lowest(band.top), used, pass.w.lowest(band.left), used_columns);
        narrow.load(pixels.get(), width, band.columns(), n, g * O + o0, count, band.top, band.rows(), band.left, band.columns());
        if (out_sums) add_pixels<T>(out_sums, lost, pixels, band, band.columns(), width, width);
        const auto row_of = [&](int64_t row) -> const T* { return row < used ? block + row * columns * C : nullptr; };
        for (size_t copy = 0; copy < remainders.size(); ++copy)
          for (int64_t pair = 0, row = remainders[copy]; pair < copy_pairs && row < used; ++pair, row += 2 * stride)
            interleave_rows(a + copy * copy_size + pair * a_row, row_of(row), row_of(row + stride), used_columns * C);
        for (int64_t r = 0; r < band.rows(); r += 2) {
          const T* first = pixels + r * band.columns() * width;
          const T* second = r + 1 < band.rows() ? first + band.columns() * width : nullptr;
          interleave_rows(b + r / 2 * b_row, first, second, band.columns() * width);
        }
        const int64_t pairs = band.rows() / 2, a_step = 2 * conv.w.stride * C, last = band.rows() % 2 * band.columns();
        PairedBand shape{pairs, band.columns(), last, a_row, a_step, b_row, 2 * width, pairs * a_row, pairs * b_row};
        if (band.columns() == 1) shape.outer = 1, shape.inner = pairs, shape.a_step = a_row, shape.b_step = b_row;
        const bool add = unit > chunks.begin(chunk);
        for (int64_t o = 0; o < width; o += kVectors * W)
          with_constant<kVectors>(std::min(kVectors, (width - o) / W), [&](auto vectors) {
            for (int64_t kh = 0, k = 0; kh < conv.h.taps; ++kh)
              for (int64_t kw = 0; kw < conv.w.taps; ++kw) {
                const bfloat16* of_tap =
                    a + copy_of[kh] * copy_size + kh * conv.h.dilation / (2 * stride) * a_row + 2 * kw * conv.w.dilation * C;
                const int64_t tiles = (C + kRows - 1) / kRows;
                for (int64_t t = 0, c = 0; t < tiles; ++t) {
                  const int64_t some = (C - c + tiles - t - 1) / (tiles - t);
                  with_constant<kRows>(some, [&](auto channels) {
                    T* sums_of_tile = out + (k + c) * padded + o;
                    paired_gradient_tile<channels.value, vectors.value>(of_tap + 2 * c, b + 2 * o, shape, sums_of_tile, padded, add);
                  });
                  c += some;
                }
                k += C;
              }
          });
      }
    }
  });
  if (partial) add_partials(dw, partial_dw.get(), chunks.count, dw_size);
  if (partial && sums) add_partials(sums, partial_sums.get(), chunks.count, sums_size);
}

template <class WideSource, class NarrowSource>
inline void paired_weight_gradient_of(const Conv& conv, bool whole, const WideSource& wide, const NarrowSource& narrow, float* dw,
                                      float* sums) {
  if (conv.h.wide == 1 && conv.h.narrow == 1 && conv.h.taps == 1 && conv.h.pad == 0) {
    Conv turned = conv;
    std::swap(turned.h, turned.w);
    paired_weight_gradient(turned, whole, TurnedSource<WideSource>{wide}, TurnedSource<NarrowSource>{narrow}, dw, sums);
  } else {
    paired_weight_gradient(conv, whole, wide, narrow, dw, sums);
  }
}
#endif
