// Small things that every kernel uses: storage types, vector accesses, reductions over a warp. No torch headers.
#pragma once

#include "ptx.cuh"

namespace bmk {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

template <typename Integer>
__host__ __device__ constexpr Integer ceil_div(Integer a, Integer b) {
  return (a + b - 1) / b;
}
template <typename Integer>
__host__ __device__ constexpr Integer round_up(Integer a, Integer b) {
  return ceil_div(a, b) * b;
}

// ---- storage types: arithmetic is in float ----

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Two neighbours in one register, as the operands of mma want them.
template <typename T>
__device__ __forceinline__ unsigned pack2(float low, float high);
template <>
__device__ __forceinline__ unsigned pack2<__half>(float low, float high) {
  return ptx::cvt_rn_f16x2(low, high);
}
template <>
__device__ __forceinline__ unsigned pack2<__nv_bfloat16>(float low, float high) {
  return ptx::cvt_rn_bf16x2(low, high);
}
template <typename T>
__device__ __forceinline__ float2 unpack2(unsigned pair);
template <>
__device__ __forceinline__ float2 unpack2<__half>(unsigned pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}
template <>
__device__ __forceinline__ float2 unpack2<__nv_bfloat16>(unsigned pair) {  // the upper half of a float
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

// d += a b for 16-bit operands, by type.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);
template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  ptx::mma_m16n8k16_f16(d, a, b0, b1);
}
template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  ptx::mma_m16n8k16_bf16(d, a, b0, b1);
}

// ---- vector accesses: N elements that are loaded and stored as one, aligned to their size (16 bytes at the most) ----

template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
  T value[N];

  __device__ __forceinline__ T& operator[](int i) { return value[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return value[i]; }
};
// The widest vector one instruction moves.
template <typename T>
constexpr int kVectorSize = 16 / sizeof(T);

template <typename T, int N>
__device__ __forceinline__ Vector<T, N> load_vector(const T* p) {
  return *reinterpret_cast<const Vector<T, N>*>(p);
}
template <typename T, int N>
__device__ __forceinline__ void store_vector(T* p, const Vector<T, N>& v) {
  *reinterpret_cast<Vector<T, N>*>(p) = v;
}

// ---- reductions over the Lanes neighbouring lanes of a warp; every lane gets the result ----

template <int Lanes = kWarpSize>
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = Lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}
template <int Lanes = kWarpSize>
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = Lanes / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, offset));
  return x;
}

}  // namespace bmk
