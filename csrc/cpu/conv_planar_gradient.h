// The gradient of the weights of conv_planar.h's first layers: 3x3 of stride 1 of few input channels, with a 2x2 max-pool, NCHW. Included
// by for_each_isa.h inside the namespace of each instruction set.
//
//   dw[tap, o] = sum over windows p of  g[p, o] x[chosen element of p + tap]
//
// Lanes are windows of one row. A tap meets one of four sources in every window, so that two blends by the bits of the index choose among
// them and one multiply-add does the rest: 12 blends for the columns of 4 rows of sources, 9 for the rows, 9 multiply-adds, where a product
// over all pixels has 36. The sums of a band stay in registers; those of a chunk of the batch are vectors in the first-level cache.
//
// Refused, by returning false: sources that are not finite, which the gradient's zeros meet in a sum over all pixels.
// Floor, on Zen 4 with two 512-bit blends a cycle or one multiply-add: 15 cycles for a vector of windows of a channel.

template <class T>
inline bool planar_gradient_applies(const ConvBackward& call) {
  // Of other activations the derivative is yet to be applied.
  const bool as_it_is = call.activation == Activation::none || call.activation == Activation::relu;
  const int64_t width = call.grad.width;
  return is_3x3_under_halves<T>(call) && as_it_is && call.x.w == 1 && call.grad.w == 1 && gather_pass(call.conv).depth() <= kSumLength &&
         4 * width >= 3 * round_up(width, kLanes<T>);
}

// The bits of the index of one vector of windows: whether the chosen element is in the right column, in the lower row.
template <class T>
struct ChosenBits {
#if ISA_VECTOR_BYTES == 64
  __mmask16 right, lower, on;
  INLINE explicit ChosenBits(const uint8_t* index) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(index));
    right = _mm_test_epi8_mask(bytes, _mm_set1_epi8(1)), lower = _mm_test_epi8_mask(bytes, _mm_set1_epi8(2));
    on = _mm_cmpneq_epi8_mask(bytes, _mm_set1_epi8(static_cast<char>(kNoGradient)));
  }
  template <class Mask>
  static INLINE vec<T> blend(Mask mask, vec<T> b, vec<T> a) {
    return reinterpret_cast<vec<T>>(_mm512_mask_mov_ps(reinterpret_cast<__m512>(a), mask, reinterpret_cast<__m512>(b)));
  }
#else
  decltype(vec<T>{} < vec<T>{}) right, lower, on;
  INLINE explicit ChosenBits(const uint8_t* index) {
    const vec<T> k = read_lanes<T>(index, kLanes<T>);
    lower = k >= T(2), right = (k == T(1)) | (k == T(3)), on = k != static_cast<T>(kNoGradient);
  }
  template <class Mask>
  static INLINE vec<T> blend(Mask mask, vec<T> b, vec<T> a) {
    return mask ? b : a;
  }
#endif
};

template <class T, class S>
struct PlanarGradient {
  static constexpr int W = kLanes<T>, kTaps = 9, kSums = kTaps + 1;
  static constexpr int64_t kBytes = 16;  // of the index that are transposed together
  Pass pass;
  Bands bands;     // of windows
  int64_t length;  // of a row of windows in whole vectors
  Image<const S> x, grad;
  Image<const uint8_t> index;

  int64_t source_rows() const { return 2 * bands.rows + 2; }
  int64_t line_size() const { return std::max(pass.w.axis.pad + round_up(x.width, W), 2 * length) + 3 * W; }

  // block[channel][vector of windows][row][4][W]: element k of run j is column 2 k + j of the padded source.
  void fill(T* block, T* line, int64_t n, int64_t first) const {
    const int64_t pad = pass.w.axis.pad, rows = source_rows();
    for (int64_t c = 0; c < pass.channels; ++c)
      for (int64_t r = 0; r < rows; ++r) {
        T* run = block + (c * length * rows + r * W) * 4;
        const int64_t row = first + r;
        const bool inside = row >= 0 && row < x.height;
        if (inside) {
          const S* source = x.data + n * x.n + c * x.c + row * x.h;
          for (int64_t p = 0; p < x.width; p += W) store(line + pad + p, read_lanes<T>(source + p, x.width - p));
        }
        for (int64_t p = 0; p < length; p += W, run += rows * 4 * W)
#pragma GCC unroll 2
          for (int64_t j = 0; j < 4; j += 2) {
            const T* at = line + 2 * p + j;
            vec<T> even = {}, odd = {};
            if (inside) part<T>(load(at), load(at + W), even, odd);
            store(run + j * W, even), store(run + (j + 1) * W, odd);
          }
      }
  }

  // chosen[channel][row][length], of the pixels of a band.
  void fill_chosen(uint8_t* chosen, int64_t n, const Band& band, int64_t step) const {
    for (int64_t c = 0; c < pass.out_channels; c += kBytes)
      for (int64_t r = 0; r < band.rows(); ++r)
        for (int64_t p = 0; p < grad.width; p += kBytes)
          transpose_bytes<false, true>(chosen + c * step + r * length + p, step,
                                       index.data + n * index.n + c + (band.top + r) * index.h + p * index.w, index.w,
                                       std::min(kBytes, grad.width - p), std::min(kBytes, pass.out_channels - c));
  }

