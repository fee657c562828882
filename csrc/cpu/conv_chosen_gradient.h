// Gradients of a 3x3 convolution of stride 1 under a 2x2 max-pool. Included by for_each_isa.h inside the namespace of each instruction set.
//
// Only the chosen element of each window has a gradient, so a sum over windows has a quarter of the products of one over pixels, where
// Winograd's filtering leaves 0.34 to 0.44:
//
//   dw[o, tap, c]            = sum over windows p of  g[p, o] x[chosen(p, o) + tap, c]
//   dx[chosen(p, o) + tap, c] += g[p, o] w[o, tap, c]    for every window p and channel o
//
// Lanes are input channels, one vector of them at a time. For dw a task owns a chunk of the batch; where the chosen element begins in a
// padded block of the input is looked up once for a window and output channel, and its 9 taps are multiply-adds with a memory operand,
// whose sums over the windows of a band stay in registers. For dx a task owns an image: the output channels of each window are sorted into
// four lists by the element they chose, so that the 4 x 4 pixels a window reaches are sums in registers too, without a branch for each.
//
// Refused, by returning false: inputs (of dw) and weights (of dx) that are not finite, which the gradient's zeros meet in a sum over all
// pixels. dx has a kernel of 512-bit vectors alone: 16 sums take all registers of a narrower set.
// Floor: the multiply-adds, of which each loads a vector. 32 -> 64 channels on 14 x 14, per image on one Zen 4 core: 56,400 cycles each.

// What the gradients by windows have in common, those of conv_planar_gradient.h too.
template <class T>
inline bool is_3x3_under_halves(const ConvBackward& call) {
  const auto plain = [](const Axis& a) { return a.taps == 3 && a.stride == 1 && a.dilation == 1; };
  const Conv& conv = call.conv;
  return std::is_same_v<T, float> && !call.transposed && conv.groups == 1 && plain(conv.h) && plain(conv.w) && call.window.is_halves() &&
         call.index.c == 1;
}
template <class T>
inline bool chosen_gradient_applies(const ConvBackward& call) {
  constexpr int64_t kFewTasks = 4;
  const Conv& conv = call.conv;
  return is_3x3_under_halves<T>(call) && call.activation != Activation::tanh_sigmoid &&
         4 * conv.wide_channels >= 3 * round_up(conv.wide_channels, kLanes<T>) && conv.batch >= kFewTasks && call.grad.height > 0 &&
         call.grad.width > 0;
}

// to[tap][W] += sum over windows p of g[p] x[offset[p] + tap].
template <class T>
NOINLINE void chosen_sums(T* to, const T* x, int64_t row_step, const int32_t* offset, const T* g, int64_t windows) {
  constexpr int W = kLanes<T>, kTaps = 9;
  vec<T> acc[kTaps] = {};
  for (int64_t p = 0; p < windows; ++p) {
    const T* at = x + offset[p];
    const vec<T> gp = broadcast(g[p]);
#pragma GCC unroll 9
    for (int t = 0; t < kTaps; ++t) acc[t] += gp * load(at + t / 3 * row_step + t % 3 * W);
  }
#pragma GCC unroll 9
  for (int t = 0; t < kTaps; ++t) store(to + t * W, load(to + t * W) + acc[t]);
}

// For each output channel of a band of windows, one window after another: the gradient, 0 where it has none, and where in the block the
// chosen element begins.
template <class T, class Gradient>
struct ChosenElements {
  static_assert(std::is_same_v<T, float>);
  static constexpr int64_t W = kLanes<T>, kBytes = 16;  // of the index that are transposed together
  const Gradient& gradient;
  int64_t channels, most;  // most: windows of a band, and room for a vector past them
  int64_t block_columns;
  Scratch<T> g, pixels, corners;
  Scratch<int32_t> offsets;
  Scratch<uint8_t> chosen;

  ChosenElements(const Gradient& gradient, int64_t channels, int64_t windows, int64_t block_columns)
      : gradient(gradient),
        channels(channels),
        most(round_up(windows, kBytes) + kBytes),
        block_columns(block_columns),
        g(round_up(channels, W) * most),
        pixels(is_read_in_place() ? 0 : most * round_up(channels, W)),
        corners(most),
        offsets(round_up(channels, kBytes) * most),
        chosen(round_up(channels, kBytes) * most) {}

