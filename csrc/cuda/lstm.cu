// Native ops lstm_sequence_fwd and lstm_sequence_bwd: checks, launch and registration of lstm_forward.cuh and lstm_backward.cuh.
// Which kernel, with how many warps, is the caller's plan (ops/lstm/cuda_plan.py); what it needs of the GPU is asked for here.
#include "host.h"
#include "lstm_backward.cuh"
#include "lstm_forward.cuh"

namespace bmk {

namespace {

// What a launch needs to know about the plan.
struct Plan {
  Scope scope;
  int registers;
  LstmPlan sizes;

  int blocks(int64_t hidden) const { return static_cast<int>(ceil_div<int64_t>(hidden, sizes.units)); }
};

Scope parse_scope(const std::string& name) {
  static const char* const kNames[] = {"block", "cluster", "grid", "streamed"};
  for (int i = 0; i < 4; ++i)
    if (name == kNames[i]) return static_cast<Scope>(i);
  STD_TORCH_CHECK(false, "scope: unknown name ", name);
}

// Launches `kernel` for all groups of rows; in scopes grid and streamed as many at once as are sure to run at the same time.
template <class Parameters>
void launch(void (*kernel)(Parameters), Parameters p, const Plan& plan, int directions, cudaStream_t stream) {
  const int shared_bytes = plan.sizes.shared_bytes, threads = plan.sizes.threads;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), "lstm: shared memory");
  const int blocks = plan.blocks(p.shape.hidden);
  int together = p.shape.groups;
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  config.attrs = &attribute;
  if (plan.scope == Scope::cluster) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
    config.numAttrs = 1;
    config.gridDim = dim3(blocks);
    int clusters = 0;
    check_cuda(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "lstm: clusters");
    STD_TORCH_CHECK(clusters > 0, "lstm: the GPU has no room for a cluster of ", blocks, " blocks");
  } else if (goes_through_l2(plan.scope)) {
    attribute.id = cudaLaunchAttributeCooperative;  // all blocks run at the same time, or the launch fails
    attribute.val.cooperative = 1;
    config.numAttrs = 1;
    int device = 0, multiprocessors = 0, per_multiprocessor = 0;
    check_cuda(cudaGetDevice(&device), "lstm");
    check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "lstm");
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, threads, shared_bytes), "lstm: occupancy");
    together = std::min(together, multiprocessors * per_multiprocessor / (blocks * directions));
    STD_TORCH_CHECK(together > 0, "lstm: ", blocks * directions, " blocks must run at the same time, the GPU has room for ",
                    multiprocessors * per_multiprocessor);
  }
  constexpr int kMostGroups = 65535;  // of a grid's second dimension
  together = std::min(together, kMostGroups);
  for (int first = 0; first < p.shape.groups; first += together) {
    p.shape.first_group = first;
    config.gridDim = dim3(blocks, std::min(together, p.shape.groups - first), directions);
    check_cuda(cudaLaunchKernelEx(&config, kernel, p), "lstm");
  }
}

void check_block(const Plan& plan, int64_t hidden) {
  STD_TORCH_CHECK(plan.scope != Scope::block || plan.blocks(hidden) == 1, "lstm: ", plan.sizes.threads, " threads do not fit ", hidden,
                  " units");
}

LstmSteps steps_of(const Tensor& h, int64_t tokens, int64_t steps, const std::optional<Tensor>& firsts,
                   const std::optional<Tensor>& lengths) {
  const int64_t batch = h.size(1), hidden = h.size(2);
  STD_TORCH_CHECK(tokens < (int64_t{1} << 31) && steps < (int64_t{1} << 31) && batch < (1 << 20) && hidden < (1 << 14),
                  "lstm: too many tokens, rows or units: ", tokens, ", ", batch, ", ", hidden);
  STD_TORCH_CHECK(firsts.has_value() == lengths.has_value(), "firsts and lengths must be given both or neither");
  STD_TORCH_CHECK(firsts.has_value() || tokens == steps * batch, "lstm: ", tokens, " tokens are not ", steps, " steps of ", batch);
  if (firsts) {
    check_tensor(*firsts, {steps}, ScalarType::Long, "firsts");
    check_tensor(*lengths, {batch}, ScalarType::Long, "lengths");
  }
  const int groups = static_cast<int>(ceil_div<int64_t>(batch, kColumns));
  return {tokens,
          static_cast<int>(batch),
          static_cast<int>(hidden),
          static_cast<int>(steps),
          data<int64_t>(firsts),
          data<int64_t>(lengths),
          nullptr,
          nullptr,
          0,
          groups,
          0};
}

