#include "tile_unit.h"

#include <array>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "isa.h"

namespace bmk {

// ---- the unit in software ----------------------------------------------------------------------------------------
// As chapter 2 of volume 2 of Intel's Software Developer's Manual has LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TILERELEASE
// and TDPBF16PS, without interruptions: a load or store starts with row 0.

namespace {

using Line = std::array<uint8_t, kTileBytes>;

struct UnitState {
  bool configured = false;
  int rows[kTiles] = {}, row_bytes[kTiles] = {};
  std::array<Line, kTileLines> tiles[kTiles] = {};
};
thread_local UnitState unit;

[[noreturn]] void fault(const char* instruction, const char* why) {
  throw std::runtime_error(std::string("tile unit: ") + instruction + ": " + why);
}

void need_tile(const char* instruction, int tile) {
  if (!unit.configured) fault(instruction, "no configuration is loaded");
  if (unit.rows[tile] == 0) fault(instruction, "the tile is not configured");
}

// Denormal numbers are read as 0 and written as 0; signs stay.
float flushed(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }
float from_bfloat16(uint16_t bits) { return flushed(std::bit_cast<float>(static_cast<uint32_t>(bits) << 16)); }
float fused(float a, float b, float sum) { return flushed(std::fma(a, b, sum)); }
float added(float a, float b) { return flushed(a + b); }

template <class T>
T element(const Line& line, int i) {
  T x;
  std::memcpy(&x, line.data() + i * sizeof(T), sizeof x);
  return x;
}

}  // namespace

void SoftwareTiles::configure(const TileConfig& config) {
  UnitState next;
  if (config.palette > 1) fault("ldtilecfg", "the palette must be 0 or 1");
  for (uint8_t byte : config.reserved)
    if (byte) fault("ldtilecfg", "a reserved byte is not 0");
  if (config.palette == 1) {
    for (int t = 0; t < 16; ++t) {
      const int rows = config.rows[t], bytes = config.row_bytes[t];
      if (t >= kTiles && (rows || bytes)) fault("ldtilecfg", "there are 8 tiles");
      if (rows > kTileLines || bytes > kTileBytes) fault("ldtilecfg", "a tile has at most 16 rows of 64 bytes");
      if ((rows == 0) != (bytes == 0)) fault("ldtilecfg", "a tile has rows without bytes or bytes without rows");
      if (t < kTiles) next.rows[t] = rows, next.row_bytes[t] = bytes;
    }
    next.configured = true;
  }
  unit = next;
}

void SoftwareTiles::release() { unit = UnitState(); }

void SoftwareTiles::zero_tile(int tile) {
  need_tile("tilezero", tile);
  unit.tiles[tile] = {};
}

void SoftwareTiles::load_tile(int tile, const void* from, int64_t stride) {
  need_tile("tileloadd", tile);
  unit.tiles[tile] = {};
  for (int r = 0; r < unit.rows[tile]; ++r)
    std::memcpy(unit.tiles[tile][r].data(), static_cast<const char*>(from) + r * stride, unit.row_bytes[tile]);
}

void SoftwareTiles::store_tile(int tile, void* to, int64_t stride) {
  need_tile("tilestored", tile);
  for (int r = 0; r < unit.rows[tile]; ++r)
    std::memcpy(static_cast<char*>(to) + r * stride, unit.tiles[tile][r].data(), unit.row_bytes[tile]);
}

// Even and odd terms of a row are summed by themselves, each by fused multiply-adds; their sum is added to C. Rounded to
// nearest even throughout.
#if defined(__x86_64__)
__attribute__((target("avx2,fma")))  // where kernels use it there is more than that
#endif
void SoftwareTiles::multiply_tiles(int c, int a, int b) {
  for (int tile : {c, a, b}) need_tile("tdpbf16ps", tile);
  if (c == a || c == b || a == b) fault("tdpbf16ps", "the three tiles must be different");
  if (unit.row_bytes[c] % 4 || unit.row_bytes[a] % 4 || unit.row_bytes[b] % 4) fault("tdpbf16ps", "rows must be of whole words");
  if (unit.rows[c] != unit.rows[a]) fault("tdpbf16ps", "C must have the rows of A");
  if (unit.row_bytes[a] / 4 != unit.rows[b]) fault("tdpbf16ps", "B must have a row for each pair of columns of A");
  if (unit.row_bytes[c] != unit.row_bytes[b]) fault("tdpbf16ps", "C must have the columns of B");
  const int columns = unit.row_bytes[c] / 4, pairs = unit.rows[b];
  float numbers[kTileLines][2 * kTileLines];  // of B
  for (int k = 0; k < pairs; ++k)
    for (int n = 0; n < 2 * columns; ++n) numbers[k][n] = from_bfloat16(element<uint16_t>(unit.tiles[b][k], n));
  for (int m = 0; m < unit.rows[c]; ++m) {
    float sums[2 * kTileLines] = {};
    for (int k = 0; k < pairs; ++k) {
      const float even = from_bfloat16(element<uint16_t>(unit.tiles[a][m], 2 * k));
      const float odd = from_bfloat16(element<uint16_t>(unit.tiles[a][m], 2 * k + 1));
      for (int n = 0; n < columns; ++n) {
        sums[2 * n] = fused(even, numbers[k][2 * n], sums[2 * n]);
        sums[2 * n + 1] = fused(odd, numbers[k][2 * n + 1], sums[2 * n + 1]);
      }
    }
    Line& line = unit.tiles[c][m];
    for (int n = 0; n < columns; ++n) {
      const float sum = added(flushed(element<float>(line, n)), added(sums[2 * n], sums[2 * n + 1]));
      std::memcpy(line.data() + 4 * n, &sum, sizeof sum);
    }
    std::memset(line.data() + 4 * columns, 0, kTileBytes - 4 * columns);
  }
  for (int m = unit.rows[c]; m < kTileLines; ++m) unit.tiles[c][m] = {};
}

// ---- whether the unit of the processor may be used ---------------------------------------------------------------

// Small integers, whose sums are exact in any order; each entry of a tile differs from its neighbours. Every tile takes part, in
// the shapes of TileConfig::of_rows.
template <class Unit>
std::string check_tiles() {
  constexpr int kSteps = 32, kColumns = 16;
  uint16_t a[kTileLines][kSteps], b[kTileLines][2 * kColumns];
  float c[kTileLines][kColumns], expected[kTileLines][kColumns];
  const auto number = [](int i) { return static_cast<float>(i % 15 - 7); };
  const auto bits = [](float x) { return static_cast<uint16_t>(std::bit_cast<uint32_t>(x) >> 16); };
  for (int m = 0; m < kTileLines; ++m)
    for (int k = 0; k < kSteps; ++k) a[m][k] = bits(number(5 * m + 3 * k));
  for (int k = 0; k < kSteps; ++k)
    for (int n = 0; n < kColumns; ++n) b[k / 2][2 * n + k % 2] = bits(number(7 * k + 4 * n + 1));
  for (int m = 0; m < kTileLines; ++m)
    for (int n = 0; n < kColumns; ++n) {
      c[m][n] = expected[m][n] = number(m + n);
      for (int k = 0; k < kSteps; ++k) expected[m][n] += 2 * number(5 * m + 3 * k) * number(7 * k + 4 * n + 1);
    }
  for (int rows = 1; rows <= kTileLines; ++rows) {
    float results[4][kTileLines][kColumns] = {};
    Unit::configure(TileConfig::of_rows(rows));
    Unit::template load<0>(c, sizeof c[0]);
    Unit::template load<1>(c, sizeof c[0]);
    Unit::template load<2>(c, sizeof c[0]);
    Unit::template zero<3>();
    Unit::template load<4>(a, sizeof a[0]);
    Unit::template load<5>(a, sizeof a[0]);
    Unit::template load<6>(b, sizeof b[0]);
    Unit::template load<7>(b, sizeof b[0]);
    for (int i = 0; i < 2; ++i) {
      Unit::template multiply<0, 4, 6>();
      Unit::template multiply<1, 4, 7>();
      Unit::template multiply<2, 5, 6>();
      Unit::template multiply<3, 5, 7>();
    }
    Unit::template store<0>(results[0], sizeof c[0]);
    Unit::template store<1>(results[1], sizeof c[0]);
    Unit::template store<2>(results[2], sizeof c[0]);
    Unit::template store<3>(results[3], sizeof c[0]);
    Unit::release();
    for (int tile = 0; tile < 4; ++tile)
      for (int m = 0; m < kTileLines; ++m)
        for (int n = 0; n < kColumns; ++n) {
          const float right = m < rows ? expected[m][n] - (tile == 3 ? c[m][n] : 0) : 0;
          if (results[tile][m][n] != right) return "its products are wrong";
        }
  }
  return "";
}
template std::string check_tiles<SoftwareTiles>();

namespace {

std::string find_why_no_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kBfloat16 = 1u << 22, kTile = 1u << 24, kSaved = 1u << 27;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & (kBfloat16 | kTile)) != (kBfloat16 | kTile))
    return "the processor has no AMX for bfloat16";
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & kSaved)) return "the system saves no extended registers";
  constexpr unsigned kStates = 3u << 17;  // tile configuration and tile data
  unsigned states, upper;
  asm volatile("xgetbv" : "=a"(states), "=d"(upper) : "c"(0));
  if ((states & kStates) != kStates) return "the system does not save tile registers";
  if (!__get_cpuid_count(0x1d, 1, &eax, &ebx, &ecx, &edx) || ebx != (kTiles << 16 | kTileBytes) || (ecx & 0xffff) != kTileLines)
    return "its tiles are not 8 of 16 rows of 64 bytes";
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of arch_prctl; Linux 5.16 and later
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return "the system gives this process no permission to use tiles";
  const std::string wrong = check_tiles<HardwareTiles>();
  return wrong.empty() ? wrong : "the self-check of the processor's AMX failed: " + wrong;
#else
  return "this is not Linux on an x86-64 processor";
#endif
}

}  // namespace

const std::string& why_no_tiles() {
  static const std::string why = find_why_no_tiles();
  return why;
}

Tiles selected_tiles() {
  static const Tiles tiles = [] {
    if (selected_isa() != Isa::avx512_bf16) return Tiles::none;
    const char* named = std::getenv("BIGMODEL_ISA");
    const std::string wanted = named ? named : "";
    if (wanted == "amx_emulated") return Tiles::software;
    return wanted != isa_name(Isa::avx512_bf16) && why_no_tiles().empty() ? Tiles::hardware : Tiles::none;
  }();
  return tiles;
}

}  // namespace bmk
