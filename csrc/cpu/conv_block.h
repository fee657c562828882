// Blocks: the part of an image that a task works on, as [rows][columns][stride] elements of the compute type, channels
// innermost, zero outside the image. Included by for_each_isa.h inside the namespace of each instruction set.

// Bytes as numbers of T, and back. GCC narrows 32-bit lanes to bytes in one instruction, but not floats.
template <class T>
struct Bytes {
  static constexpr int W = kLanes<T>;
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> lane;
  typedef lane wide __attribute__((vector_size(ISA_VECTOR_BYTES)));
  typedef uint8_t narrow __attribute__((vector_size(W)));
  static INLINE vec<T> widen(narrow bytes) { return __builtin_convertvector(__builtin_convertvector(bytes, wide), vec<T>); }
  static INLINE narrow shorten(vec<T> v) { return __builtin_convertvector(__builtin_convertvector(v, wide), narrow); }
  static INLINE vec<T> read(const uint8_t* p) {
    narrow bytes;
    std::memcpy(&bytes, p, W);
    return widen(bytes);
  }
  static INLINE void write(uint8_t* p, vec<T> v) {
    const narrow bytes = shorten(v);
    std::memcpy(p, &bytes, W);
  }
  // n < W of them.
  static INLINE vec<T> read_partial(const uint8_t* p, int64_t n) {
    narrow bytes = {};
#if ISA_VECTOR_BYTES == 64
    const __m128i some = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << n) - 1), p);
    std::memcpy(&bytes, &some, W);
#else
    std::memcpy(&bytes, p, n);
#endif
    return widen(bytes);
  }
  static INLINE void write_partial(uint8_t* p, vec<T> v, int64_t n) {
    const narrow bytes = shorten(v);
#if ISA_VECTOR_BYTES == 64
    __m128i all = _mm_setzero_si128();
    std::memcpy(&all, &bytes, W);
    _mm_mask_storeu_epi8(p, static_cast<__mmask16>((1u << n) - 1), all);
#else
    std::memcpy(p, &bytes, n);
#endif
  }
};

// Any storage type as a vector of T: the first n lanes (all of them where n is larger), the others 0.
template <class T, class S>
INLINE vec<T> read_lanes(const S* p, int64_t n) {
  constexpr int W = kLanes<T>;
  if constexpr (std::is_same_v<S, uint8_t>) {
    return n >= W ? Bytes<T>::read(p) : Bytes<T>::read_partial(p, n);
  } else {
    return n >= W ? load(p) : load_partial(p, n);
  }
}

template <class T, class S>
INLINE void write_lanes(S* p, vec<T> v, int64_t n) {
  constexpr int W = kLanes<T>;
  if constexpr (std::is_same_v<S, uint8_t>) {
    if (n >= W)
      Bytes<T>::write(p, v);
    else
      Bytes<T>::write_partial(p, v, n);
  } else {
    if (n >= W)
      store(p, v);
    else
      store_partial(p, v, n);
  }
}

template <class T, class S>
INLINE T read_one(const S* p) {
  if constexpr (std::is_same_v<S, uint8_t>)
    return static_cast<T>(*p);
  else
    return to_compute(*p);
}

template <class S, class T>
INLINE S narrow_one(T x) {
  if constexpr (std::is_same_v<S, uint8_t>)
    return static_cast<uint8_t>(x);
  else
    return from_compute<S>(x);
}

// Every second lane of two vectors: the first, third, .. and the others.
template <class T>
INLINE void part(vec<T> a, vec<T> b, vec<T>& even, vec<T>& odd) {
  typename bits_of<vec<T>>::type lanes;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) lanes[i] = 2 * i;
  even = __builtin_shuffle(a, b, lanes), odd = __builtin_shuffle(a, b, lanes + 1);
}