// The words of scopes grid and streamed: [directions, groups, 2, words], zero.
template <class T>
std::optional<Tensor> words_for(const Plan& plan, const LstmSteps& shape, int64_t directions, const Tensor& like) {
  if (!goes_through_l2(plan.scope)) return std::nullopt;
  return torch::stable::new_zeros(like, {directions, shape.groups, 2, plan.sizes.depth_tiles * Words<T>::kPerTile}, ScalarType::Long);
}

// The weights of scope streamed, laid out by `kernel`, on the stream of what follows.
template <class T>
std::optional<Tensor> streamed_for(void (*kernel)(LstmStream<T>), const Plan& plan, LstmSteps& shape, const Tensor& w_hh,
                                   cudaStream_t stream) {
  if (plan.scope != Scope::streamed) return std::nullopt;
  const int64_t directions = w_hh.size(0), blocks = plan.blocks(shape.hidden), rest = plan.sizes.depth_tiles - plan.registers;
  Tensor tiles = torch::stable::new_empty(w_hh, {directions * blocks * plan.sizes.streamed_bytes}, ScalarType::Byte);
  shape.streamed = reinterpret_cast<const uint4*>(tiles.mutable_data_ptr());
  if (rest > 0) {
    const LstmStream<T> p{data<T>(w_hh), reinterpret_cast<uint4*>(tiles.mutable_data_ptr()), shape.hidden, plan.registers};
    kernel<<<dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(rest), static_cast<unsigned>(directions)), plan.sizes.threads, 0,
             stream>>>(p);
    check_cuda(cudaGetLastError(), "lstm: streamed weights");
  }
  return tiles;
}

template <class T, template <class> class Parameters>
using Kernel = void (*)(Parameters<T>);

// The kernels that there are, by scope and by how many tiles of the depth they keep in registers.
template <class T, int... Registers>
Kernel<T, LstmForward> forward_kernel(const Plan& plan) {
  constexpr int kShared = sizeof(T) == 4 ? 8 : 16;
  Kernel<T, LstmForward> found = nullptr;
  if (plan.scope == Scope::block) ((plan.registers == Registers ? void(found = lstm_forward<T, Scope::block, Registers>) : void()), ...);
  if (plan.scope == Scope::cluster && plan.registers == kShared) found = lstm_forward<T, Scope::cluster, kShared>;
  if (plan.scope == Scope::grid && plan.registers == kShared) found = lstm_forward<T, Scope::grid, kShared>;
  if (plan.scope == Scope::streamed && plan.registers == 8) found = lstm_forward<T, Scope::streamed, 8>;
  STD_TORCH_CHECK(found, "lstm_sequence_fwd: no kernel keeps ", plan.registers, " tiles in registers in this scope");
  return found;
}

template <class T, int... Registers>
Kernel<T, LstmBackward> backward_kernel(const Plan& plan) {
  constexpr int kShared = sizeof(T) == 4 ? 16 : 24;
  Kernel<T, LstmBackward> found = nullptr;
  if (plan.scope == Scope::block) ((plan.registers == Registers ? void(found = lstm_backward<T, Scope::block, Registers>) : void()), ...);
  if (plan.scope == Scope::cluster && plan.registers == kShared) found = lstm_backward<T, Scope::cluster, kShared>;
  if (plan.scope == Scope::grid && plan.registers == kShared) found = lstm_backward<T, Scope::grid, kShared>;
  if (plan.scope == Scope::streamed && plan.registers == 8) found = lstm_backward<T, Scope::streamed, 8>;
  STD_TORCH_CHECK(found, "lstm_sequence_bwd: no kernel keeps ", plan.registers, " tiles in registers in this scope");
  return found;
}

