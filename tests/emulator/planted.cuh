// Kernels that do one small thing right, or with a mistake that the emulator must find.
#pragma once

#include "../../csrc/cuda/common.cuh"

namespace planted {

using namespace bmk;

enum Mistake {
  none,
  no_barrier,
  no_second_barrier,
  out_of_bounds,
  before_begin,
  divergent,
  exited,
  wrong_count,
  wrong_barrier,
  weak_wait,
  no_wait,
  wrong_parity,
  too_many_arrivals,
  not_initialised,
  wrong_bytes,
  no_fence,
  no_second_fence,
  no_proxy_fence,
  narrow_scope,
  leaves_early,
  relaxed,
  swapped,
  not_atomic,
  misaligned,
};

// ---- blocks and warps ----

// y = x in reverse, twice, through shared memory.
template <Mistake kMistake>
__global__ void reverse_twice(const float* x, float* y) {
  SHARED(float, tile, [64]);
  const int i = threadIdx.x;
  float value = x[i];
  for (int round = 0; round < 2; ++round) {
    tile[kMistake == out_of_bounds ? i + 1 : i] = value;
    if (kMistake != no_barrier && (kMistake != divergent || i < 32)) __syncthreads();
    value = tile[63 - i];
    if (kMistake != no_second_barrier) __syncthreads();
  }
  y[i] = value;
}

// The same through memory whose size is given at launch, and vectors of four.
template <Mistake kMistake>
__global__ void copy_vectors(const float* x, float* y) {
  float* tile = reinterpret_cast<float*>(dynamic_shared());
  const int i = 4 * threadIdx.x;
  const int from = kMistake == misaligned ? i + 1 : kMistake == before_begin ? i - 4 : kMistake == out_of_bounds ? i + 4 : i;
  store_vector(tile + i, load_vector<float, 4>(x + from));
  __syncwarp();
  store_vector(y + i, load_vector<float, 4>(tile + i));
}

// Each lane hands its value to its neighbour: through shared memory, then by a shuffle.
template <Mistake kMistake>
__global__ void rotate(const float* x, float* y) {
  SHARED(float, tile, [32]);
  const int lane = threadIdx.x;
  if (kMistake == exited && lane == 31) return;
  tile[lane] = x[lane];
  if (kMistake == no_barrier)
    static_cast<void>(warp_sum(0.0f));  // which orders no memory
  else if (kMistake != exited)
    __syncwarp();
  float value = tile[(lane + 1) % 32];
  if (kMistake == divergent && lane < 16)
    value += __shfl_xor_sync(kFullWarp, value, 1);
  else
    value = __shfl_sync(kFullWarp, value, (lane + 1) % 32);
  y[lane] = value;
}

// Half of the block's warps produce, the others consume; they meet at two named barriers.
template <Mistake kMistake>
__global__ void produce_consume(const float* x, float* y, int rounds) {
  SHARED(float, tile, [32]);
  const int lane = threadIdx.x % 32;
  constexpr int kFull = 1, kEmpty = 2, kOthers = kMistake == wrong_count ? 96 : 64;
  for (int round = 0; round < rounds; ++round) {
    if (threadIdx.x < 32) {
      if (round > 0 && kMistake != no_barrier) ptx::barrier_sync(kEmpty, 64);
      tile[lane] = x[round * 32 + lane];
      ptx::barrier_arrive(kMistake == wrong_barrier ? kEmpty : kFull, 64);
    } else {
      ptx::barrier_sync(kFull, kOthers);
      y[round * 32 + lane] = 2 * tile[31 - lane];
      if (round + 1 < rounds && kMistake != no_barrier) ptx::barrier_arrive(kEmpty, 64);
    }
  }
}

// One warp hands a value to another by a flag: the fences reach as far as the block, which is far enough.
template <Mistake kMistake>
__global__ void hand_over(const float* x, float* y) {
  SHARED(float, value);
  SHARED(int, flag);
  if (threadIdx.x == 0) flag = 0;
  __syncthreads();
  if (threadIdx.x == 0) {
    value = x[0];
    if (kMistake != no_fence) __threadfence_block();
    atomicExch(&flag, 1);
  } else if (threadIdx.x == 32) {
    while (atomicAdd(&flag, 0) == 0) continue;
    if (kMistake != no_second_fence) __threadfence_block();
    y[0] = value;
  }
}

template <Mistake kMistake>
__global__ void histogram(const int* bins, int* counts) {
  SHARED(int, count, [4]);
  if (threadIdx.x < 4) count[threadIdx.x] = 0;
  __syncthreads();
  if (kMistake == not_atomic)
    count[bins[threadIdx.x]] += 1;
  else
    atomicAdd(&count[bins[threadIdx.x]], 1);
  __syncthreads();
  if (threadIdx.x < 4) atomicAdd(&counts[threadIdx.x], count[threadIdx.x]);
}

// The order in which threads come to a counter.
__global__ inline void take_tickets(int* counter, int* tickets) { tickets[threadIdx.x] = atomicAdd(counter, 1); }

__global__ inline void give_up(int reason) {
  if (threadIdx.x == 5 && reason == 42) ptx::trap_with("reason 42");
}

struct Inner {
  float scale;
  int shift[2];
};
struct Parameters {
  const float* x;
  float* y;
  int64_t count;
  Inner inner;
};
__global__ inline void scale_and_shift(Parameters p, bool negate) {
  for (int64_t i = threadIdx.x; i < p.count; i += blockDim.x)
    p.y[i] = (negate ? -1.0f : 1.0f) * p.inner.scale * (p.x ? p.x[i] : 1.0f) + float(p.inner.shift[0] + p.inner.shift[1]);
}

template <typename T>
__global__ void convert(const float* x, T* rounded, float* back, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    rounded[i] = from_float<T>(x[i]);
    back[i] = to_float(rounded[i]);
  }
}

