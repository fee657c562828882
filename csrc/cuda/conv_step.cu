// Native op conv_step_launch: checks, launch and registration of conv_step.cuh.
#include "conv_step.cuh"

#include <limits>

#include "conv_host.h"

namespace bmk {

namespace {

template <class T, int kSequences>
void launch(const ConvStep<T>& p, dim3 grid, cudaStream_t stream) {
  const int64_t bytes = p.shared_bytes(kSequences);
  STD_TORCH_CHECK(bytes <= std::numeric_limits<int>::max(), "conv_step: the window has too many elements");
  const auto kernel = conv_step<T, kSequences>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
             "conv_step: shared memory");
  kernel<<<grid, kStepThreads, static_cast<size_t>(bytes), stream>>>(p);
  check_cuda(cudaGetLastError(), "conv_step");
}

}  // namespace

// Writes y, skip, a slot of the ring and the position. `share`: values of a block; `sequences`: those of a block, 1 or 4. `tickets` is
// zero, and zero again when the launch has ended; launches that may run at the same time need their own.
void conv_step_launch(const Tensor& x, Tensor ring, Tensor position, const Tensor& weight, const std::optional<Tensor>& bias,
                      const std::optional<Tensor>& out_weight, const std::optional<Tensor>& out_bias,
                      const std::optional<Tensor>& skip_weight, const std::optional<Tensor>& skip_bias,
                      const std::optional<Tensor>& skip_sum, int64_t dilation, int64_t groups, const Text& activation, double slope,
                      int64_t share, int64_t sequences, Tensor y, Tensor skip, Tensor partial, Tensor tickets) {
  CHECK_DIM(x, 2);
  CHECK_DIM(weight, 3);
  const ScalarType dtype = x.scalar_type();
  const int64_t batch = x.size(0), channels = x.size(1), rows = weight.size(0), kernel = weight.size(2);
  const bool gated = activation == "tanh_sigmoid";
  STD_TORCH_CHECK(groups > 0 && dilation > 0 && kernel > 0 && channels % groups == 0 && rows % (gated ? 2 * groups : groups) == 0,
                  "conv_step: groups, dilation and the kernel must be positive and groups divide the channels, got ", groups, ", ", dilation,
                  ", ", kernel);
  const int64_t values = gated ? rows / 2 : rows, out = out_weight ? channels : 0, skips = skip_weight ? skip_weight->size(0) : 0;
  STD_TORCH_CHECK(sequences == 1 || sequences == 4, "sequences must be 1 or 4, got ", sequences);
  STD_TORCH_CHECK(share > 0 && share <= std::numeric_limits<int>::max(), "share must be positive, got ", share);
  const int64_t blocks = std::max<int64_t>(1, ceil_div(values, share)), parts = std::max<int64_t>(1, ceil_div(batch, sequences));
  for (int64_t size : {rows, channels * kernel, dilation * kernel, sequences * (out + skips), blocks})
    STD_TORCH_CHECK(size <= std::numeric_limits<int>::max(), "conv_step: too large a size: ", size);
  STD_TORCH_CHECK(parts <= kMostBlocksYZ, "conv_step: too many sequences: ", batch);
  CHECK_CUDA(x);
  check_tensor(ring, {batch, dilation * (kernel - 1), channels}, dtype, "ring");
  check_tensor(position, {1}, ScalarType::Long, "position");
  check_tensor(weight, {rows, channels / groups, kernel}, dtype, "weight");
  check_tensor(bias, {rows}, dtype, "bias");
  check_tensor(out_weight, {channels, values, 1}, dtype, "out_weight");
  check_tensor(out_bias, {channels}, dtype, "out_bias");
  check_tensor(skip_weight, {skips, values, 1}, dtype, "skip_weight");
  check_tensor(skip_bias, {skips}, dtype, "skip_bias");
  check_tensor(skip_sum, {batch, skips}, dtype, "skip");
  check_tensor(y, {batch, out_weight ? channels : values}, dtype, "y");
  if (skip_weight) check_tensor(skip, {batch, skips}, dtype, "skip_out");
  if (blocks > 1) check_tensor(partial, {parts, blocks, sequences, out + skips}, ScalarType::Float, "partial");
  if (blocks * parts > 1) check_tensor(tickets, {parts + 1}, ScalarType::Int, "tickets");
  const OnDeviceOf device(x);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(parts));
  DISPATCH_CUDA(dtype, "conv_step", [&] {
    using T = scalar_t;
    const ConvStep<T> p{data<T>(x),
                        x.stride(0),
                        x.stride(1),
                        mutable_data<T>(ring),
                        mutable_data<int64_t>(position),
                        data<T>(weight),
                        data<T>(bias),
                        data<T>(out_weight),
                        data<T>(out_bias),
                        data<T>(skip_weight),
                        data<T>(skip_bias),
                        data<T>(skip_sum),
                        mutable_data<T>(y),
                        mutable_data<T>(skip),
                        mutable_data<float>(partial),
                        mutable_data<unsigned>(tickets),
                        static_cast<int>(batch),
                        static_cast<int>(channels),
                        static_cast<int>(rows),
                        static_cast<int>(kernel),
                        static_cast<int>(dilation),
                        static_cast<int>(groups),
                        static_cast<int>(out),
                        static_cast<int>(skips),
                        static_cast<int>(share),
                        gated,
                        gated ? Activation::none : parse_activation(activation),
                        static_cast<float>(slope)};
    sequences == 1 ? launch<T, 1>(p, grid, device.stream()) : launch<T, 4>(p, grid, device.stream());
  });
}

}  // namespace bmk

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_native, m) {
  m.def(
      "conv_step_launch(Tensor x_t, Tensor(a!) ring, Tensor(b!) position, Tensor weight, Tensor? bias, Tensor? out_weight, "
      "Tensor? out_bias, Tensor? skip_weight, Tensor? skip_bias, Tensor? skip, int dilation, int groups, str activation, float slope, "
      "int share, int sequences, Tensor(c!) y, Tensor(d!) skip_out, Tensor(e!) partial, Tensor(f!) tickets) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel_native, CUDA, m) { m.impl("conv_step_launch", TORCH_BOX(&bmk::conv_step_launch)); }
