// Native ops conv_depthwise_fwd and conv_depthwise_weights: checks, choice of a variant, launch and registration of conv_depthwise.cuh and
// conv_depthwise_weights.cuh.
#include "conv_depthwise.cuh"

#include "conv_depthwise_weights.cuh"
#include "conv_host.h"

namespace bmk {

namespace {

template <class T, int kVector, bool kChannelsLast, int kHeight>
void launch_depthwise(DepthwiseForward<T> p, int64_t batch, cudaStream_t stream) {
  const int64_t runs = ceil_div<int64_t>(p.out_h, depthwise_run(kHeight)) * p.out_w;
  const int64_t threads = kChannelsLast ? runs * (p.channels / kVector) : runs, images = kChannelsLast ? batch : batch * p.channels;
  const int64_t blocks = ceil_div<int64_t>(threads, kDepthwiseThreads);
  STD_TORCH_CHECK(threads <= kMostBlocks - kDepthwiseThreads && images * blocks <= kMostBlocks,
                  "conv_depthwise_fwd: too many outputs: ", images, " times ", threads);
  p.per_image = static_cast<int>(threads);
  p.blocks_per_image = static_cast<int>(blocks);
  depthwise_forward<T, kVector, kChannelsLast, kHeight><<<static_cast<unsigned>(images * blocks), kDepthwiseThreads, 0, stream>>>(p);
  check_cuda(cudaGetLastError(), "conv_depthwise_fwd");
}

template <class T, int kVector, bool kChannelsLast>
void launch_for_height(const DepthwiseForward<T>& p, int64_t batch, cudaStream_t stream) {
  const bool slides = p.window.stride_h == 1 && p.window.dilation_h == 1 && p.spread_h == 1 && p.out_h > 1;
  const int height = slides ? p.window.kernel_h : 0;
  if (height == 3) return launch_depthwise<T, kVector, kChannelsLast, 3>(p, batch, stream);
  if (height == 5) return launch_depthwise<T, kVector, kChannelsLast, 5>(p, batch, stream);
  if (height == 7) return launch_depthwise<T, kVector, kChannelsLast, 7>(p, batch, stream);
  launch_depthwise<T, kVector, kChannelsLast, 0>(p, batch, stream);
}

template <class T, int kVector, bool kChannelsLast>
void launch_weights(const DepthwiseWeights<T>& p, int64_t splits, cudaStream_t stream) {
  const int64_t groups = ceil_div(p.channels, depthwise_channel_lanes(kChannelsLast) * kVector);
  const int64_t chunks = ceil_div<int64_t>(int64_t{p.window.kernel_h} * p.window.kernel_w + 1, kDepthwiseTaps);
  STD_TORCH_CHECK(groups * chunks <= kMostBlocks && splits <= kMostBlocksYZ, "conv_depthwise_weights: too many weights or splits: ", groups,
                  " times ", chunks, ", ", splits);
  depthwise_weights<T, kVector, kChannelsLast>
      <<<dim3(static_cast<unsigned>(groups * chunks), static_cast<unsigned>(splits)), kDepthwiseThreads, 0, stream>>>(p);
  check_cuda(cudaGetLastError(), "conv_depthwise_weights");
}

// Whether the channels of an image are its innermost axis, for threads of neighbouring channels.
bool is_channels_last(const Tensor& t) { return t.stride(1) == 1 && t.size(1) > 1; }

}  // namespace

// weight is [KH, KW, C]; `spread` is 1 but for a gradient: the steps between two pixels of x. Writes out, whose sizes say how many outputs
// there are, and pre where it is given.
void conv_depthwise_fwd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& scale,
                        const std::optional<Tensor>& shift, const std::optional<Tensor>& residual, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, const std::vector<int64_t>& spread,
                        const Text& activation, double slope, Tensor out, std::optional<Tensor> pre) {
  const ScalarType dtype = x.scalar_type();
  check_image(x, dtype, {-1, -1, -1, -1}, "x");
  const int64_t channels = x.size(1);
  STD_TORCH_CHECK(
      weight.is_cuda() && weight.is_contiguous() && weight.scalar_type() == dtype && weight.dim() == 3 && weight.size(2) == channels,
      "weight must be contiguous, of the dtype of x, with a last dimension of ", channels, ", got ", shape_string(weight));
  check_image(out, dtype, {x.size(0), channels, -1, -1}, "out");
  if (residual) check_image(*residual, dtype, {x.size(0), channels, out.size(2), out.size(3)}, "residual");
  if (pre) check_image(*pre, dtype, {x.size(0), channels, out.size(2), out.size(3)}, "pre");
  if (out.numel() == 0) return;
  const OnDeviceOf device(x);
  DISPATCH_CUDA(dtype, "conv_depthwise_fwd", [&] {
    using T = scalar_t;
    const Pair steps = pair_of(spread, "spread", 1);
    const DepthwiseForward<T> p{data<T>(x),
                                data<T>(weight),
                                epilogue_of<T>(bias, scale, shift, channels, dtype, activation, slope),
                                data<T>(residual),
                                mutable_data<T>(out),
                                pre ? mutable_data<T>(*pre) : nullptr,
                                strides_of_image(x),
                                strides_of_image(residual),
                                strides_of_image(out),
                                strides_of_image(pre),
                                size_of(x, 1),
                                size_of(x, 2),
                                size_of(x, 3),
                                size_of(out, 2),
                                size_of(out, 3),
                                window_of({size_of(weight, 0), size_of(weight, 1)}, stride, padding, dilation),
                                steps.h,
                                steps.w,
                                0,
                                0};
    constexpr int kVector = kVectorSize<T>;
    const bool vectors = is_channels_last(out) && has_vectors(x, kVector) && has_vectors(out, kVector) &&
                         reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % 16 == 0 && (!residual || has_vectors(*residual, kVector)) &&
                         (!pre || has_vectors(*pre, kVector));
    if (vectors) return launch_for_height<T, kVector, true>(p, x.size(0), device.stream());
    if (is_channels_last(out)) return launch_depthwise<T, 1, true, 0>(p, x.size(0), device.stream());
    launch_for_height<T, 1, false>(p, x.size(0), device.stream());
  });
}