// ---- copies ----

// y = x, tile by tile of 4 floats for each thread, two tiles under way.
template <Mistake kMistake>
__global__ void pipeline(const float* x, float* y, int tiles) {
  SHARED(float, stage, [2][4 * 32]);
  const int i = 4 * threadIdx.x;
  const auto start = [&](int tile) {
    if (tile < tiles) ptx::cp_async<16>(&stage[tile % 2][i], x + tile * 128 + i);
    ptx::cp_async_commit();
  };
  start(0);
  for (int tile = 0; tile < tiles; ++tile) {
    start(tile + 1);
    if (kMistake == weak_wait)
      ptx::cp_async_wait<2>();
    else if (kMistake != no_wait)
      ptx::cp_async_wait<1>();
    if (kMistake != no_barrier) __syncthreads();
    for (int k = 0; k < 4; ++k) y[tile * 128 + i + k] = stage[tile % 2][127 - i - k];
    if (kMistake != no_second_barrier) __syncthreads();
  }
}

// The first n floats, and zeros behind them.
template <Mistake kMistake>
__global__ void copy_with_zeros(const float* x, float* y, int n) {
  float* tile = reinterpret_cast<float*>(dynamic_shared());
  const int i = 4 * threadIdx.x, valid = max(0, min(4, n - i));
  if (kMistake == misaligned)
    ptx::cp_async<16>(tile + i, x + 1);
  else if (kMistake == out_of_bounds)
    ptx::cp_async<16>(tile + i, x + i);
  else
    ptx::cp_async_zfill<16>(tile + i, x + i, 4 * valid);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  store_vector(y + i, load_vector<float, 4>(tile + i));
}

// y = 2 x in tiles of 128 floats: bulk copies in and out, two stages, an mbarrier for each.
template <Mistake kMistake>
__global__ void bulk_pipeline(const float* x, float* y, int tiles) {
  constexpr int kTile = 128, kBytes = kTile * sizeof(float);
  float* stages = reinterpret_cast<float*>(dynamic_shared());  // 2 in, 1 out
  float* out = stages + 2 * kTile;
  SHARED(uint64_t, full, [2]);
  if (threadIdx.x == 0 && kMistake != not_initialised)
    for (uint64_t& barrier : full) ptx::mbarrier_init(&barrier, 1);
  ptx::fence_mbarrier_init();
  if (kMistake != no_barrier) __syncthreads();
  const auto start = [&](int tile) {
    if (threadIdx.x != 0 || tile >= tiles) return;
    ptx::mbarrier_arrive_expect_tx(&full[tile % 2], kMistake == wrong_bytes ? kBytes + 16 : kBytes);
    if (kMistake == too_many_arrivals) ptx::mbarrier_arrive(&full[tile % 2]);
    ptx::cp_async_bulk_load(stages + tile % 2 * kTile, x + tile * kTile, kBytes, &full[tile % 2]);
  };
  start(0);
  for (int tile = 0; tile < tiles; ++tile) {
    start(tile + 1);
    const unsigned parity = kMistake == wrong_parity ? 0 : tile / 2 % 2;
    while (kMistake != no_wait && !ptx::mbarrier_try_wait(&full[tile % 2], parity)) continue;
    if (threadIdx.x == 0 && kMistake != weak_wait) ptx::cp_async_bulk_wait_read<0>();
    __syncthreads();
    for (int i = threadIdx.x; i < kTile; i += blockDim.x) out[i] = 2 * stages[tile % 2 * kTile + i];
    if (kMistake != no_proxy_fence) ptx::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) ptx::cp_async_bulk_store(y + tile * kTile, out, kBytes), ptx::cp_async_bulk_commit();
  }
  if (threadIdx.x == 0 && kMistake != leaves_early) ptx::cp_async_bulk_wait_read<0>();
}

