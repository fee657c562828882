// 16-bit numbers and the warp's matrix instructions. The layouts of the fragments are those of the PTX ISA 9, in the sections
// named at each function; csrc/cuda/ptx.cuh writes them out register by register.
#include "runtime.h"

namespace emulator {

// ---- numbers ----

namespace {

float half_value_computed(uint16_t bits) {
  const uint32_t sign = uint32_t{bits} >> 15 << 31, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 0) return std::copysign(std::ldexp(static_cast<float>(fraction), -24), sign ? -1.0f : 1.0f);
  return std::bit_cast<float>(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13);
}

struct HalfTable {
  float value[65536];
  HalfTable() {
    for (uint32_t bits = 0; bits < 65536; ++bits) value[bits] = half_value_computed(static_cast<uint16_t>(bits));
  }
};
const HalfTable half_table;

}  // namespace

float half_value(uint16_t bits) { return half_table.value[bits]; }
float bfloat16_value(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

uint16_t half_bits(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const float size = std::fabs(x);
  if (std::isnan(x)) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;  // half a step past the largest number
  if (size < 0x1p-14f)                         // below the smallest normal number, steps are 2^-24
    return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 24))));
  const uint32_t rounded = (bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1);
  return static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)));
}

uint16_t bfloat16_bits(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint32_t round_to_tf32(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  return std::isnan(x) || std::isinf(x) ? bits : (bits + 0x1000) & ~0x1fffu;
}

float ex2_approx(float x) { return std::exp2(x); }

// As coarse as the instruction: 11 bits.
float tanh_approx(float x) { return std::bit_cast<float>((std::bit_cast<uint32_t>(std::tanh(x)) + 0x800) & ~0xfffu); }

// ---- ldmatrix (9.7.14.5.15), stmatrix (9.7.14.5.16) ----

void ldmatrix(unsigned* r, int count, const void* row, bool transposed) {
  const unsigned lane = self->lane, g = lane / 4, t = lane % 4;
  if (static_cast<int>(lane) < 8 * count) {
    require_shared(row, 16, 16, "ldmatrix", running()->home);
    check_access(row, 16, Access::read, EMULATOR_PC);
  }
  struct Row {
    uint16_t element[8];
  };
  Row mine{};
  if (static_cast<int>(lane) < 8 * count) std::memcpy(&mine, row, 16);
  const auto rows = all_lanes(transposed ? "ldmatrix.trans" : "ldmatrix", 0xffffffffu, mine);
  for (int i = 0; i < count; ++i) {
    const Row* matrix = &rows[static_cast<std::size_t>(8 * i)];
    const uint16_t low = transposed ? matrix[2 * t].element[g] : matrix[g].element[2 * t];
    const uint16_t high = transposed ? matrix[2 * t + 1].element[g] : matrix[g].element[2 * t + 1];
    r[i] = low | unsigned{high} << 16;
  }
}

void stmatrix(void* row, const unsigned* r, int count, bool transposed) {
  struct Registers {
    unsigned r[4];
  };
  const unsigned lane = self->lane;
  Registers mine{};
  std::memcpy(mine.r, r, static_cast<std::size_t>(count) * sizeof(unsigned));
  const auto all = all_lanes(transposed ? "stmatrix.trans" : "stmatrix", 0xffffffffu, mine);
  if (static_cast<int>(lane) >= 8 * count) return;
  require_shared(row, 16, 16, "stmatrix", running()->home);
  check_access(row, 16, Access::write, EMULATOR_PC);
  const unsigned matrix = lane / 8, line = lane % 8;
  auto* to = static_cast<uint16_t*>(row);
  for (unsigned column = 0; column < 8; ++column) {
    const unsigned g = transposed ? column : line, across = transposed ? line : column;
    to[column] = static_cast<uint16_t>(all[4 * g + across / 2].r[matrix] >> (16 * (across % 2)));
  }
}

// ---- mma (9.7.14.5.14): every product and every sum is rounded to float, in the order of k ----

namespace {

struct Operands {
  unsigned a[4], b[2];
};

// The registers of the fragments, by row and column. 16-bit elements come in pairs: m16n8k16 (9.7.14.5.8), m16n8k8 (9.7.14.5.7).
uint16_t pair_element(unsigned pair, unsigned i) { return static_cast<uint16_t>(pair >> (16 * (i % 2))); }
uint16_t a_element(const std::array<Operands, 32>& all, unsigned row, unsigned k) {
  return pair_element(all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], k);
}
uint16_t b_element(const std::array<Operands, 32>& all, unsigned k, unsigned column) {
  return pair_element(all[column * 4 + k % 8 / 2].b[k / 8], k);
}
// tf32 elements fill a register (9.7.14.5.7); the hardware ignores the lowest 13 bits.
float tf32_value(unsigned bits) { return std::bit_cast<float>(bits & ~0x1fffu); }
float a_tf32(const std::array<Operands, 32>& all, unsigned row, unsigned k) {
  return tf32_value(all[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2]);
}
float b_tf32(const std::array<Operands, 32>& all, unsigned k, unsigned column) { return tf32_value(all[column * 4 + k % 4].b[k / 4]); }

// Each lane adds the products of its own four elements of d.
template <typename A, typename B>
void multiply(float (&d)[4], unsigned depth, A a, B b) {
  const unsigned g = self->lane / 4, t = self->lane % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = g + i / 2 * 8, column = 2 * t + i % 2;
    float sum = d[i];
    for (unsigned k = 0; k < depth; ++k) sum += a(row, k) * b(k, column);
    d[i] = sum;
  }
}

void multiply_pairs(float (&d)[4], unsigned depth, const char* what, const Operands& mine, Value value) {
  const auto all = all_lanes(what, 0xffffffffu, mine);
  multiply(
      d, depth, [&](unsigned row, unsigned k) { return value(a_element(all, row, k)); },
      [&](unsigned k, unsigned column) { return value(b_element(all, k, column)); });
}

}  // namespace

void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], std::array<unsigned, 2> b, Value value) {
  multiply_pairs(d, 16, "mma.m16n8k16", {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, value);
}
void mma_m16n8k8(float (&d)[4], const unsigned (&a)[2], unsigned b, Value value) {
  multiply_pairs(d, 8, "mma.m16n8k8", {{a[0], a[1]}, {b}}, value);
}
void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4], std::array<unsigned, 2> b) {
  const auto all = all_lanes("mma.m16n8k8.tf32", 0xffffffffu, Operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  multiply(
      d, 8, [&](unsigned row, unsigned k) { return a_tf32(all, row, k); },
      [&](unsigned k, unsigned column) { return b_tf32(all, k, column); });
}

}  // namespace emulator
