// One function per PTX instruction, and no inline assembly anywhere else.
//
// Each function has two halves: ON_DEVICE is the instruction, ON_EMULATOR is what it means, spelled in calls of
// tests/emulator/emulator.h. That is how the kernels are executed, instruction by instruction, where there is no GPU:
// the host compiler includes the same kernel sources with tests/emulator on its include path.
//
// All addresses are plain pointers: into shared memory where a parameter is called `shared`, into another block's
// shared memory (made by `mapa`) where it is called `remote`.
// Instructions of sm_90 trap on older targets, so that one kernel source compiles for both; launchers never send a
// kernel that needs them to a device that lacks them.
//
// Section numbers are those of the PTX ISA 9.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdio>
#define ON_DEVICE(...) __VA_ARGS__
#define ON_EMULATOR(...)
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define ON_SM90(...) __VA_ARGS__
#else
#define ON_SM90(...) __trap()
#endif
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
#define ON_SM89(with, without) with
#else
#define ON_SM89(with, without) without
#endif
// Static shared memory: SHARED(float, partial, [32]). Emulated, the name stands for memory of the block.
#define SHARED(type, name, ...) __shared__ type name __VA_ARGS__
#else
#include <emulator.h>  // tests/emulator, found through the include path
#define ON_DEVICE(...)
#define ON_EMULATOR(...) __VA_ARGS__
#define ON_SM90(...)
#define ON_SM89(with, without) without
#define SHARED(type, name, ...) auto& name = ::emulator::static_shared<type __VA_ARGS__>(__FILE__ ":" #name, __LINE__)
#endif
#define PTX __device__ __forceinline__

namespace bmk {

// Dynamic shared memory, of the size given at launch, aligned for every kind of copy.
PTX unsigned char* dynamic_shared() {
  ON_DEVICE(extern __shared__ __align__(128) unsigned char memory[]; return memory);
  ON_EMULATOR(return emulator::dynamic_shared());
}

namespace ptx {

#ifdef __CUDACC__
PTX unsigned shared_address(const void* shared) { return static_cast<unsigned>(__cvta_generic_to_shared(shared)); }
#endif

// ---- copies from global to shared memory (9.7.9.25) ----

// Copies the first `valid` of Bytes bytes and fills the rest with zeros. 16 bytes bypass L1.
template <int Bytes>
PTX void cp_async_zfill(void* shared, const void* global, int valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  if constexpr (Bytes == 16) {
    ON_DEVICE(
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid) : "memory"));
  } else {
    ON_DEVICE(asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(Bytes),
                           "r"(valid) : "memory"));
  }
  ON_EMULATOR(emulator::cp_async(shared, global, Bytes, valid));
}
template <int Bytes>
PTX void cp_async(void* shared, const void* global) {
  cp_async_zfill<Bytes>(shared, global, Bytes);
}
PTX void cp_async_commit() {
  ON_DEVICE(asm volatile("cp.async.commit_group;" :: : "memory"));
  ON_EMULATOR(emulator::cp_async_commit());
}
// Waits until at most Pending of this thread's groups are under way. Other threads see the data after a barrier.
template <int Pending>
PTX void cp_async_wait() {
  ON_DEVICE(asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory"));
  ON_EMULATOR(emulator::cp_async_wait(Pending));
}

// ---- warp matrices (9.7.14.5) ----
// Fragments, with g = lane / 4 and t = lane % 4; a register holds two 16-bit elements, the lower column (row, for B) first:
//   A 16x16 (9.7.14.5.8)   a[0]: row g,   columns 2t, 2t+1    a[1]: row g+8, the same    a[2], a[3]: the same, columns + 8
//   B 16x8  (9.7.14.5.8)   b0:   column g, rows 2t, 2t+1      b1: the same, rows + 8
//   C 16x8                 c[0], c[1]: row g, columns 2t, 2t+1    c[2], c[3]: row g+8
//   A 16x8  (9.7.14.5.7)   a[0]: row g, columns 2t, 2t+1      a[1]: row g+8            B 8x8   b: column g, rows 2t, 2t+1
//   tf32 A 16x8            a[0]: (g, t)   a[1]: (g+8, t)   a[2]: (g, t+4)   a[3]: (g+8, t+4)      B 8x8   b0: (t, g)   b1: (t+4, g)

// Loads N 8x8 matrices of 16-bit elements (9.7.14.5.15): lanes 8i .. 8i+7 give the addresses of the 16-byte rows of matrix i,
// and each lane receives row g, columns 2t and 2t+1 of each; transposed, rows 2t and 2t+1 of column g.
PTX void ldmatrix_x1(unsigned (&r)[1], const void* shared) {
  ON_DEVICE(asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(shared_address(shared)) : "memory"));
  ON_EMULATOR(emulator::ldmatrix(r, shared, false));
}
PTX void ldmatrix_x2(unsigned (&r)[2], const void* shared) {
  ON_DEVICE(asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]),
                         "=r"(r[1]) : "r"(shared_address(shared)) : "memory"));
  ON_EMULATOR(emulator::ldmatrix(r, shared, false));
}
PTX void ldmatrix_x4(unsigned (&r)[4], const void* shared) {
  ON_DEVICE(asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]),
                         "=r"(r[3]) : "r"(shared_address(shared)) : "memory"));
  ON_EMULATOR(emulator::ldmatrix(r, shared, false));
}
PTX void ldmatrix_x2_trans(unsigned (&r)[2], const void* shared) {
  ON_DEVICE(asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]),
                         "=r"(r[1]) : "r"(shared_address(shared)) : "memory"));
  ON_EMULATOR(emulator::ldmatrix(r, shared, true));
}
PTX void ldmatrix_x4_trans(unsigned (&r)[4], const void* shared) {
  ON_DEVICE(asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]),
                         "=r"(r[3]) : "r"(shared_address(shared)) : "memory"));
  ON_EMULATOR(emulator::ldmatrix(r, shared, true));
}
// The inverse of ldmatrix_x4 (9.7.14.5.16), sm_90.
PTX void stmatrix_x4(void* shared, const unsigned (&r)[4]) {
  ON_SM90(asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(shared)), "r"(r[0]),
                       "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory"));
  ON_EMULATOR(emulator::stmatrix(shared, r, false));
}
PTX void stmatrix_x4_trans(void* shared, const unsigned (&r)[4]) {
  ON_SM90(asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(shared)), "r"(r[0]),
                       "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory"));
  ON_EMULATOR(emulator::stmatrix(shared, r, true));
}

