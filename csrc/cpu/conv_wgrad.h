// Gradients of the weights, and sums over the pixels. Included by for_each_isa.h inside the namespace of each instruction set.
//
//   dw[k = (kh, kw, wide channel), narrow channel] = sum over images and narrow pixels p of  wide[p * stride + tap k] narrow[p]
//
// A product with the pixels as its depth: kRows values of k x two vectors of narrow channels stay in registers over a whole
// band. The batch is cut into a number of chunks that does not depend on the threads; each has partial sums of its own,
// which are added in order at the end. Floor: as many operations as the direct forward pass, at the multiply-add peak. 32 -> 64
// channels on 14 x 14, per image on one Zen 5 core: floor 112,900 cycles, measured 169,000, with the way back through the pool.

template <class T>
inline constexpr int kGradientRows = ISA_VECTOR_BYTES == 64 ? 9 : 5;  // row pointers and the loop fit the general registers

// acc[r] += a[offset[r] + p * a_step] * b[p] for `depth` pixels p.
template <int kRows, int kVectors, class T>
INLINE void multiply_pixels(vec<T> (&acc)[kRows][kVectors], const T* a, const int64_t* offset, int64_t a_step, const T* b, int64_t b_step,
                            int64_t depth) {
  constexpr int W = kLanes<T>;
  const T* row[kRows];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) row[r] = a + offset[r];
  for (int64_t p = 0, i = 0; p < depth; ++p, i += a_step) {
    vec<T> bp[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) bp[v] = load(b + p * b_step + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const vec<T> ar = broadcast<T>(row[r][i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] += ar * bp[v];
    }
  }
}

// One tile of dw over the rows of a band: wide block rows are `a_row` elements apart, narrow ones `b_row`.
struct GradientBand {
  int64_t rows, columns;
  int64_t a_row, a_step, b_row, b_step;
};
template <int kRows, int kVectors, class T>
INLINE void gradient_chain(const T* a, const int64_t* offset, const T* b, const GradientBand& band, T* dw, int64_t dw_step) {
  constexpr int W = kLanes<T>;
  vec<T> acc[kRows][kVectors] = {};
  for (int64_t r = 0; r < band.rows; ++r)
    multiply_pixels<kRows, kVectors, T>(acc, a + r * band.a_row, offset, band.a_step, b + r * band.b_row, band.b_step, band.columns);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      T* out = dw + r * dw_step + v * W;
      store(out, load(out) + acc[r][v]);
    }
}
template <int kRows, int kVectors, class T>
inline void gradient_tile(const T* a, const int64_t* offset, const T* b, const GradientBand& band, T* dw, int64_t dw_step) {
  if constexpr (kFused) {
    gradient_chain<kRows, kVectors, T>(a, offset, b, band, dw, dw_step);
  } else {
    GradientBand part = band;
    part.rows = 1;
    for (int64_t r = 0; r < band.rows; ++r)
      for (int64_t p = 0; p < band.columns; p += kUnfusedChain) {
        part.columns = std::min(kUnfusedChain, band.columns - p);
        gradient_chain<kRows, kVectors, T>(a + r * band.a_row + p * band.a_step, offset, b + r * band.b_row + p * band.b_step, part, dw, dw_step);
      }
  }
}
template <int kVectors, class T, int kRows = kGradientRows<T>>
INLINE void gradient_rows(int64_t rows, const T* a, const int64_t* offset, const T* b, const GradientBand& band, T* dw, int64_t dw_step) {
  if constexpr (kRows > 0) {
    if (rows == kRows)
      gradient_tile<kRows, kVectors, T>(a, offset, b, band, dw, dw_step);
    else
      gradient_rows<kVectors, T, kRows - 1>(rows, a, offset, b, band, dw, dw_step);
  }
}

