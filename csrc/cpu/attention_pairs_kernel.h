// Operands of products of bfloat16 numbers in pairs of steps, with float32 sums: by the CPU's dot products, two operations in the
// time of one of float32, or in tiles (tile_product.h), which take the same operands, padded to whole tiles.
//
// What is broadcast (A) lies in rows whose steps come in pairs by themselves; the other operand (B) as [pair][columns][2].
// A missing second half is 0 on both sides. Nothing is scaled before it is multiplied: that would round it once more.

#if ISA_VECTOR_BYTES == 64
// One row of n numbers of any stride to `padded` columns.
INLINE void copy_row(bfloat16* out, const bfloat16* row, int64_t stride, int64_t n, int64_t padded) {
  int64_t d = 0;
  if (stride == 1) {
    for (; d + 32 <= n; d += 32) _mm512_storeu_si512(out + d, _mm512_loadu_si512(row + d));
    std::memcpy(out + d, row + d, (n - d) * sizeof *row);
  } else {
    for (; d < n; ++d) out[d] = row[d * stride];
  }
  std::memset(out + n, 0, (padded - n) * sizeof *out);
}

// Rows of a matrix of pairs [pair of rows][width][2] that hold an infinity or a NaN go to `aside`.
inline void take_pairs(SetAside<float>& aside, bfloat16* pairs, int64_t count, int64_t width, int64_t first) {
  std::vector<float> row(width);
  for (int64_t r = 0; r < count; ++r) {
    bfloat16* at = pairs + r / 2 * 2 * width + r % 2;
    for (int64_t d = 0; d < width; ++d) row[d] = to_float(at[2 * d]);
    if (!aside.take(row.data(), 1, width, first + r)) continue;
    for (int64_t d = 0; d < width; ++d) at[2 * d] = {0};
  }
}

// Packs rows first .. first + count of a matrix to pairs [pair of rows][padded][2]; what is not finite is set aside.
inline void pack_rows(bfloat16* pairs, const bfloat16* rows, int64_t row_stride, int64_t stride, int64_t count, int64_t columns,
                      int64_t padded, int64_t first, SetAside<float>& aside) {
  constexpr int64_t W = kLanes<float>;
  const __m512i exponent = _mm512_set1_epi32(0x7f807f80), lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  // Word 2 i is word i of the first row, 2 i + 1 of the second; the second half comes from 16 words further on.
  const __m512i low = _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(32)), 16));
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  __mmask32 not_finite = 0;
  const auto check = [&](__m512i x) __attribute__((always_inline)) {
    not_finite |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
  };
  for (int64_t r = 0; r < count; r += 2) {
    const bfloat16* row = rows + r * row_stride;
    const bool single = r + 1 == count;
    bfloat16* out = pairs + r * padded;
    int64_t d = 0;
    for (; stride == 1 && d + 2 * W <= columns; d += 2 * W, out += 4 * W) {
      const __m512i first = _mm512_loadu_si512(row + d), second = single ? __m512i{} : _mm512_loadu_si512(row + row_stride + d);
      _mm512_storeu_si512(out, _mm512_permutex2var_epi16(first, low, second));
      _mm512_storeu_si512(out + 2 * W, _mm512_permutex2var_epi16(first, high, second));
      check(first), check(second);
    }
    for (; d < padded; d += W, out += 2 * W) {
      const int64_t n = std::clamp<int64_t>(columns - d, 0, W);
      if (stride == 1) {
        store_pair(out, row + d, single ? nullptr : row + row_stride + d, n);
      } else {
        bfloat16 copies[2][W];
        for (int i = 0; i < 2; ++i) copy_row(copies[i], row + i * row_stride + d * stride, stride, i && single ? 0 : n, W);
        store_pair(out, copies[0], copies[1], W);
      }
      check(_mm512_loadu_si512(out));
    }
  }
  if (not_finite) take_pairs(aside, pairs, count, padded, first);
}

// Packed rows of pairs from `count` up to whole steps of a tile become 0.
inline void pad_rows(bfloat16* pairs, int64_t count, int64_t padded) {
  const int64_t begin = round_up(count, 2), end = round_up(count, kTileSteps);
  std::fill(pairs + begin * padded, pairs + end * padded, bfloat16{});
}

