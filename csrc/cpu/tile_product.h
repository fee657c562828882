// Products of bfloat16 numbers in tiles (tile_unit.h): C[rows, columns] (+)= A[rows, 32 steps] B[32 steps, columns], sums float32.
// A lies in rows; B in pairs of steps [pair][columns][2], as the CPU's dot products read it too.
//
// A block of 2 x 2 tiles of C takes 2 tiles of A and 2 of B for 4 multiplications: a load for each. A multiplication of
// 16 x 16 x 32 takes 16 cycles of the unit and a load of 16 lines 8 of the two load ports, so that loads take half of the time.
// Floor: 1024 operations a cycle and core, eight times the dot products' peak where those are one a cycle.
// Columns and steps are padded to whole tiles with zeros by those who pack. The last rows have a configuration of their own.

inline constexpr int64_t kTileSide = 16, kTileSteps = 32;  // rows and columns of a tile of C, steps of A and B

// Whether this thread's products of bfloat16 numbers are formed in tiles.
inline bool in_tiles() { return selected_tiles() != Tiles::none; }

struct TileProduct {
  int64_t rows, columns, steps;  // any, of 16 and of 32
  const bfloat16* a;
  int64_t a_row;
  int64_t run = int64_t{1} << 40, a_run = 0;  // so many steps lie side by side, the next ones a_run further on; of 32
  const bfloat16* b;
  int64_t b_pair, b_block;  // from a pair of steps to the next, and from 32 columns to the next
  float* c;
  int64_t c_row;
  bool add;  // to what C holds
};

template <class Unit, int MT, int NT>
INLINE void multiply_block(const TileProduct& p, int64_t row, int64_t column) {
  const bfloat16 *a = p.a + row * p.a_row, *b = p.b + column / (2 * kTileSide) * p.b_block;
  float* c = p.c + row * p.c_row + column;
  const int64_t a_row = p.a_row * 2, b_pair = p.b_pair * 2, c_row = p.c_row * 4;  // in bytes
  float *right = c + kTileSide, *below = c + kTileSide * p.c_row;
  if (p.add) {
    Unit::template load<0>(c, c_row);
    if constexpr (NT == 2) Unit::template load<1>(right, c_row);
    if constexpr (MT == 2) Unit::template load<2>(below, c_row);
    if constexpr (MT == 2 && NT == 2) Unit::template load<3>(below + kTileSide, c_row);
  } else {
    Unit::template zero<0>();
    if constexpr (NT == 2) Unit::template zero<1>();
    if constexpr (MT == 2) Unit::template zero<2>();
    if constexpr (MT == 2 && NT == 2) Unit::template zero<3>();
  }
  int64_t left = p.run;
  for (int64_t k = 0; k < p.steps; k += kTileSteps, a += kTileSteps, b += kTileSteps / 2 * p.b_pair) {
    if (left == 0) a += p.a_run - p.run, left = p.run;
    left -= kTileSteps;
    Unit::template load<4>(a, a_row);
    Unit::template load<6>(b, b_pair);
    Unit::template multiply<0, 4, 6>();
    if constexpr (NT == 2) {
      Unit::template load<7>(b + 2 * kTileSide, b_pair);
      Unit::template multiply<1, 4, 7>();
    }
    if constexpr (MT == 2) {
      Unit::template load<5>(a + kTileSide * p.a_row, a_row);
      Unit::template multiply<2, 5, 6>();
      if constexpr (NT == 2) Unit::template multiply<3, 5, 7>();
    }
  }
  Unit::template store<0>(c, c_row);
  if constexpr (NT == 2) Unit::template store<1>(right, c_row);
  if constexpr (MT == 2) Unit::template store<2>(below, c_row);
  if constexpr (MT == 2 && NT == 2) Unit::template store<3>(below + kTileSide, c_row);
}

template <class Unit, int MT>
INLINE void multiply_rows(const TileProduct& p, int64_t row, int64_t column) {
  if (p.columns - column > kTileSide)
    multiply_block<Unit, MT, 2>(p, row, column);
  else
    multiply_block<Unit, MT, 1>(p, row, column);
}

// `configured`: the rows of the tiles that the unit is configured for.
template <class Unit>
void multiply_in_tiles(const TileProduct& p, int64_t& configured) {
  const auto configure = [&](int64_t rows) {
    if (configured != rows) Unit::configure(TileConfig::of_rows(static_cast<int>(rows)));
    configured = rows;
  };
  const int64_t whole = p.rows / kTileSide * kTileSide, left = p.rows - whole;
  if (whole) configure(kTileSide);
  for (int64_t column = 0; column < p.columns && whole; column += 2 * kTileSide)
    for (int64_t row = 0; row < whole; row += 2 * kTileSide) {
      if (whole - row > kTileSide)
        multiply_rows<Unit, 2>(p, row, column);
      else
        multiply_rows<Unit, 1>(p, row, column);
    }
  if (left) configure(left);
  for (int64_t column = 0; column < p.columns && left; column += 2 * kTileSide) multiply_rows<Unit, 1>(p, whole, column);
}

// Rows packed in pairs [pair][columns][2] as out[column * out_row + row]; columns are whole vectors, rows are of 32.
inline void transpose_pairs(bfloat16* out, int64_t out_row, const bfloat16* pairs, int64_t columns, int64_t rows) {
  constexpr int64_t W = kLanes<float>;
  for (int64_t r = 0; r < rows; r += 2 * W)
    for (int64_t d = 0; d < columns; d += W) {
      vec<float> x[W];  // the bits of pairs, only moved
#pragma GCC unroll 16
      for (int64_t i = 0; i < W; ++i) std::memcpy(&x[i], pairs + r * columns + 2 * (i * columns + d), sizeof x[i]);
      transpose(x);
#pragma GCC unroll 16
      for (int64_t i = 0; i < W; ++i) std::memcpy(out + (d + i) * out_row + r, &x[i], sizeof x[i]);
    }
}

// The unit during a task of one thread, which keeps its configuration from product to product and releases it at the end.
// Nothing else may use the unit of that thread meanwhile.
class TileTask {
 public:
  explicit TileTask(bool tiled) : unit_(tiled ? selected_tiles() : Tiles::none) {}
  ~TileTask() {
    if (unit_ == Tiles::hardware) HardwareTiles::release();
    if (unit_ == Tiles::software) SoftwareTiles::release();
  }
  TileTask(const TileTask&) = delete;
  TileTask& operator=(const TileTask&) = delete;

  bool tiled() const { return unit_ != Tiles::none; }

  void multiply(const TileProduct& product) const {
    if (unit_ == Tiles::hardware)
      multiply_in_tiles<HardwareTiles>(product, configured_);
    else
      multiply_in_tiles<SoftwareTiles>(product, configured_);
  }

 private:
  const Tiles unit_;
  mutable int64_t configured_ = 0;  // rows
};
