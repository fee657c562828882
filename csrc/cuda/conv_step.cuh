// One time step of a causal convolution that streams, in one launch: taps from the ring, activation or gate, residual and skip sums,
// the new input into the ring, and the position moved on, which is read and written on the device alone.
//
//     z = weight window + bias        a = activation(z), or tanh(z_i) sigmoid(z_(D + i))
//     y = a, or x_t + W_out a + b_out        skip = skip_sum + W_skip a + b_skip
//
// Grid: (shares of the D values of a, groups of kSequences sequences). A block makes its share of a, a warp up to kStepValues values at a
// time, and then what that share adds to every sum of y and skip, from its columns of W_out and W_skip, a thread to a row. So every
// weight is read once for a group, by all blocks at the same time, and no block waits for the whole of a or for another block to run.
// The block of a group that takes the last ticket adds up what the others left, in their order: the same bits in every run. By then
// all have read the ring, so it also writes x into it; the last of all groups moves the position on. A single block needs no ticket.
// Numbers are rounded to T only where they leave: a, z and all sums are float32.
// Refuses: windows larger than shared memory (the launcher's check). Offsets of weights and states are int64.
// Floor: the weights, 2 C K + C + S numbers for each of D values, once through L2, which holds them from step to step; below some
// 100 KB that is less than the launch.
#pragma once

#include "conv_epilogue.cuh"

namespace bmk {

constexpr int kStepThreads = 512;
constexpr int kStepValues = 2;  // of a warp at a time, so that the loads of four rows are under way with a gate; with 4 it spilled

template <class T>
struct ConvStep {
  const T* x;  // [N, C], with the strides of its rows and columns
  int64_t x_row, x_column;
  T* ring;               // [N, L, C], L = dilation * (K - 1): the inputs so far, that of step t at t mod L
  int64_t* position;     // t
  const T* weight;       // [rows, C / groups, K]
  const T* bias;         // [rows], null where there is none, as for all that follow
  const T* out_weight;   // [C, D]
  const T* out_bias;     // [C]
  const T* skip_weight;  // [S, D]
  const T* skip_bias;    // [S]
  const T* skip_sum;     // [N, S]
  T* y;                  // [N, C] with out_weight, else [N, D]
  T* skip;               // [N, S]
  float* partial;        // [groups of sequences, blocks, kSequences, C + S], for several blocks
  unsigned* tickets;     // [groups of sequences + 1], zero before and after, for several blocks or groups
  int batch, channels, rows, kernel, dilation, groups;
  int out, skips;  // C, or 0 without out_weight; S, or 0
  int share;       // values of a block
  bool gated;      // tanh(first half of the rows) * sigmoid(second half), in the place of the activation
  Activation activation;
  float slope;

  __host__ __device__ int values() const { return gated ? rows / 2 : rows; }   // D
  __host__ __device__ int depth() const { return channels / groups * kernel; }  // of a row of the weight
  __host__ __device__ int windows() const { return gated && groups > 1 ? 2 : 1; }
  // The most channels that the rows of a block's share read.
  __host__ __device__ int span() const {
    const int rows_of_group = rows / groups, reached = (share - 1) / (rows_of_group > 0 ? rows_of_group : 1) + 2;
    return channels / groups * (reached < groups ? reached : groups);
  }
  // In dynamic shared memory: values of a, then the inputs that a block sees.
  __host__ __device__ int64_t window_at(int sequences) const { return round_up<int64_t>(int64_t{4} * share * sequences, 16); }
  __host__ __device__ int64_t shared_bytes(int sequences) const {
    return window_at(sequences) + int64_t{windows()} * sequences * span() * kernel * static_cast<int>(sizeof(T));
  }

