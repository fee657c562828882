// Products of a few rows with weights that lie along their depth: linear layers of small batches, convolutions of few pixels.
// Included, after tiles.h, by the kernel headers that use it, inside the namespace of each instruction set.
//
//   y = x w^T          x [rows, depth], w [columns, depth], y [rows, columns]
//
// Few rows multiply the weights so few times that packing them counts. A task owns a strip of NV vectors of columns for all rows. It
// packs as many of their weights as stay in the first-level cache, multiplies all rows with them and goes on, so that packed
// weights never travel: 64 rows of 3136 x 128 took 340 us on one thread and 390 on two where every thread read what both had packed,
// 166 so. Floor: 2 rows columns depth operations at the multiply-add peak, and reading w once.

inline constexpr int64_t kFewRows = 96;

// Up to kRows rows and NV vectors of columns of y (+)= the sums over `steps` of the depth.
template <int kRows, int NV, class T>
NOINLINE void few_rows_tile(const T* x, int64_t x_row, const T* packed, int64_t steps, T* y, int64_t y_row, int64_t columns, bool add) {
  vec<T> acc[kRows][NV] = {};
  multiply_chain<kRows, NV, T>(acc, x, x_row, 1, packed, NV * kLanes<T>, steps);
  store_tile<kRows, NV, T>(acc, y, y_row, columns, add);
}

// The rows of a tile, and the whole depth of a block in chains.
template <int NV, class T>
void few_rows_block(int64_t rows, const T* x, int64_t x_row, const T* packed, int64_t steps, int64_t chain, T* y, int64_t y_row,
                    int64_t columns, bool add) {
  with_constant<PanelTile<T>::rows(NV)>(rows, [&](auto constant) {
    for (int64_t k = 0; k == 0 || k < steps; k += chain)
      few_rows_tile<constant.value, NV, T>(x + k, x_row, packed + k * NV * kLanes<T>, std::min(chain, steps - k), y, y_row, columns,
                                           add || k > 0);
  });
}
PRODUCT void few_rows_block<PanelTile<float>::kVectors, float>(int64_t, const float*, int64_t, const float*, int64_t, int64_t, float*,
                                                               int64_t, int64_t, bool);
PRODUCT void few_rows_block<PanelTile<float>::kVectors / 2, float>(int64_t, const float*, int64_t, const float*, int64_t, int64_t, float*,
                                                                   int64_t, int64_t, bool);

// The share i of n of the next block of weights is asked for: its rows lie so far apart that no hardware prefetcher follows.
template <class T, class S>
inline void prefetch_weights(const S* weight, int64_t weight_row, int64_t rows, int64_t steps, int64_t i, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(S);
  for (int64_t row = rows * i / n; row < rows * (i + 1) / n; ++row)
    for (int64_t k = 0; k < steps; k += kLine) __builtin_prefetch(weight + row * weight_row + k, 0, 2);
}

// `chain` terms are added up one after the other, then to what y holds. finish(tile, row, column, rows, columns) is called for every
// complete tile. Sums do not depend on NV, nor on the number of threads.
template <int NV, class T, class S, class Finish>
inline void multiply_few_rows(int64_t rows, int64_t columns, int64_t depth, const T* x, int64_t x_row, const S* weight, int64_t weight_row,
                              T* y, int64_t y_row, int64_t chain, Finish finish) {
  constexpr int64_t R = PanelTile<T>::rows(NV), kWidth = NV * kLanes<T>;
  const int64_t block = depth_block<T>(depth), tiles = (rows + R - 1) / R;
  torch::stable::parallel_for(0, (columns + kWidth - 1) / kWidth, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> packed(block * kWidth);
    for (int64_t first = begin * kWidth; first < std::min(end * kWidth, columns); first += kWidth) {
      const int64_t width = std::min(kWidth, columns - first);
      for (int64_t k0 = 0; k0 == 0 || k0 < depth; k0 += block) {
        const int64_t steps = std::min(block, depth - k0);
        const bool same_strip = k0 + block < depth;
        const int64_t next = same_strip ? first : std::min(first + kWidth, columns), next_k = same_strip ? k0 + block : 0;
        const S* following = weight + next * weight_row + next_k;
        const int64_t following_rows = std::min(kWidth, columns - next), following_steps = std::min(block, depth - next_k);
        pack_panels<T>(packed.get(), weight + first * weight_row + k0, 1, weight_row, steps, width, kWidth, 0, 1);
        for (int64_t i = 0, m = 0; i < tiles; ++i) {
          const int64_t count = (rows - m + tiles - i - 1) / (tiles - i);  // of as equal a size as can be
          T* tile = y + m * y_row + first;
          prefetch_weights<T>(following, weight_row, following_rows, following_steps, i, tiles);
          few_rows_block<NV, T>(count, x + m * x_row + k0, x_row, packed.get(), steps, chain, tile, y_row, width, k0 > 0);
          if (k0 + steps >= depth) finish(tile, m, first, count, width);
          m += count;
        }
      }
    }
  });
}

// The vectors of a strip that give every thread as much to do; 0 where none does.
template <class T>
inline int strip_vectors(int64_t columns) {
  const int64_t threads = torch::stable::get_num_threads();
  for (int vectors : {PanelTile<T>::kVectors, PanelTile<T>::kVectors / 2}) {
    const int64_t strips = (columns + vectors * kLanes<T> - 1) / (vectors * kLanes<T>);
    if (strips % threads == 0 || strips >= 4 * threads) return vectors;
  }
  return 0;
}