// ---- clusters and grids ----

// Every block reads a float from its right neighbour in the cluster, through shared memory.
template <Mistake kMistake>
__global__ void read_neighbour(const float* x, float* y) {
  SHARED(float, mine, [32]);
  const int i = blockIdx.x * 32 + threadIdx.x;
  mine[threadIdx.x] = x[i];
  if (kMistake != no_barrier) ptx::cluster_arrive();
  if (kMistake != no_barrier && kMistake != no_wait) ptx::cluster_wait();
  y[i] = ptx::mapa(&mine[0], (ptx::cluster_rank() + 1) % ptx::cluster_size())[threadIdx.x];
  if (kMistake == leaves_early || kMistake == no_barrier || kMistake == no_wait) return;
  ptx::cluster_arrive();  // nobody leaves while others read its memory
  ptx::cluster_wait();
}

// Numbers go round a cluster, a block further in each step, and grow by one. By st.async:
template <Mistake kMistake>
__global__ void send_async(const unsigned* x, unsigned* y, int steps) {
  SHARED(unsigned, inbox, [2][32]);
  SHARED(uint64_t, arrived, [2]);
  const unsigned next = (ptx::cluster_rank() + 1) % ptx::cluster_size();
  const int i = threadIdx.x;
  if (i == 0)
    for (uint64_t& barrier : arrived) ptx::mbarrier_init(&barrier, 1);
  ptx::fence_mbarrier_init();
  ptx::cluster_arrive();
  ptx::cluster_wait();
  unsigned value = x[blockIdx.x * 32 + i];
  for (int step = 0; step < steps; ++step) {
    const int slot = step % 2;
    if (i == 0) ptx::mbarrier_arrive_expect_tx(&arrived[slot], kMistake == wrong_bytes ? 31 * 4 : 32 * 4);
    ptx::st_async(ptx::mapa(&inbox[slot][i], next), value + 1, ptx::mapa(&arrived[slot], next));
    while (!ptx::mbarrier_try_wait_cluster(&arrived[slot], step / 2 % 2)) continue;
    value = inbox[slot][i];
    ptx::cluster_arrive();  // the slot may be written again
    ptx::cluster_wait();
  }
  y[blockIdx.x * 32 + i] = value;
}

// By plain stores and an arrival at the neighbour's barrier, which the neighbour must wait for at the scope of the cluster.
template <Mistake kMistake>
__global__ void send_and_arrive(const unsigned* x, unsigned* y, int steps) {
  SHARED(unsigned, inbox, [32]);
  SHARED(uint64_t, arrived);
  const unsigned next = (ptx::cluster_rank() + 1) % ptx::cluster_size();
  const int i = threadIdx.x;
  if (i == 0) ptx::mbarrier_init(&arrived, 32);
  ptx::fence_mbarrier_init();
  ptx::cluster_arrive();
  ptx::cluster_wait();
  unsigned value = x[blockIdx.x * 32 + i];
  for (int step = 0; step < steps; ++step) {
    *ptx::mapa(&inbox[i], next) = value + 1;
    ptx::mbarrier_arrive_remote(ptx::mapa(&arrived, next));
    if (kMistake == narrow_scope) {
      while (!ptx::mbarrier_try_wait(&arrived, step % 2)) continue;
    } else {
      while (!ptx::mbarrier_try_wait_cluster(&arrived, step % 2)) continue;
    }
    value = inbox[i];
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  y[blockIdx.x * 32 + i] = value;
}

// Each block writes a partial sum; the last one to come adds them up.
template <Mistake kMistake>
__global__ void sum_in_last_block(const float* x, float* partial, unsigned* came, float* sum) {
  const float mine = warp_sum(x[blockIdx.x * 32 + threadIdx.x]);
  unsigned before = 0;
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = mine;
    if (kMistake == relaxed) {
      before = atomicAdd(came, 1u);
    } else if (kMistake == narrow_scope) {
      __threadfence_block();
      before = atomicAdd(came, 1u);
      __threadfence_block();
    } else if (kMistake == no_fence) {
      __threadfence();
      before = atomicAdd(came, 1u);
    } else if (blockIdx.x % 2) {  // two ways that mean the same
      __threadfence();
      before = atomicAdd(came, 1u);
      __threadfence();
    } else {
      before = ptx::atom_add_acq_rel_gpu(came, 1);
    }
    if (before + 1 == gridDim.x) {
      float total = 0;
      for (unsigned block = 0; block < gridDim.x; ++block) total += partial[block];
      *sum = total;
    }
  }
}

