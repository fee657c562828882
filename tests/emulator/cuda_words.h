// CUDA's words, spelled for the host compiler.
#pragma once

// libstdc++ spells an attribute __noinline__, so that word stays its own; kernels write ON_DEVICE(__noinline__).
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

using dim3 = emulator::Index;
#define threadIdx (::emulator::self->thread)
#define blockIdx (::emulator::self->block)
#define blockDim (::emulator::block_size)
#define gridDim (::emulator::grid_size)
constexpr int warpSize = 32;

// ---- vector types ----

#define EMULATOR_VECTOR(type, name)                                                           \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                    \
  struct name##3 { type x, y, z; };                                                           \
  struct alignas(4 * sizeof(type) < 16 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; }; \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                            \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                 \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATOR_VECTOR(signed char, char)
EMULATOR_VECTOR(unsigned char, uchar)
EMULATOR_VECTOR(short, short)
EMULATOR_VECTOR(unsigned short, ushort)
EMULATOR_VECTOR(int, int)
EMULATOR_VECTOR(unsigned, uint)
EMULATOR_VECTOR(long long, longlong)
EMULATOR_VECTOR(unsigned long long, ulonglong)
EMULATOR_VECTOR(float, float)
EMULATOR_VECTOR(double, double)
#undef EMULATOR_VECTOR

inline float2 __half22float2(__half2 v) { return {float(v.x), float(v.y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {float(v.x), float(v.y)}; }
inline __half2 __float22half2_rn(float2 v) { return __floats2half2_rn(v.x, v.y); }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return __floats2bfloat162_rn(v.x, v.y); }

// ---- arithmetic ----

template <typename A, typename B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <typename A, typename B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }  // NaN becomes 0
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x ? std::countr_zero(static_cast<unsigned>(x)) + 1 : 0; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return result;
}

// ---- plain memory accesses with a cache hint ----

template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
void __stcg(T* p, T value) {
  *p = value;
}
template <typename T>
void __stcs(T* p, T value) {
  *p = value;
}

// ---- barriers and fences ----

inline void __syncthreads() { emulator::sync_threads(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::sync_warp(mask); }
inline void __threadfence_block() { emulator::fence(emulator::Scope::block); }
inline void __threadfence() { emulator::fence(emulator::Scope::device); }
inline void __nanosleep(unsigned nanoseconds) { emulator::nanosleep(nanoseconds); }
inline long long clock64() { return static_cast<long long>(emulator::globaltimer()); }
[[noreturn]] inline void __trap() { emulator::trap_with("trap"); }

// ---- warps ----

// `width` divides the warp into groups that exchange among themselves.
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  const unsigned self = emulator::self->lane, group = self & ~(width - 1u);
  return emulator::all_lanes("__shfl_sync", mask, value)[group + (static_cast<unsigned>(lane) & (width - 1u))];
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const unsigned self = emulator::self->lane, source = self ^ static_cast<unsigned>(lanes);
  const auto all = emulator::all_lanes("__shfl_xor_sync", mask, value);
  return source / width <= self / width ? all[source] : value;
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  const unsigned self = emulator::self->lane;
  const auto all = emulator::all_lanes("__shfl_up_sync", mask, value);
  return self % width >= lanes ? all[self - lanes] : value;
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  const unsigned self = emulator::self->lane;
  const auto all = emulator::all_lanes("__shfl_down_sync", mask, value);
  return self % width + lanes < static_cast<unsigned>(width) ? all[self + lanes] : value;
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const auto all = emulator::all_lanes("__ballot_sync", mask, predicate);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1 && all[lane]) votes |= 1u << lane;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

// ---- atomics: relaxed, visible to the whole device ----

template <typename T, typename Update>
T emulated_atomic(T* p, Update update) {
  return emulator::atomic(p, emulator::Order::relaxed, emulator::Scope::device, update);
}
template <typename T, typename V>
T atomicAdd(T* p, V value) {
  return emulated_atomic(p, [value](T old) {
    if constexpr (requires { old + value; })
      return static_cast<T>(old + static_cast<T>(value));
    else
      return __hadd2(old, value);
  });
}
template <typename T>
T atomicExch(T* p, std::type_identity_t<T> value) {
  return emulated_atomic(p, [value](T) { return value; });
}
template <typename T>
T atomicMax(T* p, std::type_identity_t<T> value) {
  return emulated_atomic(p, [value](T old) { return max(old, value); });
}
template <typename T>
T atomicMin(T* p, std::type_identity_t<T> value) {
  return emulated_atomic(p, [value](T old) { return min(old, value); });
}
template <typename T>
T atomicOr(T* p, std::type_identity_t<T> value) {
  return emulated_atomic(p, [value](T old) { return old | value; });
}
template <typename T>
T atomicAnd(T* p, std::type_identity_t<T> value) {
  return emulated_atomic(p, [value](T old) { return old & value; });
}
template <typename T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return emulated_atomic(p, [=](T old) { return old == expected ? value : old; });
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {  // back to 0 after `limit`
  return emulated_atomic(p, [limit](unsigned old) { return old >= limit ? 0 : old + 1; });
}