  void load(int64_t n, const Band& band) {
    const int64_t rows = band.rows(), columns = band.columns(), windows = rows * columns;
    load_gradient(n, band);
    // Windows that follow each other in memory are one row.
    const auto& index = gradient.index;
    const bool one_row = columns == index.width && index.h == columns * index.w;
    const int64_t runs = one_row ? 1 : rows, length = one_row ? windows : columns;
    for (int64_t c = 0; c < channels; c += kBytes)
      for (int64_t r = 0; r < runs; ++r)
        for (int64_t p = 0; p < length; p += kBytes)
          transpose_bytes<false, true>(chosen + c * most + r * length + p, most,
                                       index.data + n * index.n + c + (band.top + r) * index.h + (band.left + p) * index.w, index.w,
                                       std::min(kBytes, length - p), std::min(kBytes, channels - c));
    for (int64_t p = 0; p < round_up(windows, W); ++p) corners[p] = static_cast<T>(2 * (p / columns * block_columns + p % columns));
  }

  // Offsets of channel o, whose gradient is cleared where it has none; returns the sum of the gradient, a lane for each of W windows.
  vec<T> look_up(int64_t o, int64_t windows) {
    typedef int32_t lanes __attribute__((vector_size(ISA_VECTOR_BYTES)));
    vec<T> sum = {};
    for (int64_t p = 0; p < windows; p += W) {
      const vec<T> k = read_lanes<T>(chosen + o * most + p, W);
      const vec<T> row = k >= T(2) ? broadcast(static_cast<T>(block_columns - 2)) : vec<T>{};
      const auto on = k < T(4);
      const vec<T> pixel = (on ? row + k : vec<T>{}) + read_lanes<T>(corners + p, W);
      const lanes offset = __builtin_convertvector(pixel, lanes) * static_cast<int32_t>(W);
      std::memcpy(offsets + o * most + p, &offset, sizeof offset);
      T* at = g + o * most + p;
      const vec<T> gradient_on = on ? read_lanes<T>(at, windows - p) : vec<T>{};
      write_lanes<T>(at, gradient_on, W);
      sum += gradient_on;
    }
    return sum;
  }

 private:
  bool is_read_in_place() const { return gradient.is_as_given() && gradient.grad.w == 1; }

  void load_gradient(int64_t n, const Band& band) {
    const int64_t rows = band.rows(), columns = band.columns(), padded = round_up(channels, W);
    if (!is_read_in_place()) {
      gradient.load_pooled(pixels, nullptr, padded, n, 0, channels, band.top, rows, band.left, columns);
      for (int64_t o = 0; o < padded; o += W)
        for (int64_t p = 0; p < rows * columns; p += W) copy_transposed(g + o * most + p, most, pixels + p * padded + o, padded);
      return;
    }
    const auto& grad = gradient.grad;
    const bool one_row = columns == grad.width && grad.h == columns;
    const int64_t runs = one_row ? 1 : rows, length = one_row ? rows * columns : columns;
    for (int64_t o = 0; o < channels; ++o)
      for (int64_t r = 0; r < runs; ++r) {
        const auto* from = grad.data + n * grad.n + o * grad.c + (band.top + r) * grad.h + band.left;
        for (int64_t p = 0; p < length; p += W) write_lanes<T>(g + o * most + r * length + p, read_lanes<T>(from + p, length - p), W);
      }
  }
};