template <class T>
Kernel<T, LstmForward> forward_kernel_of(const Plan& plan) {
  if constexpr (sizeof(T) == 4)
    return forward_kernel<T, 2, 4>(plan);
  else
    return forward_kernel<T, 2, 4, 8>(plan);
}
template <class T>
Kernel<T, LstmBackward> backward_kernel_of(const Plan& plan) {
  if constexpr (sizeof(T) == 4)
    return backward_kernel<T, 8, 16>(plan);
  else
    return backward_kernel<T, 8, 16, 24>(plan);
}

// Runs `run` with a number of the type that the kernels take: float32 is Tf32 where `tf32` allows it.
template <class Run>
void dispatch(ScalarType dtype, bool tf32, const Run& run) {
  if (tf32 && dtype == ScalarType::Float) return run(Tf32{});
  DISPATCH_CUDA(dtype, "lstm", [&] { run(scalar_t{}); });
}

}  // namespace

// Writes output, h_n, and, where they are given, gates and cells; c holds the initial states and on return the final ones.
void lstm_sequence_fwd(const Tensor& from_input, const Tensor& w_hh, const Tensor& bias, const Tensor& h0,
                       const std::optional<Tensor>& firsts, const std::optional<Tensor>& lengths, int64_t steps, Tensor output, Tensor h_n,
                       Tensor c, std::optional<Tensor> gates, std::optional<Tensor> cells, const Text& scope, int64_t registers,
                       int64_t warps, bool tf32) {
  CHECK_DIM(h0, 3);
  CHECK_DIM(from_input, 3);
  const int64_t directions = h0.size(0), batch = h0.size(1), hidden = h0.size(2), tokens = from_input.size(1);
  const ScalarType dtype = h0.scalar_type();
  check_tensor(from_input, {directions, tokens, 4 * hidden}, ScalarType::Float, "from_input");
  check_tensor(w_hh, {directions, 4 * hidden, hidden}, dtype, "w_hh");
  check_tensor(bias, {directions, 4 * hidden}, ScalarType::Float, "bias");
  check_tensor(h0, {directions, batch, hidden}, dtype, "h0");
  check_tensor(h_n, {directions, batch, hidden}, dtype, "h_n");
  check_tensor(c, {directions, batch, hidden}, ScalarType::Float, "c");
  check_tensor(output, {tokens, directions * hidden}, dtype, "output");
  STD_TORCH_CHECK(gates.has_value() == cells.has_value(), "gates and cells must be given both or neither");
  if (gates) {
    check_tensor(*gates, {directions, tokens, 4 * hidden}, ScalarType::Float, "gates");
    check_tensor(*cells, {directions, tokens, hidden}, ScalarType::Float, "cells");
  }
  LstmSteps shape = steps_of(h0, tokens, steps, firsts, lengths);
  const bool is_small = registers <= 8 && dtype != ScalarType::Float && scope == "block";
  STD_TORCH_CHECK(registers > 0 && registers <= 64 && warps > 0 && warps <= (is_small ? 16 : 8), "lstm_sequence_fwd: no kernel has ", warps,
                  " warps and ", registers, " tiles in registers");
  if (batch * hidden == 0) return;
  const OnDeviceOf device(h0);
  dispatch(dtype, tf32, [&](auto zero) {
    using T = decltype(zero);
    const Scope where = parse_scope(scope);
    const Plan plan{where, static_cast<int>(registers),
                    lstm_forward_plan<T>(where, shape.hidden, static_cast<int>(registers), static_cast<int>(warps))};
    check_block(plan, hidden);
    const auto words = words_for<T>(plan, shape, directions, h0);
    shape.words = words ? mutable_data<unsigned long long>(*words) : nullptr;
    shape.bias_at = plan.sizes.bias_at;
    const auto tiles = streamed_for<T>(lstm_forward_stream<T>, plan, shape, w_hh, device.stream());
    const LstmForward<T> p{shape,
                           data<float>(from_input),
                           data<T>(w_hh),
                           data<float>(bias),
                           data<T>(h0),
                           mutable_data<T>(output),
                           mutable_data<T>(h_n),
                           mutable_data<float>(c),
                           gates ? mutable_data<float>(*gates) : nullptr,
                           cells ? mutable_data<float>(*cells) : nullptr};
    launch(forward_kernel_of<T>(plan), p, plan, static_cast<int>(directions), device.stream());
  });
}