  __device__ __forceinline__ int first_channel(int row) const { return row / (rows / groups) * (channels / groups); }
  // The slot of the ring for a step; of the sign that % has in mathematics.
  __device__ __forceinline__ int64_t slot(int64_t step) const {
    const int64_t length = int64_t{dilation} * (kernel - 1), rest = step % length;
    return rest < 0 ? rest + length : rest;
  }
};

// sum[u][h] += row (first + u stride + h D) times the inputs it sees, for the values u < count and the halves h of a gate.
template <int N, int kSequences, class T>
__device__ __forceinline__ void multiply_rows(float (&sum)[kStepValues][2][kSequences], const ConvStep<T>& p, int first,
                                              int stride, int count, const T* windows, int first_value) {
  const int depth = p.depth(), span = p.span() * p.kernel, halves = p.gated ? 2 : 1;
  const auto row_of = [&](int u, int h) { return first + u * stride + h * p.values(); };
  const auto window_of = [&](int u, int h) {
    if (p.groups == 1) return windows;
    const int behind = p.first_channel(row_of(u, h)) - p.first_channel(first_value + h * p.values());
    return windows + h * kSequences * span + behind * p.kernel;
  };
  for (int k = threadIdx.x % kWarpSize * N; k < depth; k += kWarpSize * N) {
    Vector<T, N> w[kStepValues][2], x[kSequences];
#pragma unroll
    for (int u = 0; u < kStepValues; ++u)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (u < count && h < halves) w[u][h] = load_vector<T, N>(p.weight + int64_t{row_of(u, h)} * depth + k);
#pragma unroll
    for (int u = 0; u < kStepValues; ++u)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (u >= count || h >= halves) continue;
        if ((u == 0 && h == 0) || p.groups > 1)
#pragma unroll
          for (int n = 0; n < kSequences; ++n) x[n] = load_vector<T, N>(window_of(u, h) + n * span + k);
#pragma unroll
        for (int n = 0; n < kSequences; ++n)
#pragma unroll
          for (int i = 0; i < N; ++i) sum[u][h][n] += to_float(w[u][h][i]) * to_float(x[n][i]);
      }
  }
}

// sum[n] += row times the values of a of sequence n.
template <int N, int kSequences, class T>
__device__ __forceinline__ void multiply_columns(float (&sum)[kSequences], const T* row, const float* values, int count) {
#pragma unroll 4
  for (int v = 0; v < count; v += N) {
    const auto w = load_vector<T, N>(row + v);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const auto a = load_vector<float, kSequences>(values + (v + i) * kSequences);
#pragma unroll
      for (int n = 0; n < kSequences; ++n) sum[n] += to_float(w[i]) * a[n];
    }
  }
}