// As weight_gradient, for what chosen_gradient_applies to.
template <class T, class Source, class Gradient>
inline bool chosen_weight_gradient(const Conv& conv, const Source& input, const Gradient& gradient, T* dw, T* sums) {
  constexpr int64_t W = kLanes<T>, kTaps = 9, kBlockBytes = 16 << 10;  // half of a first-level cache
  const int64_t C = conv.wide_channels, O = conv.narrow_channels, padded = padded_channels<T>(O), parts = (C + W - 1) / W;
  const Bands bands = make_bands(gradient.grad.height, gradient.grad.width, Window{}, conv.batch, 4 * W * sizeof(T), kBlockBytes);
  const int64_t columns = 2 * bands.columns + 2, rows = 2 * bands.rows + 2;
  const int64_t row_step = columns * W, part_size = parts * padded * kTaps * W, dw_size = kTaps * C * padded;
  const Chunks chunks(conv.batch * bands.count(), (dw_size + padded) * sizeof(T));
  Scratch<T> partial(chunks.count * dw_size), partial_sums(chunks.count * padded);
  std::vector<char> finite(chunks.count, true);
  torch::stable::parallel_for(0, chunks.count, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> block(rows * row_step), part(part_size), sum(padded * W), lost(padded * W);
    ChosenElements<T, Gradient> elements(gradient, O, bands.rows * bands.columns, columns);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      std::memset(part.get(), 0, part_size * sizeof(T));
      std::memset(sum.get(), 0, padded * W * sizeof(T));
      std::memset(lost.get(), 0, padded * W * sizeof(T));
      for (int64_t unit = chunks.begin(chunk); unit < chunks.begin(chunk + 1); ++unit) {
        const int64_t n = unit / bands.count(), most = elements.most;
        const Band band = bands.full(unit % bands.count());
        const int64_t windows = band.rows() * band.columns(), used = 2 * band.columns() + 2;
        elements.load(n, band);
        for (int64_t o = 0; o < O; ++o) add_carried<T>(sum + o * W, lost + o * W, elements.look_up(o, windows));
        for (int64_t i = 0; i < parts; ++i) {
          input.load(block.get(), W, columns, n, i * W, std::min(W, C - i * W), 2 * band.top - conv.h.pad, 2 * band.rows() + 2,
                     2 * band.left - conv.w.pad, used);
          for (int64_t r = 0; r < 2 * band.rows() + 2; ++r)
            if (!all_finite<T>(block + r * row_step, used * W)) finite[chunk] = false;
          if (!finite[chunk]) return;
          for (int64_t o = 0; o < O; ++o)
            chosen_sums<T>(part + (i * padded + o) * kTaps * W, block, row_step, elements.offsets + o * most, elements.g + o * most,
                           windows);
        }
      }
      T *out = partial.get() + chunk * dw_size, *out_sums = partial_sums.get() + chunk * padded;
      Scratch<T> square(W * W);
      for (int64_t i = 0; i < parts; ++i)
        for (int64_t t = 0; t < kTaps; ++t)
          for (int64_t o = 0; o < padded; o += W) {
            copy_transposed(square.get(), W, part + ((i * padded + o) * kTaps + t) * W, kTaps * W);
            for (int64_t c = 0; c < std::min(W, C - i * W); ++c) store(out + (t * C + i * W + c) * padded + o, load(square + c * W));
          }
      for (int64_t o = 0; o < padded; ++o) out_sums[o] = reduce_add(load(sum + o * W));
    }
  });
  for (const char f : finite)
    if (!f) return false;
  add_partials(dw, partial.get(), chunks.count, dw_size);
  if (sums) add_partials(sums, partial_sums.get(), chunks.count, padded);
  return true;
}

#if ISA_VECTOR_BYTES == 64
// acc[4 x 4 pixels] += g[o] w[o][tap], for `count` channels o that chose element (kRow, kColumn) of a window.
template <int kRow, int kColumn>
INLINE void add_chosen(vec<float> (&acc)[16], const int32_t* list, int64_t count, const float* g, const float* w) {
  constexpr int W = kLanes<float>, kTaps = 9;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t o = list[i];
    const vec<float> go = broadcast(g[o]);
    const float* of_channel = w + o * (kTaps * W);
#pragma GCC unroll 9
    for (int t = 0; t < kTaps; ++t) acc[(kRow + t / 3) * 4 + kColumn + t % 3] += go * load(of_channel + t * W);
  }
}