// How the units of work (bands of images) fall into chunks.
struct Chunks {
  int64_t units, count;
  Chunks(int64_t units, int64_t partial_bytes, int64_t most = 16) : units(units) {
    constexpr int64_t kBytes = 64 << 20;
    count = std::max<int64_t>(1, std::min({most, units, kBytes / std::max<int64_t>(1, partial_bytes)}));
  }
  int64_t begin(int64_t chunk) const { return units * chunk / count; }
};

// total[i] = sum of partial[chunk][i] in the order of the chunks.
template <class T>
inline void add_partials(T* total, const T* partial, int64_t chunks, int64_t size) {
  constexpr int W = kLanes<T>;
  torch::stable::parallel_for(0, (size + W - 1) / W, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * W; i < std::min(end * W, size); i += W) {
      const int64_t lanes = std::min<int64_t>(W, size - i);
      vec<T> sum = read_lanes<T>(partial + i, lanes);
      for (int64_t chunk = 1; chunk < chunks; ++chunk) sum += read_lanes<T>(partial + chunk * size + i, lanes);
      write_lanes<T>(total + i, sum, lanes);
    }
  });
}

// sum += term, with what the addition rounds off carried to the next in `lost` (Kahan); of an infinity nothing is left over.
template <class T>
INLINE void add_carried(T* sum, T* lost, vec<T> term) {
  const vec<T> before = load(sum), all = term - load(lost), next = before + all, rest = (next - before) - all;
  store(lost, rest == rest ? rest : vec<T>{});
  store(sum, next);
}

// sums[c] += one value of each of `count` pixels, and what that rounds off is carried in lost[c]: a plain sum over an image loses two
// digits against PyTorch's pairwise one, a sum of few values first does not.
template <class T>
inline void add_compensated(T* sums, T* lost, const T* const* pixels, int64_t count, int64_t channels) {
  constexpr int64_t W = kLanes<T>;
  for (int64_t c = 0; c < channels; c += W) {
    const int64_t lanes = channels - c;
    vec<T> few = read_lanes<T>(pixels[0] + c, lanes);
    for (int64_t p = 1; p < count; ++p) few += read_lanes<T>(pixels[p] + c, lanes);
    add_carried<T>(sums + c, lost + c, few);
  }
}
// The same for a block of whole vectors of channels.
template <class T>
inline void add_pixels(T* sums, T* lost, const T* block, const Band& band, int64_t block_columns, int64_t channels, int64_t stride) {
  constexpr int64_t kFew = 8;
  const T* pixels[kFew];
  for (int64_t r = 0; r < band.rows(); ++r)
    for (int64_t p = 0; p < band.columns(); p += kFew) {
      const int64_t count = std::min(kFew, band.columns() - p);
      for (int64_t i = 0; i < count; ++i) pixels[i] = block + (r * block_columns + p + i) * stride;
      add_compensated(sums, lost, pixels, count, channels);
    }
}