// Every block waits for every other.
__global__ inline void spin(unsigned* flags) {
  if (threadIdx.x == 0) ptx::st_release_gpu(&flags[blockIdx.x], 1u);
  if (threadIdx.x < gridDim.x)
    while (ptx::ld_acquire_gpu(&flags[threadIdx.x]) == 0) ptx::nanosleep(100);
}

// Waits for a word that nobody writes, by atomics that change nothing.
__global__ inline void spin_by_atomics(unsigned* word) {
  while (atomicCAS(word, 1u, 2u) != 1) continue;
}

// A number goes from block to block, in a word that carries it and the step; all blocks must be under way at once.
template <Mistake kMistake>
__global__ void relay(uint64_t* words, uint64_t* data, int rounds) {
  const unsigned block = blockIdx.x, blocks = gridDim.x, next = (block + 1) % blocks;
  for (unsigned round = 0; round < unsigned(rounds); ++round) {
    uint64_t word = 0;
    if (block > 0 || round > 0) {
      const unsigned expected = block > 0 ? round + 1 : round;
      do word = kMistake == relaxed ? ptx::ld_relaxed_gpu(&words[block]) : ptx::ld_acquire_gpu(&words[block]);
      while (word >> 32 != expected);
    }
    data[0] += 1;  // nobody else has the word
    const uint64_t passed = uint64_t{round + 1} << 32 | ((word & 0xffffffff) + 1);
    if (block + 1 < blocks || round + 1 < unsigned(rounds))
      ptx::st_release_gpu(&words[next], passed);
    else
      words[blocks] = passed & 0xffffffff;
  }
}

// ---- matrices ----

// d = a b for 16x8 = 16xK times Kx8; a is row-major, b is given by columns; fragments come by ldmatrix.
template <Mistake kMistake, typename T>
__global__ void multiply_k16(const T* a, const T* b, float* d) {
  SHARED(T, tile_a, [16][16]);
  SHARED(T, tile_b, [8][16]);
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) tile_a[i / 16][i % 16] = a[i];
  for (int i = lane; i < 128; i += 32) tile_b[i / 16][i % 16] = b[i];
  __syncwarp();
  unsigned ra[4], rb[2];
  ptx::ldmatrix_x4(ra, &tile_a[lane % 16][lane / 16 * 8]);
  ptx::ldmatrix_x2(rb, &tile_b[lane % 8][lane / 8 % 2 * 8]);
  if (kMistake == swapped) {
    const unsigned r = ra[1];
    ra[1] = ra[2];
    ra[2] = r;
  }
  float sum[4] = {};
  mma_m16n8k16<T>(sum, ra, rb[0], rb[1]);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

// The same for K = 8, with fragments gathered element by element.
template <typename T>
__global__ void multiply_k8(const float* a, const float* b, float* d) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  float sum[4] = {};
  if constexpr (std::is_same_v<T, float>) {
    const unsigned ra[4] = {ptx::cvt_rna_tf32(a[g * 8 + t]), ptx::cvt_rna_tf32(a[(g + 8) * 8 + t]), ptx::cvt_rna_tf32(a[g * 8 + t + 4]),
                            ptx::cvt_rna_tf32(a[(g + 8) * 8 + t + 4])};
    ptx::mma_m16n8k8_tf32(sum, ra, ptx::cvt_rna_tf32(b[g * 8 + t]), ptx::cvt_rna_tf32(b[g * 8 + t + 4]));
  } else {
    const unsigned ra[2] = {pack2<T>(a[g * 8 + 2 * t], a[g * 8 + 2 * t + 1]), pack2<T>(a[(g + 8) * 8 + 2 * t], a[(g + 8) * 8 + 2 * t + 1])};
    const unsigned rb = pack2<T>(b[g * 8 + 2 * t], b[g * 8 + 2 * t + 1]);
    if constexpr (std::is_same_v<T, __half>)
      ptx::mma_m16n8k8_f16(sum, ra, rb);
    else
      ptx::mma_m16n8k8_bf16(sum, ra, rb);
  }
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

// Four 8x8 matrices through registers: loaded straight or transposed, stored straight or transposed.
template <bool kTransposeIn, bool kTransposeOut>
__global__ void through_registers(const __half* x, __half* y) {
  SHARED(__half, in, [32][8]);
  SHARED(__half, out, [32][8]);
  const int lane = threadIdx.x;
  store_vector(in[lane], load_vector<__half, 8>(x + 8 * lane));
  __syncwarp();
  unsigned r[4];
  if (kTransposeIn)
    ptx::ldmatrix_x4_trans(r, in[lane]);
  else
    ptx::ldmatrix_x4(r, in[lane]);
  if (kTransposeOut)
    ptx::stmatrix_x4_trans(out[lane], r);
  else
    ptx::stmatrix_x4(out[lane], r);
  __syncwarp();
  store_vector(y + 8 * lane, load_vector<__half, 8>(out[lane]));
}

}  // namespace planted
