// Products of bfloat16 numbers in tiles (tile_unit.h): C[rows, columns] (+)= A[rows, 32 steps] B[32 steps, columns], sums float32.
// A lies in rows; B in pairs of steps [pair][columns][2], as the CPU's dot products read it too.
//
// A block of 2 x 2 tiles of C takes 2 tiles of A and 2 of B for 4 multiplications: a load for each. A multiplication of
// 16 x 16 x 32 takes 16 cycles of the unit and a load of 16 lines 8 of the two load ports, so that loads take half of the time.
// Floor: 1024 operations a cycle and core, eight times the dot products' peak where those are one a cycle.
// Everything is padded to whole tiles with zeros by those who pack: one configuration serves all products.

inline constexpr int64_t kTileSide = 16, kTileSteps = 32;  // rows and columns of a tile of C, steps of A and B

// Whether this thread's products of bfloat16 numbers are formed in tiles.
inline bool in_tiles() { return selected_tiles() != Tiles::none; }

struct TileProduct {
  int64_t rows, columns, steps;  // of 16, 16 and 32
  const bfloat16* a;
  int64_t a_row;
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
  for (int64_t k = 0; k < p.steps; k += kTileSteps, a += kTileSteps, b += kTileSteps / 2 * p.b_pair) {
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

template <class Unit>
void multiply_in_tiles(const TileProduct& p) {
  for (int64_t column = 0; column < p.columns; column += 2 * kTileSide)
    for (int64_t row = 0; row < p.rows; row += 2 * kTileSide) {
      const bool two_rows = p.rows - row > kTileSide, two_columns = p.columns - column > kTileSide;
      if (two_rows && two_columns)
        multiply_block<Unit, 2, 2>(p, row, column);
      else if (two_rows)
        multiply_block<Unit, 2, 1>(p, row, column);
      else if (two_columns)
        multiply_block<Unit, 1, 2>(p, row, column);
      else
        multiply_block<Unit, 1, 1>(p, row, column);
    }
}

// Holds the unit configured for the products of a thread's task, where they are formed in tiles.
class TileTask {
 public:
  explicit TileTask(bool tiled) {
    if (!tiled) return;
    if (selected_tiles() == Tiles::hardware)
      hardware_.emplace(TileConfig::whole());
    else
      software_.emplace(TileConfig::whole());
  }

  void multiply(const TileProduct& product) const {
    if (hardware_)
      multiply_in_tiles<HardwareTiles>(product);
    else
      multiply_in_tiles<SoftwareTiles>(product);
  }

 private:
  std::optional<ConfiguredTiles<HardwareTiles>> hardware_;
  std::optional<ConfiguredTiles<SoftwareTiles>> software_;
};