// A product of queries and keys in tiles, as scores: times `factor`.
inline void tile_scores(const TileTask& task, const TileProduct& product, float factor) {
  task.multiply(product);
  for (int64_t r = 0; r < product.rows; ++r)
    for (float *s = product.c + r * product.c_row, *end = s + product.columns; s < end; s += kLanes<float>) store(s, load(s) * factor);
}

// Keys 0 .. count of a [keys, depth] matrix, transposed to panels of [pair of depth][kPanel][2]; keys past the end are 0, and so is
// the depth up to `padded`.
inline void pack_transposed(bfloat16* packed, const bfloat16* rows, int64_t row_stride, int64_t stride, int64_t count, int64_t depth,
                            int64_t padded) {
  constexpr int64_t W = kLanes<float>, P = kPanel<float>;
  const int64_t pairs = padded / 2;
  for (int64_t j = 0; j < round_up(count, P); j += W) {
    bfloat16* out = packed + (j / P * P * pairs + j % P) * 2;
    const int64_t n = std::clamp<int64_t>(count - j, 0, W);
    for (int64_t d = 0; d < pairs; d += W) {
      vec<float> x[W];  // the bits of W pairs of one key
      const int64_t left = std::max<int64_t>(depth - 2 * d, 0);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        const bfloat16* key = rows + (j + i) * row_stride + 2 * d * stride;
        if (i >= n) {
          x[i] = vec<float>{};
        } else if (stride == 1 && left >= 2 * W) {
          std::memcpy(&x[i], key, sizeof x[i]);
        } else {
          bfloat16 copy[2 * W];
          copy_row(copy, key, stride, std::min(2 * W, left), 2 * W);
          std::memcpy(&x[i], copy, sizeof x[i]);
        }
      }
      transpose_square<float>(x);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i)
        if (d + i < pairs) std::memcpy(out + (d + i) * P * 2, &x[i], sizeof x[i]);
    }
  }
}

// Rounds n numbers, whole vectors of them.
__attribute__((target("avx512bf16"))) inline void round_row(bfloat16* out, const float* row, int64_t n) {
  for (int64_t j = 0; j < n; j += 16) {
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(row + j));
    std::memcpy(out + j, &rounded, sizeof rounded);
  }
}

// Rounds n numbers times `factor`. Whole lines at a time, and nothing else is stored: results wait for memory in the processor's queue
// of stores, and every one beside them, such as those of a call or a copy on the stack, leaves fewer lines on their way.
__attribute__((target("avx512bf16"))) inline void round_scaled(bfloat16* out, const float* row, int64_t n, float factor) {
  const __m512 times = _mm512_set1_ps(factor);
  for (int64_t j = 0; j < n; j += 32) {
    const __m512 first = _mm512_mul_ps(_mm512_loadu_ps(row + j), times);
    const __m512 second = n - j > 16 ? _mm512_mul_ps(_mm512_loadu_ps(row + j + 16), times) : first;
    const __m512i rounded = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
    if (n - j >= 32)
      _mm512_storeu_si512(out + j, rounded);
    else
      _mm512_mask_storeu_epi16(out + j, (__mmask32{1} << (n - j)) - 1, rounded);
  }
}

// Rounds p and ds of two rows of n keys to pairs [n][2], and ds to rows of their own too, ds_ld apart. row.at(j) gives a vector of both.
template <class Row>
__attribute__((target("avx512bf16"))) void round_gradients(bfloat16* p_pairs, bfloat16* ds_pairs, bfloat16* ds_rows, int64_t ds_ld,
                                                           int64_t n, const Row& first, const Row& second) {
  // Word 2 i comes from the first row, 2 i + 1 from the second, which lies 16 words further on.
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i order = _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(16)), 16));
  const auto rounded = [](vec<float> x, vec<float> y) __attribute__((target("avx512bf16"), always_inline)) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(y), reinterpret_cast<__m512>(x)));
  };
  for (int64_t j = 0; j < n; j += 16) {
    const auto [p0, ds0] = first.at(j);
    const auto [p1, ds1] = second.at(j);
    const __m512i p = rounded(p0, p1), ds = rounded(ds0, ds1);
    _mm512_storeu_si512(p_pairs + 2 * j, _mm512_permutexvar_epi16(order, p));
    _mm512_storeu_si512(ds_pairs + 2 * j, _mm512_permutexvar_epi16(order, ds));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(ds_rows + j), _mm512_castsi512_si256(ds));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(ds_rows + ds_ld + j), _mm512_extracti64x4_epi64(ds, 1));
  }
}
#endif