  // Keeps the compiler from loading a value anew for each of its uses: loads are what limits the loop then.
  static INLINE vec<T> once(vec<T> v) {
#if ISA_VECTOR_BYTES == 64
    asm("" : "+v"(v));
#endif
    return v;
  }

  // acc[tap] += gradient times chosen source, over `rows` rows of one vector of windows; acc[kTaps] += gradient.
  INLINE void sum_rows(vec<T> (&acc)[kSums], const T* block, const S* g, const uint8_t* chosen, int64_t rows, int64_t lanes) const {
    using Bits = ChosenBits<T>;
    for (int64_t r = 0; r < rows; ++r, block += 8 * W, g += grad.h, chosen += length) {
      const Bits bits(chosen);
      const vec<T> gr = Bits::blend(bits.on, read_lanes<T>(g, lanes), vec<T>{});
      vec<T> column[4][3];  // of the chosen column
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const T* row = block + i * 4 * W;
        const vec<T> second = once(load(row + W)), third = once(load(row + 2 * W));
        column[i][0] = Bits::blend(bits.right, second, load(row));
        column[i][1] = Bits::blend(bits.right, third, second);
        column[i][2] = Bits::blend(bits.right, load(row + 3 * W), third);
      }
#pragma GCC unroll 9
      for (int t = 0; t < kTaps; ++t) acc[t] += gr * Bits::blend(bits.lower, column[t / 3 + 1][t % 3], column[t / 3][t % 3]);
      acc[kTaps] += gr;
    }
  }

  // dw [taps * channels][padded], sums [padded] unless null.
  bool run(T* dw, T* sums, int64_t padded) const {
    const int64_t C = pass.channels, O = pass.out_channels, per_image = bands.count();
    // Sums [output channel][source channel][kSums][W], of which the last is the gradient's own.
    const int64_t size = O * C * kSums * W, rows = source_rows(), block_size = C * rows * 4 * length;
    const Chunks chunks(pass.batch * per_image, size * sizeof(T));
    Scratch<T> partial(chunks.count * size), total(size);
    std::vector<char> finite(chunks.count, true);
    torch::stable::parallel_for(0, chunks.count, 1, [&](int64_t begin, int64_t end) {
      const int64_t step = round_up(bands.rows * length + kBytes, kBytes);
      Scratch<T> block(block_size), line(line_size()), lost(O * W);
      Scratch<uint8_t> chosen(round_up(O, kBytes) * step);
      std::memset(line.get(), 0, line_size() * sizeof(T));
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        T* part = partial.get() + chunk * size;
        std::memset(part, 0, size * sizeof(T));
        std::memset(lost.get(), 0, O * W * sizeof(T));
        for (int64_t unit = chunks.begin(chunk); unit < chunks.begin(chunk + 1) && finite[chunk]; ++unit) {
          const int64_t n = unit / per_image;
          const Band band = bands.full(unit % per_image);
          fill(block, line, n, 2 * band.top - pass.h.axis.pad);
          finite[chunk] = all_finite<T>(block, block_size);
          fill_chosen(chosen, n, band, step);
          for (int64_t o = 0; o < O; ++o)
            for (int64_t c = 0; c < C; ++c)
              for (int64_t p = 0; p < grad.width; p += W) {
                vec<T> acc[kSums] = {};
                sum_rows(acc, block + (c * length + p) * rows * 4, grad.data + n * grad.n + o * grad.c + band.top * grad.h + p,
                         chosen + o * step + p, band.rows(), grad.width - p);
                T* to = part + (o * C + c) * kSums * W;
#pragma GCC unroll 9
                for (int t = 0; t < kTaps; ++t) store(to + t * W, load(to + t * W) + acc[t]);
                if (c == 0) add_carried<T>(to + kTaps * W, lost + o * W, acc[kTaps]);
              }
        }
      }
    });
    for (const char f : finite)
      if (!f) return false;
    add_partials(total.get(), partial.get(), chunks.count, size);
    for (int64_t o = 0; o < padded; ++o) {
      const auto sum_of = [&](int64_t c, int64_t k) { return o < O ? reduce_add(load(total + ((o * C + c) * kSums + k) * W)) : T(0); };
      for (int64_t k = 0; k < kTaps * C; ++k) dw[k * padded + o] = sum_of(k % C, k / C);
      if (sums) sums[o] = sum_of(0, kTaps);
    }
    return true;
  }
};

// As weight_gradient, for what planar_gradient_applies to.
template <class T, class S>
inline bool planar_weight_gradient(const ConvBackward& call, T* dw, T* sums) {
  constexpr int64_t kRows = 16;  // of windows in a band, and the terms of a sum
  const Pass pass = gather_pass(call.conv);
  const auto grad = call.grad.as<const S>();
  Bands bands = make_bands(grad.height, 1, Window{}, pass.batch, 1, kRows);
  bands.columns = bands.width = grad.width;
  const int64_t length = round_up(grad.width, kLanes<T>);
  const PlanarGradient<T, S> planar{pass, bands, length, call.x.as<const S>(), grad, call.index.as<const uint8_t>()};
  return planar.run(dw, sums, padded_channels<T>(pass.out_channels));
}