// The gradient of the input, for what chosen_gradient_applies to, of images whose block stays in the second-level cache.
template <class S, class Gradient>
inline bool chosen_input_gradient(const ConvBackward& call, const Gradient& gradient) {
  // kRun: output channels whose weights stay in the first-level cache, and terms of a sum.
  constexpr int64_t W = kLanes<float>, kTaps = 9, kRun = 32, kBlockBytes = 256 << 10;
  const Conv& conv = call.conv;
  const int64_t C = conv.wide_channels, O = conv.narrow_channels, padded = padded_channels<float>(O), parts = (C + W - 1) / W;
  const int64_t height = gradient.grad.height, width = gradient.grad.width, windows = height * width, runs = (O + kRun - 1) / kRun;
  const int64_t rows = std::max(conv.h.pad + conv.h.wide, 2 * height + 2), columns = std::max(conv.w.pad + conv.w.wide, 2 * width + 2);
  if (rows * columns * W * static_cast<int64_t>(sizeof(float)) > kBlockBytes) return false;
  const int64_t w_size = parts * O * kTaps * W;
  Scratch<float> weights(w_size);
  const Image<const S> weight = call.weight.as<const S>();
  const S* scale = static_cast<const S*>(call.scale);
  torch::stable::parallel_for(0, parts * O, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t o = i % O, c0 = i / O * W;
      const float factor = scale ? to_compute(scale[o]) : 1.0f;
      for (int64_t t = 0; t < kTaps; ++t)
        store(weights + (i * kTaps + t) * W,
              factor *
                  weight_vector<float>(weight.data + o * weight.n + c0 * weight.c + t / 3 * weight.h + t % 3 * weight.w, weight.c, C - c0));
    }
  });
  if (!all_finite<float>(weights, w_size)) return false;
  torch::stable::parallel_for(0, conv.batch, 1, [&](int64_t begin, int64_t end) {
    Scratch<float> block(rows * columns * W), g(windows * padded);
    Scratch<int32_t> lists(windows * padded + 4 * W), ends(runs * windows * 4);
    const auto& index = gradient.index;
    const __m512i count_up = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t n = begin; n < end; ++n) {
      gradient.load_pooled(g, nullptr, padded, n, 0, O, 0, height, 0, width);
      // The channels of each run, window and element, one list after another.
      int32_t *list = lists, *list_end = ends;
      for (int64_t run = 0; run < runs; ++run) {
        const __mmask32 real = static_cast<__mmask32>((int64_t{1} << std::min(kRun, O - run * kRun)) - 1);
        const __m512i low = _mm512_add_epi32(count_up, _mm512_set1_epi32(static_cast<int>(run * kRun)));
        const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(W));
        for (int64_t p = 0; p < windows; ++p) {
          const uint8_t* pixel = index.data + n * index.n + p / width * index.h + p % width * index.w + run * kRun;
          const __m256i bytes = _mm256_maskz_loadu_epi8(real, pixel);
#pragma GCC unroll 4
          for (int q = 0; q < 4; ++q) {
            const uint32_t here = _mm256_mask_cmpeq_epi8_mask(real, bytes, _mm256_set1_epi8(static_cast<char>(q)));
            _mm512_storeu_si512(list, _mm512_maskz_compress_epi32(static_cast<__mmask16>(here), low));
            list += __builtin_popcount(here & 0xffff);
            _mm512_storeu_si512(list, _mm512_maskz_compress_epi32(static_cast<__mmask16>(here >> W), high));
            list += __builtin_popcount(here >> W);
            *list_end++ = static_cast<int32_t>(list - lists);
          }
        }
      }
      for (int64_t i = 0; i < parts; ++i) {
        std::memset(block.get(), 0, rows * columns * W * sizeof(float));
        const float* w = weights + i * O * kTaps * W;
        int64_t first = 0;
        for (int64_t run = 0; run < runs; ++run)
          for (int64_t p = 0; p < windows; ++p) {
            const int32_t* end_of = ends + (run * windows + p) * 4;
            const float* g_of = g + p * padded;
            vec<float> acc[16] = {};
            add_chosen<0, 0>(acc, lists + first, end_of[0] - first, g_of, w);
            add_chosen<0, 1>(acc, lists + end_of[0], end_of[1] - end_of[0], g_of, w);
            add_chosen<1, 0>(acc, lists + end_of[1], end_of[2] - end_of[1], g_of, w);
            add_chosen<1, 1>(acc, lists + end_of[2], end_of[3] - end_of[2], g_of, w);
            first = end_of[3];
            float* corner = block + (p / width * 2 * columns + p % width * 2) * W;
#pragma GCC unroll 16
            for (int k = 0; k < 16; ++k) {
              float* at = corner + (k / 4 * columns + k % 4) * W;
              store(at, load(at) + acc[k]);
            }
          }
        store_block<float>(block + (conv.h.pad * columns + conv.w.pad) * W, W, columns, call.dx.as<S>(), n, i * W, std::min(W, C - i * W),
                           0, conv.h.wide, 0, conv.w.wide);
      }
    }
  });
  return true;
}
#endif
