// The PTX instructions by which threads wait for each other: barriers, ordered memory accesses, clusters.
// Included by ptx.cuh; what is said at its top holds here.
#pragma once

#include "ptx.cuh"

namespace bmk::ptx {

// ---- named barriers of the block (9.7.13.1) ----
// Barrier 0 is __syncthreads. `threads` is a multiple of 32 and counts those that sync and those that arrive.

PTX void barrier_sync(int id, int threads) {
  ON_DEVICE(asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"));
  ON_EMULATOR(emulator::barrier_sync(id, threads));
}
PTX void barrier_arrive(int id, int threads) {
  ON_DEVICE(asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"));
  ON_EMULATOR(emulator::barrier_arrive(id, threads));
}

// ---- ordered accesses to global memory, in 4 or 8 bytes (9.7.9.8, 9.7.9.11) ----

template <typename T>
PTX T ld_acquire_gpu(const T* global) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "4 or 8 bytes");
  if constexpr (sizeof(T) == 4) {
    ON_DEVICE(unsigned v; asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(v) : "l"(global) : "memory");
              return __builtin_bit_cast(T, v));
  } else {
    ON_DEVICE(uint64_t v; asm volatile("ld.acquire.gpu.global.b64 %0, [%1];" : "=l"(v) : "l"(global) : "memory");
              return __builtin_bit_cast(T, v));
  }
  ON_EMULATOR(return emulator::load(global, emulator::Order::acquire, emulator::Scope::device));
}
template <typename T>
PTX T ld_relaxed_gpu(const T* global) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "4 or 8 bytes");
  if constexpr (sizeof(T) == 4) {
    ON_DEVICE(unsigned v; asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(v) : "l"(global) : "memory");
              return __builtin_bit_cast(T, v));
  } else {
    ON_DEVICE(uint64_t v; asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(v) : "l"(global) : "memory");
              return __builtin_bit_cast(T, v));
  }
  ON_EMULATOR(return emulator::load(global, emulator::Order::relaxed, emulator::Scope::device));
}
template <typename T>
PTX void st_release_gpu(T* global, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "4 or 8 bytes");
  if constexpr (sizeof(T) == 4) {
    ON_DEVICE(asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(global), "r"(__builtin_bit_cast(unsigned, value)) : "memory"));
  } else {
    ON_DEVICE(asm volatile("st.release.gpu.global.b64 [%0], %1;" ::"l"(global), "l"(__builtin_bit_cast(uint64_t, value)) : "memory"));
  }
  ON_EMULATOR(emulator::store(global, value, emulator::Order::release, emulator::Scope::device));
}
template <typename T>
PTX void st_relaxed_gpu(T* global, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "4 or 8 bytes");
  if constexpr (sizeof(T) == 4) {
    ON_DEVICE(asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(global), "r"(__builtin_bit_cast(unsigned, value)) : "memory"));
  } else {
    ON_DEVICE(asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(global), "l"(__builtin_bit_cast(uint64_t, value)) : "memory"));
  }
  ON_EMULATOR(emulator::store(global, value, emulator::Order::relaxed, emulator::Scope::device));
}
// 16 bytes that are read and written as one: a word whose data and flag arrive together.
PTX uint4 ld_relaxed_gpu_b128(const uint4* global) {
  ON_DEVICE(uint64_t low; uint64_t high;
            asm volatile("{ .reg .b128 v; ld.relaxed.gpu.global.b128 v, [%2]; mov.b128 {%0, %1}, v; }" : "=l"(low),
                         "=l"(high) : "l"(global) : "memory");
            return make_uint4(unsigned(low), unsigned(low >> 32), unsigned(high), unsigned(high >> 32)));
  ON_EMULATOR(return emulator::load(global, emulator::Order::relaxed, emulator::Scope::device));
}
PTX void st_relaxed_gpu_b128(uint4* global, uint4 value) {
  ON_DEVICE(asm volatile("{ .reg .b128 v; mov.b128 v, {%1, %2}; st.relaxed.gpu.global.b128 [%0], v; }" ::"l"(global),
                         "l"(uint64_t{value.y} << 32 | value.x), "l"(uint64_t{value.w} << 32 | value.z) : "memory"));
  ON_EMULATOR(emulator::store(global, value, emulator::Order::relaxed, emulator::Scope::device));
}
// Arrive at a counter (9.7.13.6), with or without learning how many came before.
PTX void red_add_release_gpu(unsigned* global, unsigned value) {
  ON_DEVICE(asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(global), "r"(value) : "memory"));
  ON_EMULATOR(emulator::fetch_add(global, value, emulator::Order::release, emulator::Scope::device));
}
PTX unsigned atom_add_acq_rel_gpu(unsigned* global, unsigned value) {
  ON_DEVICE(unsigned old; asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(global), "r"(value) : "memory");
            return old);
  ON_EMULATOR(return emulator::fetch_add(global, value, emulator::Order::acq_rel, emulator::Scope::device));
}
PTX void nanosleep(unsigned nanoseconds) {
  ON_DEVICE(asm volatile("nanosleep.u32 %0;" ::"r"(nanoseconds)));
  ON_EMULATOR(emulator::nanosleep(nanoseconds));
}

