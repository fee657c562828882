// Native ops conv_spread, conv_stem_weights and conv_stem_input: checks, launch and registration of conv_tail.cuh and
// conv_stem_backward.cuh.
#include "conv_stem_backward.cuh"

#include "conv_host.h"

namespace bmk {

namespace {

template <class T, int kChannels>
void launch_weights(const StemWeights<T>& p, int64_t splits, cudaStream_t stream) {
  const StemWeightsTile tile(p);
  const int bytes = tile.shared_bytes(kChannels, sizeof(T));
  const int64_t parts = int64_t{ceil_div(p.tail.channels, kChannels)} * ceil_div(tile.depth + 1, kStemColumns);
  STD_TORCH_CHECK(parts <= kMostBlocksYZ, "conv_stem_weights: too many weights: ", p.tail.channels, " times ", tile.depth);
  const auto kernel = conv_stem_weights<T, kChannels>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "conv_stem_weights: shared memory");
  kernel<<<dim3(static_cast<unsigned>(splits), static_cast<unsigned>(parts)), kStemThreads, bytes, stream>>>(p);
  check_cuda(cudaGetLastError(), "conv_stem_weights");
}

template <class T, int kVector>
void launch_input(const StemInputGradient<T>& p, cudaStream_t stream) {
  const int64_t blocks = ceil_div<int64_t>(p.pixels, kStemThreads), parts = ceil_div(p.channels, kStemInputChannels);
  STD_TORCH_CHECK(blocks <= kMostBlocks && parts <= kMostBlocksYZ, "conv_stem_input: x is too large: ", p.pixels, " pixels of ", p.channels,
                  " channels");
  conv_stem_input<T, kVector><<<dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(parts)), kStemThreads, 0, stream>>>(p);
  check_cuda(cudaGetLastError(), "conv_stem_input");
}

}  // namespace

// Writes d, the gradient of what precedes activation and pool.
void conv_spread_native(const Tensor& grad, const std::optional<Tensor>& out, const std::optional<Tensor>& index,
                        const std::optional<Tensor>& pre, const Text& activation, double slope, const Text& pool,
                        const std::vector<int64_t>& pool_sizes, Tensor d) {
  check_image(d, grad.scalar_type(), {grad.size(0), grad.size(1), -1, -1}, "d");
  if (d.numel() == 0) return;
  const OnDeviceOf device(grad);
  DISPATCH_CUDA(grad.scalar_type(), "conv_spread", [&] {
    const ConvSpread<scalar_t> p{
        tail_of<scalar_t>(grad, out, index, pre, activation, slope, pool_of(pool, pool_sizes), {size_of(d, 2), size_of(d, 3)}),
        mutable_data<scalar_t>(d), strides_of_image(d), d.numel()};
    const int64_t blocks = std::min(ceil_div<int64_t>(d.numel(), kSpreadThreads), kMostBlocks);
    conv_spread<<<static_cast<unsigned>(blocks), kSpreadThreads, 0, device.stream()>>>(p);
    check_cuda(cudaGetLastError(), "conv_spread");
  });
}

// Writes partial [splits, O, C KH KW + 1], whose sum over the splits is the gradient of the weight and, last, the sum of d. `kernel` is
// (KH, KW), `full_size` the convolution's output before pooling, `tile` the part of it that a block takes at a time.
void conv_stem_weights_native(const Tensor& x, const Tensor& grad, const std::optional<Tensor>& out, const std::optional<Tensor>& index,
                              const std::optional<Tensor>& pre, const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                              const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, const Text& activation,
                              double slope, const Text& pool, const std::vector<int64_t>& pool_sizes,
                              const std::vector<int64_t>& full_size, const std::vector<int64_t>& tile, Tensor partial) {
  const ScalarType dtype = x.scalar_type();
  check_image(x, dtype, {-1, -1, -1, -1}, "x");
  check_image(grad, dtype, {x.size(0), -1, -1, -1}, "grad");
  const Pair window = pair_of(kernel, "kernel", 1), full = pair_of(full_size, "full_size", 1), part = pair_of(tile, "tile", 1);
  check_partial(partial, grad.size(1), x.size(1) * window.h * window.w + 1);
  if (partial.numel() == 0) return;
  const OnDeviceOf device(x);
  DISPATCH_CUDA(dtype, "conv_stem_weights", [&] {
    using T = scalar_t;
    const StemWeights<T> p{{data<T>(x), strides_of_image(x), size_of(x, 1), size_of(x, 2), size_of(x, 3)},
                           window_of(window, stride, padding, dilation),
                           tail_of<T>(grad, out, index, pre, activation, slope, pool_of(pool, pool_sizes), full),
                           mutable_data<float>(partial),
                           part.h,
                           part.w};
    if (grad.size(1) <= 32) return launch_weights<T, 32>(p, partial.size(0), device.stream());
    launch_weights<T, 64>(p, partial.size(0), device.stream());
  });
}