// d += a b, with the sum in float (9.7.14.5.14).
PTX void mma_m16n8k16_f16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  ON_DEVICE(
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" : "+f"(d[0]),
                   "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)));
  ON_EMULATOR(emulator::mma_m16n8k16(d, a, {b0, b1}, emulator::half_value));
}
PTX void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  ON_DEVICE(
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" : "+f"(d[0]),
                   "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)));
  ON_EMULATOR(emulator::mma_m16n8k16(d, a, {b0, b1}, emulator::bfloat16_value));
}
PTX void mma_m16n8k8_f16(float (&d)[4], const unsigned (&a)[2], unsigned b) {
  ON_DEVICE(asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};" : "+f"(d[0]),
                         "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b)));
  ON_EMULATOR(emulator::mma_m16n8k8(d, a, b, emulator::half_value));
}
PTX void mma_m16n8k8_bf16(float (&d)[4], const unsigned (&a)[2], unsigned b) {
  ON_DEVICE(asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};" : "+f"(d[0]),
                         "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b)));
  ON_EMULATOR(emulator::mma_m16n8k8(d, a, b, emulator::bfloat16_value));
}
// The hardware reads only the upper 19 bits of each operand: round them with cvt_rna_tf32 first.
PTX void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  ON_DEVICE(
      asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" : "+f"(d[0]),
                   "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)));
  ON_EMULATOR(emulator::mma_m16n8k8_tf32(d, a, {b0, b1}));
}

// ---- numbers (9.7.3, 9.7.9.21) ----

PTX float ex2_approx(float x) {  // 2^x, relative error 2^-22
  ON_DEVICE(float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y);
  ON_EMULATOR(return emulator::ex2_approx(x));
}
PTX float rcp_approx(float x) {  // 1/x, error 1 ulp
  ON_DEVICE(float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y);
  ON_EMULATOR(return 1.0f / x);
}
PTX float tanh_approx(float x) {  // relative error 2^-11: for results kept in 16 bits only
  ON_DEVICE(float y; asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x)); return y);
  ON_EMULATOR(return emulator::tanh_approx(x));
}
PTX unsigned cvt_rna_tf32(float x) {
  ON_DEVICE(unsigned y; asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x)); return y);
  ON_EMULATOR(return emulator::round_to_tf32(x));
}
PTX unsigned cvt_rn_f16x2(float low, float high) {
  ON_DEVICE(unsigned y; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low)); return y);
  ON_EMULATOR(return emulator::half_bits(low) | unsigned{emulator::half_bits(high)} << 16);
}
PTX unsigned cvt_rn_bf16x2(float low, float high) {
  ON_DEVICE(unsigned y; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low)); return y);
  ON_EMULATOR(return emulator::bfloat16_bits(low) | unsigned{emulator::bfloat16_bits(high)} << 16);
}
// What cvt_f16x2_e4m3x2 gives, where there is no such instruction. The bits of an e4m3 number are those of a half 2^8 times smaller.
PTX unsigned f16x2_of_e4m3x2(unsigned pair) {
  const unsigned both = (pair & 0xff) | (pair & 0xff00) << 8, magnitude = (both & 0x007f007f) << 7;
  const unsigned times256 = 0x5c005c00;
  const __half2 scaled = __hmul2(reinterpret_cast<const __half2&>(magnitude), reinterpret_cast<const __half2&>(times256));
  unsigned found = reinterpret_cast<const unsigned&>(scaled);
  if ((both & 0x7f) == 0x7f) found = (found & 0xffff0000) | 0x7fff;  // NaN, the one number with no place among a half's
  if ((both & 0x7f0000) == 0x7f0000) found = (found & 0xffff) | 0x7fff0000;
  return found | (both & 0x00800080) << 8;
}
PTX unsigned cvt_f16x2_e4m3x2(unsigned pair) {  // sm_89; the lower byte first; exact
  ON_SM89(unsigned y; asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(y) : "h"(static_cast<unsigned short>(pair)));
          return y, return f16x2_of_e4m3x2(pair));
}

// ---- time and failure ----

PTX uint64_t globaltimer() {  // nanoseconds
  ON_DEVICE(uint64_t t; asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t)::"memory"); return t);
  ON_EMULATOR(return emulator::globaltimer());
}
// Ends the launch with an error, and says why. Not inlined, so that its stack frame weighs on no kernel.
__device__ ON_DEVICE(__noinline__) inline void trap_with(const char* why) {
  ON_DEVICE(printf("block (%d, %d, %d), thread %d: %s\n", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, why); __trap());
  ON_EMULATOR(emulator::trap_with(why));
}

}  // namespace ptx
}  // namespace bmk

#include "ptx_sync.cuh"