// Writes partial [splits, KH KW + 1, C], whose sum over the splits is the gradient of the weight and, last, the sum of d.
void conv_depthwise_weights(const Tensor& x, const Tensor& d, const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                            const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, Tensor partial) {
  const ScalarType dtype = x.scalar_type();
  check_image(x, dtype, {-1, -1, -1, -1}, "x");
  check_image(d, dtype, {x.size(0), x.size(1), -1, -1}, "d");
  const Pair window = pair_of(kernel, "kernel", 1);
  check_partial(partial, int64_t{window.h} * window.w + 1, x.size(1));
  const int64_t pixels = d.size(0) * d.size(2) * d.size(3);
  STD_TORCH_CHECK(pixels < (int64_t{1} << 30), "conv_depthwise_weights: d has ", pixels, " pixels; the kernel counts up to 2^30");
  if (partial.numel() == 0) return;
  const OnDeviceOf device(x);
  DISPATCH_CUDA(dtype, "conv_depthwise_weights", [&] {
    using T = scalar_t;
    const DepthwiseWeights<T> p{data<T>(x),
                                data<T>(d),
                                mutable_data<float>(partial),
                                strides_of_image(x),
                                strides_of_image(d),
                                size_of(x, 1),
                                size_of(x, 2),
                                size_of(x, 3),
                                size_of(d, 2),
                                size_of(d, 3),
                                window_of(window, stride, padding, dilation),
                                static_cast<int>(pixels)};
    constexpr int kVector = kVectorSize<T>;
    if (!is_channels_last(d)) return launch_weights<T, 1, false>(p, partial.size(0), device.stream());
    if (has_vectors(x, kVector) && has_vectors(d, kVector)) return launch_weights<T, kVector, true>(p, partial.size(0), device.stream());
    launch_weights<T, 1, true>(p, partial.size(0), device.stream());
  });
}

}  // namespace bmk

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_native, m) {
  m.def(
      "conv_depthwise_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? residual, int[] stride, "
      "int[] padding, int[] dilation, int[] spread, str activation, float slope, Tensor(a!) out, Tensor(b!)? pre) -> ()");
  m.def("conv_depthwise_weights(Tensor x, Tensor d, int[] kernel, int[] stride, int[] padding, int[] dilation, Tensor(a!) partial) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel_native, CUDA, m) {
  m.impl("conv_depthwise_fwd", TORCH_BOX(&bmk::conv_depthwise_fwd));
  m.impl("conv_depthwise_weights", TORCH_BOX(&bmk::conv_depthwise_weights));
}