// Writes dx. d has its channels innermost; weight is [KH, KW, C, O].
void conv_stem_input_native(const Tensor& d, const Tensor& weight, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                            const std::vector<int64_t>& dilation, Tensor dx) {
  const ScalarType dtype = d.scalar_type();
  check_image(d, dtype, {-1, -1, -1, -1}, "d");
  check_image(dx, dtype, {d.size(0), -1, -1, -1}, "dx");
  check_image(weight, dtype, {-1, -1, dx.size(1), d.size(1)}, "weight");
  CHECK_CONTIGUOUS(weight);
  const int64_t channels = d.size(1), row = d.size(3) * channels;
  STD_TORCH_CHECK(d.numel() == 0 || ((channels == 1 || d.stride(1) == 1) && (d.size(3) == 1 || d.stride(3) == channels) &&
                                     (d.size(2) == 1 || d.stride(2) == row) && (d.size(0) == 1 || d.stride(0) == d.size(2) * row)),
                  "d must have its channels innermost and no gaps");
  if (dx.numel() == 0) return;
  const OnDeviceOf device(d);
  DISPATCH_CUDA(dtype, "conv_stem_input", [&] {
    using T = scalar_t;
    const StemInputGradient<T> p{data<T>(d),
                                 data<T>(weight),
                                 mutable_data<T>(dx),
                                 strides_of_image(dx),
                                 window_of({size_of(weight, 0), size_of(weight, 1)}, stride, padding, dilation),
                                 dx.size(0) * dx.size(2) * dx.size(3),
                                 size_of(dx, 1),
                                 size_of(dx, 2),
                                 size_of(dx, 3),
                                 size_of(d, 1),
                                 size_of(d, 2),
                                 size_of(d, 3)};
    constexpr int kVector = kVectorSize<T>;
    const auto aligned = [](const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; };
    if (channels % kVector == 0 && aligned(d) && aligned(weight)) return launch_input<T, kVector>(p, device.stream());
    launch_input<T, 1>(p, device.stream());
  });
}

}  // namespace bmk

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_native, m) {
  m.def(
      "conv_spread(Tensor grad, Tensor? out, Tensor? index, Tensor? pre, str activation, float slope, str pool, int[] pool_sizes, "
      "Tensor(a!) d) -> ()");
  m.def(
      "conv_stem_weights(Tensor x, Tensor grad, Tensor? out, Tensor? index, Tensor? pre, int[] kernel, int[] stride, int[] padding, "
      "int[] dilation, str activation, float slope, str pool, int[] pool_sizes, int[] full_size, int[] tile, Tensor(a!) partial) -> ()");
  m.def("conv_stem_input(Tensor d, Tensor weight, int[] stride, int[] padding, int[] dilation, Tensor(a!) dx) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel_native, CUDA, m) {
  m.impl("conv_spread", TORCH_BOX(&bmk::conv_spread_native));
  m.impl("conv_stem_weights", TORCH_BOX(&bmk::conv_stem_weights_native));
  m.impl("conv_stem_input", TORCH_BOX(&bmk::conv_stem_input_native));
}