// ---- fences (9.7.13.4) ----

PTX void fence_acq_rel_gpu() {
  ON_DEVICE(asm volatile("fence.acq_rel.gpu;" :: : "memory"));
  ON_EMULATOR(emulator::fence(emulator::Scope::device));
}
PTX void fence_acq_rel_cluster() {
  ON_SM90(asm volatile("fence.acq_rel.cluster;" :: : "memory"));
  ON_EMULATOR(emulator::fence(emulator::Scope::cluster));
}
// Before other blocks of the cluster use an mbarrier that was just initialised.
PTX void fence_mbarrier_init() {
  ON_SM90(asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory"));
  ON_EMULATOR(emulator::fence(emulator::Scope::cluster));
}
// Between ordinary writes to shared memory and a bulk copy that reads them.
PTX void fence_proxy_async() {
  ON_SM90(asm volatile("fence.proxy.async.shared::cta;" :: : "memory"));
  ON_EMULATOR(emulator::fence_proxy_async());
}

// ---- mbarriers in shared memory (9.7.13.15) ----
// A phase ends when `count` arrivals and all expected bytes have come. Waiting names the parity of the phase: 0 for the first.

PTX void mbarrier_init(uint64_t* shared, unsigned count) {
  ON_DEVICE(asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(shared)), "r"(count) : "memory"));
  ON_EMULATOR(emulator::mbarrier_init(shared, count));
}
PTX void mbarrier_arrive(uint64_t* shared) {
  ON_DEVICE(asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(shared)) : "memory"));
  ON_EMULATOR(emulator::mbarrier_arrive(shared, 0, emulator::Scope::block));
}
// One arrival, and `bytes` more to wait for in this phase.
PTX void mbarrier_arrive_expect_tx(uint64_t* shared, unsigned bytes) {
  ON_SM90(asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(shared)), "r"(bytes) : "memory"));
  ON_EMULATOR(emulator::mbarrier_arrive(shared, bytes, emulator::Scope::block));
}
// One arrival at another block's barrier.
PTX void mbarrier_arrive_remote(uint64_t* remote) {
  ON_SM90(asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(shared_address(remote)) : "memory"));
  ON_EMULATOR(emulator::mbarrier_arrive(remote, 0, emulator::Scope::cluster));
}
// Whether the phase of this parity is over; looks once.
PTX bool mbarrier_test_wait(uint64_t* shared, unsigned parity) {
  ON_DEVICE(unsigned done; asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }" : "=r"(
                                            done) : "r"(shared_address(shared)),
                                        "r"(parity) : "memory");
            return done != 0);
  ON_EMULATOR(return emulator::mbarrier_wait(shared, parity, emulator::Scope::block, false));
}
// The same, and may sleep for a while. The second form also sees what other blocks of the cluster wrote before arriving.
PTX bool mbarrier_try_wait(uint64_t* shared, unsigned parity) {
  ON_SM90(unsigned done;
          asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(
                           shared_address(shared)),
                       "r"(parity) : "memory");
          return done != 0);
  ON_EMULATOR(return emulator::mbarrier_wait(shared, parity, emulator::Scope::block, true));
}
PTX bool mbarrier_try_wait_cluster(uint64_t* shared, unsigned parity) {
  ON_SM90(unsigned done; asm volatile(
              "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }" : "=r"(
                  done) : "r"(shared_address(shared)),
              "r"(parity) : "memory");
          return done != 0);
  ON_EMULATOR(return emulator::mbarrier_wait(shared, parity, emulator::Scope::cluster, true));
}

