// __half and __nv_bfloat16 with the conversions and the arithmetic the kernels use. Every operation rounds once, to nearest even.
#pragma once

template <uint16_t (*to_bits)(float), float (*to_value)(uint16_t)>
struct Float16 {
  uint16_t bits;

  Float16() = default;
  explicit Float16(float x) : bits(to_bits(x)) {}
  explicit operator float() const { return to_value(bits); }
};
using __half = Float16<emulator::half_bits, emulator::half_value>;
using __nv_bfloat16 = Float16<emulator::bfloat16_bits, emulator::bfloat16_value>;
using half = __half;
using nv_bfloat16 = __nv_bfloat16;

template <typename T>
struct alignas(4) Float16Pair {
  T x, y;
};
using __half2 = Float16Pair<__half>;
using __nv_bfloat162 = Float16Pair<__nv_bfloat16>;
using half2 = __half2;
using nv_bfloat162 = __nv_bfloat162;

inline float __half2float(__half x) { return float(x); }
inline __half __float2half(float x) { return __half(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline float __bfloat162float(__nv_bfloat16 x) { return float(x); }
inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(uint16_t bits) { return std::bit_cast<__half>(bits); }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t bits) { return std::bit_cast<__nv_bfloat16>(bits); }

template <typename T>
concept Is16Bit = std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>;

template <Is16Bit T>
T __hadd(T a, T b) {
  return T(float(a) + float(b));
}
template <Is16Bit T>
T __hmul(T a, T b) {
  return T(float(a) * float(b));
}
template <Is16Bit T>
T __hmax(T a, T b) {
  return T(fmaxf(float(a), float(b)));
}
template <Is16Bit T>
T operator+(T a, T b) {
  return __hadd(a, b);
}
template <Is16Bit T>
T operator*(T a, T b) {
  return __hmul(a, b);
}
template <Is16Bit T>
Float16Pair<T> __hadd2(Float16Pair<T> a, Float16Pair<T> b) {
  return {__hadd(a.x, b.x), __hadd(a.y, b.y)};
}
template <Is16Bit T>
Float16Pair<T> __hmul2(Float16Pair<T> a, Float16Pair<T> b) {
  return {__hmul(a.x, b.x), __hmul(a.y, b.y)};
}
template <Is16Bit T>
Float16Pair<T> __hfma2(Float16Pair<T> a, Float16Pair<T> b, Float16Pair<T> c) {  // exact products, one rounding: double holds both
  return {T(float(double(float(a.x)) * float(b.x) + float(c.x))), T(float(double(float(a.y)) * float(b.y) + float(c.y)))};
}