template <class T, int kSequences>
__global__ void __launch_bounds__(kStepThreads) conv_step(const __grid_constant__ ConvStep<T> p) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, warps = blockDim.x / kWarpSize;
  const int first_sequence = blockIdx.y * kSequences, sequences = min(kSequences, p.batch - first_sequence);
  const int first_value = blockIdx.x * p.share, values = min(p.share, p.values() - first_value), sums = p.out + p.skips;
  const int64_t position = *p.position;

  // The inputs that the block's rows see, as a row of the weight has them: [C][K].
  float* const a = reinterpret_cast<float*>(dynamic_shared());  // [share, kSequences]
  T* const windows = reinterpret_cast<T*>(dynamic_shared() + p.window_at(kSequences));
  const auto x_of = [&](int n, int c) { return p.x[(first_sequence + n) * p.x_row + c * p.x_column]; };
  const auto ring_of = [&](int n, int64_t slot) {
    return p.ring + ((first_sequence + n) * int64_t{p.dilation} * (p.kernel - 1) + slot) * p.channels;
  };
  for (int h = 0; h < p.windows() && values > 0; ++h) {
    const int first_row = first_value + h * p.values(), first_channel = p.first_channel(first_row);
    const int channels = p.first_channel(first_row + values - 1) + p.channels / p.groups - first_channel;
    for (int k = 0; k < p.kernel; ++k) {
      const int64_t slot = k + 1 < p.kernel ? p.slot(position + k * p.dilation) : 0;
      for (int i = threadIdx.x; i < kSequences * channels; i += blockDim.x) {
        const int n = i / channels, c = i % channels;
        T value = from_float<T>(0.0f);
        if (n < sequences) value = k + 1 < p.kernel ? ring_of(n, slot)[first_channel + c] : x_of(n, first_channel + c);
        windows[((h * kSequences + n) * p.span() + c) * p.kernel + k] = value;
      }
    }
  }
  __syncthreads();

  constexpr int kVector = kVectorSize<T>;
  const auto is_aligned = [](const T* t) { return reinterpret_cast<uintptr_t>(t) % 16 == 0; };
  const bool in_vectors = is_aligned(p.weight) && p.depth() % kVector == 0;
  for (int v = warp; v < values; v += warps * kStepValues) {
    const int first = first_value + v, count = min(kStepValues, ceil_div(values - v, warps));
    float sum[kStepValues][2][kSequences] = {};
    if (in_vectors)
      multiply_rows<kVector, kSequences>(sum, p, first, warps, count, windows, first_value);
    else
      multiply_rows<1, kSequences>(sum, p, first, warps, count, windows, first_value);
    float z = 0, gate = 0;  // of one value and sequence for each of the first lanes
#pragma unroll
    for (int u = 0; u < kStepValues; ++u)
#pragma unroll
      for (int n = 0; n < kSequences; ++n) {
        const float found = warp_sum(sum[u][0][n]), second = warp_sum(sum[u][1][n]);
        if (lane == u * kSequences + n) z = found, gate = second;
      }
    const int u = lane / kSequences, n = lane % kSequences, value = first + u * warps;
    if (u < count) {
      if (p.bias) z += to_float(p.bias[value]), gate += p.gated ? to_float(p.bias[value + p.values()]) : 0.0f;
      const float found = p.gated ? tanhf(z) / (1.0f + expf(-gate)) : activate(z, p.activation, p.slope);
      a[(v + u * warps) * kSequences + n] = found;
      if (!p.out_weight && n < sequences) p.y[int64_t{first_sequence + n} * p.values() + value] = from_float<T>(found);
    }
  }
  __syncthreads();

  const auto finish = [&](int n, int j, float sum) {
    const bool is_out = j < p.out;
    const int column = is_out ? j : j - p.out;
    const int64_t at = int64_t{first_sequence + n} * (is_out ? p.out : p.skips) + column;
    if (const T* bias = is_out ? p.out_bias : p.skip_bias) sum += to_float(bias[column]);
    if (is_out)
      sum += to_float(x_of(n, column));
    else if (p.skip_sum)
      sum += to_float(p.skip_sum[at]);
    (is_out ? p.y : p.skip)[at] = from_float<T>(sum);
  };
  float* const partial = p.partial + (int64_t{blockIdx.y} * gridDim.x) * kSequences * sums;
  const bool columns_in_vectors =
      p.values() % kVector == 0 && p.share % kVector == 0 && is_aligned(p.out_weight) && is_aligned(p.skip_weight);
  for (int j = threadIdx.x; j < sums; j += blockDim.x) {
    const T* row = (j < p.out ? p.out_weight + int64_t{j} * p.values() : p.skip_weight + int64_t{j - p.out} * p.values()) + first_value;
    float sum[kSequences] = {};
    if (columns_in_vectors)
      multiply_columns<kVector, kSequences>(sum, row, a, values);
    else
      multiply_columns<1, kSequences>(sum, row, a, values);
#pragma unroll
    for (int n = 0; n < kSequences; ++n) {
      if (gridDim.x > 1)
        partial[(int64_t{blockIdx.x} * kSequences + n) * sums + j] = sum[n];
      else if (n < sequences)
        finish(n, j, sum[n]);
    }
  }

  SHARED(bool, is_last, [1]);
  const auto takes_last = [](unsigned* tickets, unsigned holders) {
    if (holders == 1) return true;
    const bool last = ptx::atom_add_acq_rel_gpu(tickets, 1) == holders - 1;
    if (last) *tickets = 0;
    return last;
  };
  if (gridDim.x > 1) {
    __syncthreads();
    if (threadIdx.x == 0) is_last[0] = takes_last(&p.tickets[blockIdx.y], gridDim.x);
    __syncthreads();
    if (!is_last[0]) return;
    for (int i = threadIdx.x; i < sequences * sums; i += blockDim.x) {
      float sum = 0;
      for (int block = 0; block < static_cast<int>(gridDim.x); ++block) sum += partial[int64_t{block} * kSequences * sums + i];
      finish(i / sums, i % sums, sum);
    }
  }
  if (p.kernel > 1) {
    const int64_t slot = p.slot(position);
    for (int i = threadIdx.x; i < sequences * p.channels; i += blockDim.x) {
      const int n = i / p.channels, c = i % p.channels;
      ring_of(n, slot)[c] = x_of(n, c);
    }
  }
  if (threadIdx.x == 0 && takes_last(&p.tickets[gridDim.y], gridDim.y)) *p.position = position + 1;
}

}  // namespace bmk