// Up to 16 x 16 bytes: to[j * to_step + i] = from[i * from_step + j] for i < rows and j < columns. Of the lines of 16 bytes at `from` or
// `to` that are not `whole`, no other byte is touched.
template <bool kFromWhole, bool kToWhole>
INLINE void transpose_bytes(uint8_t* to, int64_t to_step, const uint8_t* from, int64_t from_step, int64_t rows, int64_t columns) {
  constexpr int kSide = 16;
  typedef uint8_t line __attribute__((vector_size(kSide)));
  line m[kSide];
#pragma GCC unroll 16
  for (int i = 0; i < kSide; ++i) {
    m[i] = line{};
    if (i >= rows) continue;
    if (kFromWhole || columns == kSide)
      std::memcpy(&m[i], from + i * from_step, kSide);
    else
      std::memcpy(&m[i], from + i * from_step, columns);
  }
#pragma GCC unroll 4
  for (int stage = 1; stage < kSide; stage *= 2) {
    line next[kSide];
#pragma GCC unroll 8
    for (int i = 0; i < kSide / 2; ++i) {
      const line a = m[i], b = m[i + kSide / 2];
      next[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      next[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kSide; ++i) m[i] = next[i];
  }
#pragma GCC unroll 16
  for (int j = 0; j < kSide; ++j) {
    if (j >= columns) break;
    if (kToWhole || rows == kSide)
      std::memcpy(to + j * to_step, &m[j], kSide);
    else
      std::memcpy(to + j * to_step, &m[j], rows);
  }
}

// `count` pixels of a row whose channels are far apart and whose pixels are adjacent -> out[count][stride]. No hardware prefetcher
// follows the channels, so the row that is `next` elements further is asked for.
template <class T, class S>
NOINLINE void load_planar(T* out, int64_t stride, const S* row, int64_t channel_step, int64_t channels, int64_t count, int64_t next) {
  constexpr int W = kLanes<T>;
  constexpr int64_t kScalar = W / 4;  // fewer channels than this are not worth a transposition
  int64_t c = 0;
  for (; channels - c > kScalar; c += W) {
    const int64_t nc = std::min<int64_t>(W, channels - c);
    for (int64_t p = 0; p < count; p += W) {
      const int64_t np = std::min<int64_t>(W, count - p);
      vec<T> m[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) m[i] = i < nc ? read_lanes<T>(row + (c + i) * channel_step + p, np) : vec<T>{};
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i)
        if (i < nc) __builtin_prefetch(row + (c + i) * channel_step + p + next, 0, 2);
      transpose<T>(m);
      if (np == W && c + W <= stride) {  // lanes past the channels are 0, as the block wants them
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store(out + (p + i) * stride + c, m[i]);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i)
          if (i < np) store_partial(out + (p + i) * stride + c, m[i], nc);
      }
    }
    if (c + W >= channels) return;
  }
  for (; c < channels; ++c)
    for (int64_t p = 0; p < count; ++p) out[p * stride + c] = read_one<T>(row + c * channel_step + p);
}

inline constexpr int64_t kFewBytes = 65536;  // a small part of the second-level cache

// Rows [row, row + rows) x columns [column, column + columns) of channels [c0, c0 + channels) of image n.
// `stride` >= channels; elements past the channels, and pixels outside the image, are 0.
template <class T, class S>
NOINLINE void load_block(T* block, int64_t stride, int64_t block_columns, const Image<const S>& x, int64_t n, int64_t c0, int64_t channels,
                         int64_t row, int64_t rows, int64_t column, int64_t columns) {
  constexpr int W = kLanes<T>;
  const int64_t left = std::max<int64_t>(column, 0), right = std::min(column + columns, x.width);
  const int64_t count = std::max<int64_t>(right - left, 0);
  const bool whole = left == column && right == column + columns && stride == channels;
  // Rows that far below are asked for: a plane's row of 14 floats is read before the third-level cache has sent the next.
  // Of a small image that is loaded as a whole the next one is, which comes while this one is worked on.
  const int64_t ahead = 1 + (256 / sizeof(S)) / std::max<int64_t>(1, count), image_bytes = x.height * count * channels * sizeof(S);
  const bool whole_image = row <= 0 && row + rows >= x.height && image_bytes <= kFewBytes;
  for (int64_t r = 0; r < rows; ++r) {
    T* out = block + r * block_columns * stride;
    const int64_t h = row + r;
    if (h < 0 || h >= x.height || count == 0) {
      std::memset(out, 0, columns * stride * sizeof(T));
      continue;
    }
    if (!whole && stride != channels) {
      std::memset(out, 0, columns * stride * sizeof(T));
    } else if (!whole) {
      std::memset(out, 0, (left - column) * stride * sizeof(T));
      std::memset(out + (right - column) * stride, 0, (column + columns - right) * stride * sizeof(T));
    }
    out += (left - column) * stride;
    const S* source = x.data + n * x.n + c0 * x.c + h * x.h + left * x.w;
    if (channels == 1 && stride == 1) {
      if (x.w == 1)
        for (int64_t p = 0; p < count; p += W) write_lanes<T>(out + p, read_lanes<T>(source + p, count - p), count - p);
      else
        for (int64_t p = 0; p < count; ++p) out[p] = read_one<T>(source + p * x.w);
    } else if (x.c == 1) {
      const bool dense = x.w == channels && stride == channels;
      const int64_t runs = dense ? 1 : count, length = dense ? count * channels : channels;
      for (int64_t p = 0; p < runs; ++p)
        for (int64_t i = 0; i < length; i += W)
          write_lanes<T>(out + p * stride + i, read_lanes<T>(source + p * x.w + i, length - i), length - i);
    } else if (x.w == 1) {
      load_planar<T>(out, stride, source, x.c, channels, count, whole_image ? x.n : r + ahead < rows ? x.h * ahead : 0);
    } else {
      for (int64_t p = 0; p < count; ++p)
        for (int64_t c = 0; c < channels; ++c) out[p * stride + c] = read_one<T>(source + p * x.w + c * x.c);
    }
  }
}

