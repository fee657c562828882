// Kernels with a mistake each, which the emulator must find, and the same kernels without it, which it must let pass.
#pragma once

#include "../../csrc/cuda/common.cuh"

namespace planted {

using namespace bmk;

// y[i] = x[n - 1 - i], through shared memory.
template <bool kRight>
__global__ void reverse(const float* x, float* y) {
  SHARED(float, tile, [64]);
  tile[threadIdx.x] = x[threadIdx.x];
  if (kRight) __syncthreads();
  y[threadIdx.x] = tile[63 - threadIdx.x];
}

}  // namespace planted