// dw [group][taps * wide channels][padded narrow channels] and, unless null, the sums of the narrow side [group][padded].
template <class T, class WideSource, class NarrowSource>
inline void weight_gradient(const Conv& conv, const WideSource& wide, const NarrowSource& narrow, T* dw, T* sums) {
  constexpr int64_t kColumns = 2 * kLanes<T>, W = kLanes<T>;
  const Pass pass = gather_pass(conv);
  const int64_t C = pass.channels, padded = padded_channels<T>(pass.out_channels), depth = pass.depth();
  const Bands bands =
      make_bands(conv.h.narrow, conv.w.narrow, Window{}, conv.batch, (C * conv.h.stride * conv.w.stride + padded) * sizeof(T), 192 << 10);
  const int64_t rows = pass.h.span(bands.rows), columns = pass.w.span(bands.columns);
  std::vector<int64_t> offsets;
  for (int64_t kh = 0; kh < conv.h.taps; ++kh)
    for (int64_t kw = 0; kw < conv.w.taps; ++kw)
      for (int64_t c = 0; c < C; ++c) offsets.push_back((kh * conv.h.dilation * columns + kw * conv.w.dilation) * C + c);
  const int64_t size = depth * padded;
  const Chunks chunks(conv.batch * bands.count(), conv.groups * (size + padded) * sizeof(T));
  Scratch<T> partial(chunks.count * conv.groups * size), partial_sums(chunks.count * conv.groups * padded);
  torch::stable::parallel_for(0, chunks.count * conv.groups, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> a(rows * columns * C), b(bands.rows * bands.columns * padded), lost(padded);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / conv.groups, g = task % conv.groups;
      T *part = partial.get() + task * size, *part_sums = partial_sums.get() + task * padded;
      std::memset(part, 0, size * sizeof(T));
      std::memset(part_sums, 0, padded * sizeof(T));
      std::memset(lost.get(), 0, padded * sizeof(T));
      for (int64_t unit = chunks.begin(chunk); unit < chunks.begin(chunk + 1); ++unit) {
        const int64_t n = unit / bands.count();
        const Band band = bands.full(unit % bands.count());
        narrow.load(b.get(), padded, bands.columns, n, g * pass.out_channels, pass.out_channels, band.top, band.rows(), band.left,
                    band.columns());
        wide.load(a.get(), C, columns, n, g * C, C, pass.h.lowest(band.top), pass.h.span(band.rows()), pass.w.lowest(band.left),
                  pass.w.span(band.columns()));
        const GradientBand shape{band.rows(),       band.columns(),         conv.h.stride * columns * C,
                                 conv.w.stride * C, bands.columns * padded, padded};
        for (int64_t first = 0; first < padded; first += kColumns) {
          const int64_t tiles = (depth + kGradientRows<T> - 1) / kGradientRows<T>;
          for (int64_t t = 0, k = 0; t < tiles; ++t) {
            const int64_t count = (depth - k + tiles - t - 1) / (tiles - t);
            if (padded - first >= kColumns)
              gradient_rows<2, T>(count, a.get(), offsets.data() + k, b.get() + first, shape, part + k * padded + first, padded);
            else
              gradient_rows<1, T>(count, a.get(), offsets.data() + k, b.get() + first, shape, part + k * padded + first, padded);
            k += count;
          }
        }
        if (sums) add_pixels<T>(part_sums, lost, b.get(), band, bands.columns, padded, padded);
      }
    }
  });
  add_partials(dw, partial.get(), chunks.count, conv.groups * size);
  if (sums) add_partials(sums, partial_sums.get(), chunks.count, conv.groups * padded);
  static_assert(kColumns % W == 0);
}

// sums[c] of a source of `channels` channels and height x width pixels.
template <class T, class Source>
inline void channel_sums(const Source& source, int64_t batch, int64_t channels, int64_t height, int64_t width, T* sums) {
  const int64_t padded = padded_channels<T>(channels);
  const Bands bands = make_bands(height, width, Window{}, batch, padded * sizeof(T), 192 << 10);
  const Chunks chunks(batch * bands.count(), padded * sizeof(T));
  Scratch<T> partial(chunks.count * padded);
  torch::stable::parallel_for(0, chunks.count, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> block(bands.rows * bands.columns * padded), lost(padded);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      T* part = partial.get() + chunk * padded;
      std::memset(part, 0, padded * sizeof(T));
      std::memset(lost.get(), 0, padded * sizeof(T));
      for (int64_t unit = chunks.begin(chunk); unit < chunks.begin(chunk + 1); ++unit) {
        const Band band = bands.full(unit % bands.count());
        source.load(block.get(), padded, bands.columns, unit / bands.count(), 0, channels, band.top, band.rows(), band.left,
                    band.columns());
        add_pixels<T>(part, lost, block.get(), band, bands.columns, padded, padded);
      }
    }
  });
  add_partials(sums, partial.get(), chunks.count, padded);
}
