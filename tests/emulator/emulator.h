// What a kernel source needs to be compiled for the emulator: CUDA's words (cuda_words.h), its 16-bit types (cuda_half.h), and
// the meaning of each PTX instruction, which the second halves of csrc/cuda/ptx.cuh call. README.md says how it is used.
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

namespace emulator {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

// The running thread, as the kernel sees it.
struct Place {
  Index thread, block;
  unsigned lane;
};
extern Place* self;
extern Index block_size, grid_size;

// Ends the process with the message, the place of the running thread and, where it helps, the state of all others.
[[noreturn]] void trap_with(const char* why);

// ---- memory ----

enum class Order { relaxed, acquire, release, acq_rel };
enum class Scope { block, cluster, device };

unsigned char* dynamic_shared();
void* static_shared(const char* name, int line, std::size_t bytes, std::size_t alignment);
template <typename T>
T& static_shared(const char* name, int line) {
  return *static_cast<T*>(static_shared(name, line, sizeof(T), alignof(T)));
}

// An access that may meet others (another thread runs first, perhaps) lies between these two.
void begin_access(const void* address, std::size_t bytes, bool writes, const char* what);
void copy_bytes(void* to, const void* from, std::size_t bytes);  // not seen by what watches the kernel's own accesses
void end_load(const void* address, Order order, Scope scope);
void end_store(const void* address, Order order, Scope scope, bool read_modify_write, bool changes);

template <typename T>
T load(const T* p, Order order, Scope scope) {
  begin_access(p, sizeof(T), false, "ordered load");
  T value;
  copy_bytes(&value, p, sizeof(T));
  end_load(p, order, scope);
  return value;
}
template <typename T>
void store(T* p, T value, Order order, Scope scope) {
  begin_access(p, sizeof(T), true, "ordered store");
  copy_bytes(p, &value, sizeof(T));
  end_store(p, order, scope, false, true);
}
template <typename T, typename Update>
T atomic(T* p, Order order, Scope scope, Update update) {
  begin_access(p, sizeof(T), true, "atomic");
  T old;
  copy_bytes(&old, p, sizeof(T));
  const T value = update(old);
  copy_bytes(p, &value, sizeof(T));
  if (order == Order::acquire || order == Order::acq_rel || order == Order::relaxed) end_load(p, order, scope);
  end_store(p, order, scope, true, std::memcmp(&old, &value, sizeof(T)) != 0);
  return old;
}
template <typename T>
T fetch_add(T* p, T value, Order order, Scope scope) {
  return atomic(p, order, scope, [value](T old) { return static_cast<T>(old + value); });
}
void fence(Scope scope);
void fence_proxy_async();

void cp_async(void* shared, const void* global, int bytes, int valid);
void cp_async_commit();
void cp_async_wait(int pending);
void st_async(void* remote, const void* value, unsigned bytes, uint64_t* remote_barrier);
void bulk_copy(void* to, const void* from, unsigned bytes, uint64_t* barrier);
void bulk_store(void* global, const void* shared, unsigned bytes);
void bulk_commit();
void bulk_wait(int pending);

// ---- waiting ----

void barrier_sync(int id, int threads);
void barrier_arrive(int id, int threads);
void sync_threads();
void mbarrier_init(uint64_t* barrier, unsigned count);
void mbarrier_arrive(uint64_t* barrier, unsigned expected_bytes, Scope scope);
bool mbarrier_wait(uint64_t* barrier, unsigned parity, Scope scope, bool may_sleep);
unsigned cluster_rank();
unsigned cluster_size();
void cluster_arrive();
void cluster_wait();
const void* mapa(const void* shared, unsigned rank);
void nanosleep(unsigned nanoseconds);
uint64_t globaltimer();

// ---- warps: each lane of `mask` gives a value and gets those of all ----

void exchange(const char* what, unsigned mask, const void* mine, void* all, std::size_t bytes);
void sync_warp(unsigned mask);
template <typename T>
std::array<T, 32> all_lanes(const char* what, unsigned mask, const T& mine) {
  std::array<T, 32> all;
  exchange(what, mask, &mine, all.data(), sizeof(T));
  return all;
}

// ---- matrices (matrix.cpp) ----

using Value = float(uint16_t);
float half_value(uint16_t bits);
float bfloat16_value(uint16_t bits);
uint16_t half_bits(float x);      // rounded to nearest even
uint16_t bfloat16_bits(float x);  // rounded to nearest even
uint32_t round_to_tf32(float x);  // to nearest, ties away from zero

void ldmatrix(unsigned* r, int count, const void* row, bool transposed);
void stmatrix(void* row, const unsigned* r, int count, bool transposed);
template <std::size_t N>
void ldmatrix(unsigned (&r)[N], const void* row, bool transposed) {
  ldmatrix(r, N, row, transposed);
}
template <std::size_t N>
void stmatrix(void* row, const unsigned (&r)[N], bool transposed) {
  stmatrix(row, r, N, transposed);
}
void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], std::array<unsigned, 2> b, Value value);
void mma_m16n8k8(float (&d)[4], const unsigned (&a)[2], unsigned b, Value value);
void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4], std::array<unsigned, 2> b);

float ex2_approx(float x);
float tanh_approx(float x);

}  // namespace emulator

#include "cuda_half.h"
#include "cuda_words.h"
