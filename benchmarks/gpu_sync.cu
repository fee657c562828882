// How long blocks take to hand each other a word: what a step of a recurrence that is spread over a GPU pays at least.
//
// Prints nanoseconds per exchange, the median over launches: a grid barrier by an atomic counter, words with their number beside them
// through L2 (what scope grid of csrc/cuda/lstm_exchange.cuh does), and a cluster barrier with remote stores (scope cluster).
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../csrc/cuda/common.cuh"

namespace {

using namespace bmk;

constexpr int kSteps = 1000, kLaunches = 20, kThreads = 128;

#define CHECK(call)                                                              \
  do {                                                                           \
    const cudaError_t status = call;                                             \
    if (status != cudaSuccess) {                                                 \
      std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(status));       \
      std::exit(1);                                                              \
    }                                                                            \
  } while (0)

__global__ void grid_barrier(unsigned* counter, unsigned long long*) {
  for (unsigned step = 1; step <= kSteps; ++step) {
    __syncthreads();
    if (threadIdx.x == 0) {
      ptx::red_add_release_gpu(counter, 1);
      while (ptx::ld_acquire_gpu(counter) < step * gridDim.x) {
      }
    }
    __syncthreads();
  }
}

// Every block sends a word per thread and reads those of all blocks.
__global__ void words_through_l2(unsigned*, unsigned long long* words) {
  for (unsigned step = 1; step <= kSteps; ++step) {
    unsigned long long* slot = words + step % 2 * gridDim.x * kThreads;
    ptx::st_relaxed_gpu(&slot[blockIdx.x * kThreads + threadIdx.x], static_cast<unsigned long long>(step) << 32);
    for (unsigned block = 0; block < gridDim.x; ++block)
      while (ptx::ld_relaxed_gpu(&slot[block * kThreads + threadIdx.x]) >> 32 != step) {
      }
    __syncthreads();
  }
}

__global__ void cluster_barrier(unsigned*, unsigned long long* words) {
  SHARED(unsigned, received, [2][16][kThreads]);
  unsigned sum = 0;
  ptx::cluster_arrive();
  ptx::cluster_wait();
  for (unsigned step = 1; step <= kSteps; ++step) {
    for (unsigned rank = 0; rank < ptx::cluster_size(); ++rank)
      *ptx::mapa(&received[step % 2][ptx::cluster_rank()][threadIdx.x], rank) = step;
    ptx::cluster_arrive();
    ptx::cluster_wait();
    for (unsigned rank = 0; rank < ptx::cluster_size(); ++rank) sum += received[step % 2][rank][threadIdx.x];
  }
  if (sum == 0) words[0] = 1;
}

using Kernel = void (*)(unsigned*, unsigned long long*);

void measure(const char* name, Kernel kernel, int blocks, cudaLaunchAttribute attribute) {
  unsigned* counter;
  unsigned long long* words;
  const size_t bytes = 2 * blocks * kThreads * sizeof(unsigned long long);
  CHECK(cudaMalloc(&counter, sizeof(unsigned)));
  CHECK(cudaMalloc(&words, bytes));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.attrs = &attribute;
  config.numAttrs = 1;
  cudaEvent_t start, end;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < kLaunches; ++i) {
    CHECK(cudaMemset(counter, 0, sizeof(unsigned)));
    CHECK(cudaMemset(words, 0, bytes));
    CHECK(cudaEventRecord(start));
    CHECK(cudaLaunchKernelEx(&config, kernel, counter, words));
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    float milliseconds;
    CHECK(cudaEventElapsedTime(&milliseconds, start, end));
    times.push_back(milliseconds * 1e6f / kSteps);
  }
  std::sort(times.begin(), times.end());
  std::printf("{\"what\": \"%s\", \"blocks\": %d, \"ns\": %.0f}\n", name, blocks, times[kLaunches / 2]);
  CHECK(cudaFree(counter));
  CHECK(cudaFree(words));
}

}  // namespace

int main() {
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  cudaLaunchAttribute together{}, cluster{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cluster.id = cudaLaunchAttributeClusterDimension;
  for (int blocks : {4, 8, 16, 32, 64, device.multiProcessorCount}) {
    measure("grid barrier", grid_barrier, blocks, together);
    measure("words through L2", words_through_l2, blocks, together);
  }
  if (device.major == 9)
    for (unsigned blocks : {2, 4, 8}) {
      cluster.val.clusterDim = {blocks, 1, 1};
      measure("cluster barrier", cluster_barrier, static_cast<int>(blocks), cluster);
    }
}
