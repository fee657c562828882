// The matrix unit of Intel's AMX: eight tile registers of up to 16 rows of 64 bytes, and a product of bfloat16 numbers.
//
//   C[m][n] += sum over pairs k of  A[m][2 k] B[k][2 n] + A[m][2 k + 1] B[k][2 n + 1]       C float32, A and B bfloat16
//
// Two units have one interface: HardwareTiles is the instructions, SoftwareTiles does the same in plain C++, with what would
// raise an exception of the processor thrown as std::runtime_error, so that kernels are tested where there is no such unit.
// A thread configures the unit before it uses it and releases it afterwards: see TileTask in tile_product.h.
#pragma once

#include <cstdint>
#include <string>

namespace bmk {

inline constexpr int kTiles = 8, kTileLines = 16, kTileBytes = 64;

// What LDTILECFG reads. Palette 1 is the one there is; a tile that is not used has no rows and no bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // Tiles 0 to 3 for C, 4 and 5 for A, 6 and 7 for B, of the full size but for the rows of C and A.
  static TileConfig of_rows(int rows) {
    TileConfig config;
    for (int t = 0; t < kTiles; ++t) {
      config.row_bytes[t] = kTileBytes;
      config.rows[t] = static_cast<uint8_t>(t < 6 ? rows : kTileLines);
    }
    return config;
  }
};
static_assert(sizeof(TileConfig) == 64);

#if defined(__x86_64__)
// "memory": the compiler must neither put off stores that a tile is loaded from nor move loads before a tile is stored.
struct HardwareTiles {
  static void configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config) : "memory"); }
  static void release() { asm volatile("tilerelease" ::: "memory"); }
  template <int tile>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
  }
  // A tile's rows lie `stride` bytes apart.
  template <int tile>
  static void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
  }
  template <int tile>
  static void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
  }
  template <int c, int a, int b>
  static void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }
};
#endif

struct SoftwareTiles {
  static void configure(const TileConfig& config);
  static void release();
  template <int tile>
  static void zero() {
    zero_tile(tile);
  }
  template <int tile>
  static void load(const void* from, int64_t stride) {
    load_tile(tile, from, stride);
  }
  template <int tile>
  static void store(void* to, int64_t stride) {
    store_tile(tile, to, stride);
  }
  template <int c, int a, int b>
  static void multiply() {
    multiply_tiles(c, a, b);
  }

 private:
  static void zero_tile(int tile);
  static void load_tile(int tile, const void* from, int64_t stride);
  static void store_tile(int tile, void* to, int64_t stride);
  static void multiply_tiles(int c, int a, int b);
};

#if !defined(__x86_64__)
using HardwareTiles = SoftwareTiles;  // never chosen
#endif

// Which unit the kernels use: the processor's where it has one, on top of Isa::avx512_bf16; the other where BIGMODEL_ISA is
// amx_emulated; none where BIGMODEL_ISA names anything less.
enum class Tiles { none, software, hardware };
Tiles selected_tiles();

// Why the processor's unit cannot be used: it has none, the system does not let this process use it, or it was found to
// multiply wrongly. Empty where it can. Asks the system and checks the unit, once for the whole process.
const std::string& why_no_tiles();

// Multiplies numbers with `Unit` and by scalar arithmetic; what is wrong with the unit, or an empty string.
template <class Unit>
std::string check_tiles();

}  // namespace bmk
