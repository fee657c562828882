// Blocks and weights of bfloat16 numbers for the CPU's dot products: two multiply-adds a lane, with float32 sums. Included by
// for_each_isa.h inside the namespace of each instruction set.
//
// Channels come in pairs, the last of an odd number with a 0. A source with adjacent channels is copied, or read, as it lies; any other
// goes through a block of floats and is rounded once, which changes nothing but a gradient taken back through an activation.

// What a direct pass multiplies for numbers of storage type S: the compute type, or bfloat16.
template <class T, class M>
INLINE int64_t block_channels(int64_t channels) {
  return std::is_same_v<T, M> ? channels : round_up(channels, 2);
}

template <class S>
inline bool pairs_apply(const Pass& pass) {
  return ISA_VECTOR_BYTES == 64 && std::is_same_v<S, bfloat16> && selected_isa() == Isa::avx512_bf16 && pass.channels > 1;
}

// The pass over pairs. Sums of products of bfloat16 numbers, rounded to bfloat16 in the end, need not begin anew as often.
inline Pass pass_of_pairs(const Pass& pass) {
  constexpr int64_t kPairSumLength = 512;
  Pass even = pass;
  even.channels = round_up(pass.channels, 2), even.sum_length = kPairSumLength;
  return even;
}

// Where an odd number of channels would leave a 0 at every tap: the taps of a row are channels, of pixels that lie side by side, and a row
// ends in one 0 (7 taps of 3 channels are 22 numbers in place of 28).
template <class T, class S>
inline bool row_pairs_apply(const Pass& pass) {
  return pairs_apply<S>(pass) && pass.groups == 1 && !pass.h.scatter && pass.channels % 2 == 1 && pass.w.axis.taps > 1 &&
         pass.w.axis.dilation == 1;
}
inline Pass pass_of_rows(const Pass& pass) {
  Pass rows = pass;
  rows.channels = pass.channels * pass.w.axis.taps, rows.w.axis.taps = 1;
  return rows;
}

// Whether all numbers of a tensor without gaps are finite; false for any other tensor.
inline bool is_dense_and_finite(const Image<const bfloat16>& x, int64_t batch) {
  const int64_t plane = x.height * x.width, size = x.channels * plane;
  const bool last = x.c == 1 && x.w == x.channels && x.h == x.width * x.w, first = x.w == 1 && x.h == x.width && x.c == plane;
  if (!(last || first) || (batch > 1 && x.n != size)) return false;
  uint16_t outside = 0;
  for (int64_t i = 0; i < batch * size; ++i) {
    uint16_t bits;
    std::memcpy(&bits, x.data + i, sizeof bits);
    outside |= (bits & 0x7f80) == 0x7f80;
  }
  return outside == 0;
}

// The bits of two vectors rounded to bfloat16, side by side in every lane.
INLINE bits_of<vec<float>>::type round_pairs(vec<float> first, vec<float> second) {
  typedef uint32_t words __attribute__((vector_size(ISA_VECTOR_BYTES)));
  const auto rounded = [](vec<float> v) __attribute__((always_inline)) {
    const words bits = reinterpret_cast<words>(v), quiet_nan = words{} + 0x7fc00000u;
    return v == v ? bits + 0x7fff + ((bits >> 16) & 1) : quiet_nan;
  };
  return reinterpret_cast<bits_of<vec<float>>::type>((rounded(first) >> 16) | (rounded(second) & 0xffff0000u));
}

// `count` pixels of `channels` adjacent channels, `step` apart, to pixels of `stride` = round_up(channels, 2).
inline void copy_pixels(bfloat16* out, int64_t stride, const bfloat16* in, int64_t step, int64_t channels, int64_t count) {
  if (step == stride && channels == stride) {
    std::memcpy(out, in, count * stride * sizeof *out);
    return;
  }
  int64_t p = 0;
  if (channels == 3 && step >= 3)  // the fourth number, of the next pixel, is masked
    for (; p + 1 < count; ++p) {
      uint64_t four;
      std::memcpy(&four, in + p * step, sizeof four);
      four &= 0xffffffffffff;
      std::memcpy(out + p * stride, &four, sizeof four);
    }
  for (; p < count; ++p) {
    for (int64_t c = 0; c < channels; ++c) out[p * stride + c] = in[p * step + c];
    if (channels < stride) out[p * stride + channels] = {0};
  }
}

// As load_block, of channels that are adjacent in memory.
inline void copy_block(bfloat16* block, int64_t stride, int64_t block_columns, const Image<const bfloat16>& x, int64_t n, int64_t c0,
                       int64_t channels, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  const int64_t left = std::max<int64_t>(column, 0), right = std::max(left, std::min(column + columns, x.width));
  for (int64_t r = 0; r < rows; ++r) {
    bfloat16* out = block + r * block_columns * stride;
    const int64_t h = row + r;
    if (h < 0 || h >= x.height || left == right) {
      std::memset(out, 0, columns * stride * sizeof *out);
      continue;
    }
    std::memset(out, 0, (left - column) * stride * sizeof *out);
    std::memset(out + (right - column) * stride, 0, (column + columns - right) * stride * sizeof *out);
    copy_pixels(out + (left - column) * stride, stride, x.data + n * x.n + c0 + h * x.h + left * x.w, x.w, channels, right - left);
  }
}

// The block of a pass, `stride` = block_channels numbers to a pixel.
template <class T, class M, class Source>
inline void load_operands(M* block, int64_t stride, int64_t block_columns, const Source& source, int64_t n, int64_t c0, int64_t channels,
                          int64_t row, int64_t rows, int64_t column, int64_t columns) {
  if constexpr (std::is_same_v<T, M>) {
    source.load(block, stride, block_columns, n, c0, channels, row, rows, column, columns);
  } else {
    const auto* image = source.plain();
    if (image && image->c == 1) {
      copy_block(block, stride, block_columns, *image, n, c0, channels, row, rows, column, columns);
      return;
    }
    Scratch<T> numbers(rows * columns * stride);
    source.load(numbers.get(), stride, columns, n, c0, channels, row, rows, column, columns);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < columns * stride; i += kLanes<T>) {
        const int64_t count = columns * stride - i;
        write_lanes<T>(block + r * block_columns * stride + i, read_lanes<T>(numbers.get() + r * columns * stride + i, count), count);
      }
  }
}

// Where a pointwise pass may read its sources as they lie; no data: it copies them.
template <class T, class M, class Source>
inline Image<const M> sources_in_place(const Pass& pass, const Source& source) {
  if constexpr (std::is_same_v<M, typename Source::Stored>) {
    const Image<const M>* image = source.plain();
    if (pass.is_pointwise() && image && image->c == 1 && pass.channels == block_channels<T, M>(pass.channels)) return *image;
  }
  return {};
}