// The inverse, for pixels inside the image: block rows are `block_columns` pixels of `stride` elements.
template <class T, class S>
NOINLINE void store_block(const T* block, int64_t stride, int64_t block_columns, const Image<S>& x, int64_t n, int64_t c0, int64_t channels,
                          int64_t row, int64_t rows, int64_t column, int64_t columns) {
  constexpr int W = kLanes<T>;
  // Rows that follow each other without a gap, in the block and in the image, are one row.
  if (rows > 1 && columns == block_columns && x.h == columns * x.w) columns *= rows, rows = 1;
  for (int64_t r = 0; r < rows; ++r) {
    const T* in = block + r * block_columns * stride;
    S* out = x.data + n * x.n + c0 * x.c + (row + r) * x.h + column * x.w;
    if (x.c == 1) {
      for (int64_t p = 0; p < columns; ++p)
        for (int64_t c = 0; c < channels; c += W) write_lanes<T>(out + p * x.w + c, load(in + p * stride + c), channels - c);
    } else if (x.w == 1) {
      for (int64_t c = 0; c < channels; c += W) {
        const int64_t nc = std::min<int64_t>(W, channels - c);
        for (int64_t p = 0; p < columns; p += W) {
          const int64_t np = std::min<int64_t>(W, columns - p);
          vec<T> m[W];
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) m[i] = i < np ? load(in + (p + i) * stride + c) : vec<T>{};
          transpose<T>(m);
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i)
            if (i < nc) write_lanes<T>(out + (c + i) * x.c + p, m[i], np);
        }
      }
    } else {
      for (int64_t p = 0; p < columns; ++p)
        for (int64_t c = 0; c < channels; ++c) out[p * x.w + c * x.c] = narrow_one<S>(in[p * stride + c]);
    }
  }
}

// What both directions need is compiled in conv.cpp alone.
#ifdef COMPILE_CONV_PRODUCTS
#define CONV_PRODUCT template
#else
#define CONV_PRODUCT extern template
#endif
#define CONV_BLOCK(T, S)                                                                                                          \
  CONV_PRODUCT void load_block(T*, int64_t, int64_t, const Image<const S>&, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, \
                               int64_t);                                                                                          \
  CONV_PRODUCT void store_block(const T*, int64_t, int64_t, const Image<S>&, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
CONV_BLOCK(float, float)
CONV_BLOCK(float, bfloat16)
CONV_BLOCK(double, double)
#undef CONV_BLOCK

// Where a pass may store its sums as soon as they are complete: pixels whose channels are adjacent, at those of a band and group.
// Where alpha is given, y becomes max(y * alpha + beta, floor), NaN staying NaN. No data: they go to a block and its sink.
template <class T>
struct DirectOutput {
  T* data = nullptr;
  int64_t row_step = 0, pixel_step = 0;
  const T *alpha = nullptr, *beta = nullptr;
  T floor = 0;
};
template <class T, class S>
inline DirectOutput<T> direct_output(const Image<S>& out, int64_t n, int64_t c0, const Band& band) {
  if constexpr (std::is_same_v<T, S>)
    if (out.c == 1) return {out.data + n * out.n + c0 + band.top * out.h + band.left * out.w, out.h, out.w};
  return {};
}

// What a pass reads: a tensor as it is. (conv_gradient.h has the other kind, a gradient taken back through the epilogue.)
template <class T, class S>
struct TensorSource {
  using Stored = S;
  Image<const S> x;
  // The tensor, where reading it is all there is to do; else null.
  const Image<const S>* plain() const { return &x; }
  void load(T* block, int64_t stride, int64_t block_columns, int64_t n, int64_t c0, int64_t channels, int64_t row, int64_t rows,
            int64_t column, int64_t columns) const {
    load_block<T>(block, stride, block_columns, x, n, c0, channels, row, rows, column, columns);
  }
};