// ---- clusters (9.7.13.3, 10.3) ----

PTX unsigned cluster_rank() {
  ON_SM90(unsigned r; asm volatile("mov.u32 %0, %cluster_ctarank;" : "=r"(r)); return r);
  ON_EMULATOR(return emulator::cluster_rank());
}
PTX unsigned cluster_size() {
  ON_SM90(unsigned n; asm volatile("mov.u32 %0, %cluster_nctarank;" : "=r"(n)); return n);
  ON_EMULATOR(return emulator::cluster_size());
}
// Every thread of the cluster arrives and waits; all of a warp together.
PTX void cluster_arrive() {
  ON_SM90(asm volatile("barrier.cluster.arrive.release.aligned;" :: : "memory"));
  ON_EMULATOR(emulator::cluster_arrive());
}
PTX void cluster_wait() {
  ON_SM90(asm volatile("barrier.cluster.wait.acquire.aligned;" :: : "memory"));
  ON_EMULATOR(emulator::cluster_wait());
}
// The address, in block `rank` of the cluster, of what lies at `shared` in this one (9.7.9.23). Read and write through it as usual.
template <typename T>
PTX T* mapa(T* shared, unsigned rank) {
  ON_SM90(T * remote; asm volatile("mapa.u64 %0, %1, %2;" : "=l"(remote) : "l"(shared), "r"(rank)); return remote);
  ON_EMULATOR(return static_cast<T*>(const_cast<void*>(emulator::mapa(shared, rank))));
}
// Writes into another block's shared memory, and counts the bytes at that block's barrier (9.7.9.12).
PTX void st_async(unsigned* remote, unsigned value, uint64_t* remote_barrier) {
  ON_SM90(asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(shared_address(remote)),
                       "r"(value), "r"(shared_address(remote_barrier)) : "memory"));
  ON_EMULATOR(emulator::st_async(remote, &value, sizeof(value), remote_barrier));
}
PTX void st_async(uint4* remote, uint4 value, uint64_t* remote_barrier) {
  ON_SM90(asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(shared_address(remote)),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(shared_address(remote_barrier)) : "memory"));
  ON_EMULATOR(emulator::st_async(remote, &value, sizeof(value), remote_barrier));
}

// ---- bulk copies (9.7.9.25.4): addresses and sizes are multiples of 16 bytes ----

PTX void cp_async_bulk_load(void* shared, const void* global, unsigned bytes, uint64_t* barrier) {
  ON_SM90(
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(shared)),
                   "l"(global), "r"(bytes), "r"(shared_address(barrier)) : "memory"));
  ON_EMULATOR(emulator::bulk_copy(shared, global, bytes, barrier));
}
PTX void cp_async_bulk_remote(void* remote, const void* shared, unsigned bytes, uint64_t* remote_barrier) {
  ON_SM90(asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(remote)),
      "r"(shared_address(shared)), "r"(bytes), "r"(shared_address(remote_barrier)) : "memory"));
  ON_EMULATOR(emulator::bulk_copy(remote, shared, bytes, remote_barrier));
}
PTX void cp_async_bulk_store(void* global, const void* shared, unsigned bytes) {
  ON_SM90(asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared_address(shared)),
                       "r"(bytes) : "memory"));
  ON_EMULATOR(emulator::bulk_store(global, shared, bytes));
}
PTX void cp_async_bulk_commit() {
  ON_SM90(asm volatile("cp.async.bulk.commit_group;" :: : "memory"));
  ON_EMULATOR(emulator::bulk_commit());
}
// Waits until at most Pending groups still read their shared memory.
template <int Pending>
PTX void cp_async_bulk_wait_read() {
  ON_SM90(asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory"));
  ON_EMULATOR(emulator::bulk_wait(Pending));
}

}  // namespace bmk::ptx