// Writes d_gates; d_h and d_c hold the gradients of the final states and on return those of the initial ones.
void lstm_sequence_bwd(const Tensor& d_output, const Tensor& gates, const Tensor& cells, const Tensor& c0, const Tensor& w_hh,
                       const std::optional<Tensor>& firsts, const std::optional<Tensor>& lengths, int64_t steps, Tensor d_h, Tensor d_c,
                       Tensor d_gates, const Text& scope, int64_t registers, int64_t warps, bool tf32) {
  CHECK_DIM(c0, 3);
  CHECK_DIM(d_output, 2);
  const int64_t directions = c0.size(0), batch = c0.size(1), hidden = c0.size(2), tokens = d_output.size(0);
  const ScalarType dtype = c0.scalar_type();
  check_tensor(d_output, {tokens, directions * hidden}, dtype, "d_output");
  check_tensor(gates, {directions, tokens, 4 * hidden}, ScalarType::Float, "gates");
  check_tensor(cells, {directions, tokens, hidden}, ScalarType::Float, "cells");
  check_tensor(c0, {directions, batch, hidden}, dtype, "c0");
  check_tensor(w_hh, {directions, 4 * hidden, hidden}, dtype, "w_hh");
  check_tensor(d_h, {directions, batch, hidden}, ScalarType::Float, "d_h");
  check_tensor(d_c, {directions, batch, hidden}, ScalarType::Float, "d_c");
  check_tensor(d_gates, {tokens, directions, 4 * hidden}, dtype, "d_gates");
  LstmSteps shape = steps_of(c0, tokens, steps, firsts, lengths);
  STD_TORCH_CHECK(registers > 0 && registers <= 64 && warps > 0 && warps <= 8, "lstm_sequence_bwd: no kernel has ", warps, " warps and ",
                  registers, " tiles in registers");
  if (batch * hidden == 0) return;
  const OnDeviceOf device(c0);
  dispatch(dtype, tf32, [&](auto zero) {
    using T = decltype(zero);
    const Scope where = parse_scope(scope);
    const Plan plan{where, static_cast<int>(registers),
                    lstm_backward_plan<T>(where, shape.hidden, static_cast<int>(registers), static_cast<int>(warps))};
    check_block(plan, hidden);
    const auto words = words_for<T>(plan, shape, directions, c0);
    shape.words = words ? mutable_data<unsigned long long>(*words) : nullptr;
    const auto tiles = streamed_for<T>(lstm_backward_stream<T>, plan, shape, w_hh, device.stream());
    const LstmBackward<T> p{shape,         data<T>(d_output),        data<float>(gates),       data<float>(cells),      data<T>(c0),
                            data<T>(w_hh), mutable_data<float>(d_h), mutable_data<float>(d_c), mutable_data<T>(d_gates)};
    launch(backward_kernel_of<T>(plan), p, plan, static_cast<int>(directions), device.stream());
  });
}

}  // namespace bmk

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_native, m) {
  m.def(
      "lstm_sequence_fwd(Tensor from_input, Tensor w_hh, Tensor bias, Tensor h0, Tensor? firsts, Tensor? lengths, int steps, "
      "Tensor(a!) output, Tensor(b!) h_n, Tensor(c!) c, Tensor(d!)? gates, Tensor(e!)? cells, str scope, int registers, int warps, bool tf32) -> ()");
  m.def(
      "lstm_sequence_bwd(Tensor d_output, Tensor gates, Tensor cells, Tensor c0, Tensor w_hh, Tensor? firsts, Tensor? lengths, "
      "int steps, Tensor(a!) d_h, Tensor(b!) d_c, Tensor(c!) d_gates, str scope, int registers, int warps, bool tf32) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel_native, CUDA, m) {
  m.impl("lstm_sequence_fwd", TORCH_BOX(&bmk::lstm_sequence_fwd));
  m.impl("lstm_sequence_bwd", TORCH_BOX(&bmk::lstm_sequence_bwd));
}
