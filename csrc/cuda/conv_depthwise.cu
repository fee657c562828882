// Native op conv_depthwise_fwd: checks, choice of a variant, launch and registration of conv_depthwise.cuh.
#include "conv_depthwise.cuh"

#include "conv_host.h"

namespace bmk {

namespace {

// Whether every vector of `elements` channels lies at a multiple of its size.
bool has_vectors(const Tensor& t, int64_t elements) {
  bool aligned = t.stride(1) == 1 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t i = 0; i < t.dim(); ++i) aligned = aligned && (i == 1 || t.stride(i) % elements == 0);
  return aligned;
}

template <class T, int kVector, bool kChannelsLast, int kHeight>
void launch_depthwise(DepthwiseForward<T> p, int64_t batch, cudaStream_t stream) {
  const int64_t runs = ceil_div<int64_t>(p.out_h, depthwise_run(kHeight)) * p.out_w;
  const int64_t threads = kChannelsLast ? runs * (p.channels / kVector) : runs, images = kChannelsLast ? batch : batch * p.channels;
  const int64_t blocks = ceil_div<int64_t>(threads, kDepthwiseThreads);
  constexpr int64_t kMost = (int64_t{1} << 31) - 1;
  STD_TORCH_CHECK(threads <= kMost && images * blocks <= kMost, "conv_depthwise_fwd: too many outputs: ", images, " times ", threads);
  p.per_image = static_cast<int>(threads);
  p.blocks_per_image = static_cast<int>(blocks);
  depthwise_forward<T, kVector, kChannelsLast, kHeight><<<static_cast<unsigned>(images * blocks), kDepthwiseThreads, 0, stream>>>(p);
  check_cuda(cudaGetLastError(), "conv_depthwise_fwd");
}

template <class T, int kVector, bool kChannelsLast>
void launch_for_height(const DepthwiseForward<T>& p, int64_t batch, cudaStream_t stream) {
  const int height = p.stride_h == 1 && p.dilation_h == 1 && p.out_h > 1 ? p.kernel_h : 0;
  if (height == 3) return launch_depthwise<T, kVector, kChannelsLast, 3>(p, batch, stream);
  if (height == 5) return launch_depthwise<T, kVector, kChannelsLast, 5>(p, batch, stream);
  if (height == 7) return launch_depthwise<T, kVector, kChannelsLast, 7>(p, batch, stream);
  launch_depthwise<T, kVector, kChannelsLast, 0>(p, batch, stream);
}

void check_image(const Tensor& t, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(
      t.is_cuda() && t.dim() == x.dim() && t.scalar_type() == x.scalar_type() && t.size(0) == x.size(0) && t.size(1) == x.size(1), name,
      " must be a CUDA tensor with the dimensions, dtype, batch and channels of x, got ", shape_string(t));
}

}  // namespace

// weight is [KH, KW, C] ([KW, C] for sequences); stride, padding (before the first element) and dilation have an entry per axis. Writes
// out, whose sizes say how many outputs there are.
void conv_depthwise_fwd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& scale,
                        const std::optional<Tensor>& shift, const std::optional<Tensor>& residual, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, const std::string& activation,
                        double slope, Tensor out) {
  CHECK_CUDA(x);
  const int64_t axes = x.dim() - 2;
  STD_TORCH_CHECK(axes == 1 || axes == 2, "x must have 3 or 4 dimensions, got ", shape_string(x));
  STD_TORCH_CHECK(weight.is_cuda() && weight.is_contiguous() && weight.scalar_type() == x.scalar_type() && weight.dim() == axes + 1 &&
                      weight.size(axes) == x.size(1),
                  "weight must be contiguous, of the dtype of x, with a last dimension of ", x.size(1), ", got ", shape_string(weight));
  check_image(out, x, "out");
  if (residual) check_image(*residual, x, "residual");
  for (int64_t i = 0; i < x.dim(); ++i)
    STD_TORCH_CHECK(x.size(i) < (int64_t{1} << 31) && out.size(i) < (int64_t{1} << 31) && (!residual || residual->size(i) == out.size(i)),
                    "residual must have the shape of out, and no size may pass 2^31: ", shape_string(x), ", ", shape_string(out));
  for (const std::vector<int64_t>* list : {&stride, &padding, &dilation})
    STD_TORCH_CHECK(static_cast<int64_t>(list->size()) == axes, "stride, padding and dilation must have ", axes, " entries");
  if (out.numel() == 0) return;
  const auto per_axis = [&](const std::vector<int64_t>& list, int64_t axis, int otherwise) {
    return axis == 0 && axes == 1 ? otherwise : static_cast<int>(list[static_cast<size_t>(axis - 2 + axes)]);
  };
  const auto size = [&](const Tensor& t, int64_t axis) { return axis == 0 && axes == 1 ? 1 : static_cast<int>(t.size(axis + axes)); };
  const OnDeviceOf device(x);
  DISPATCH_CUDA(x.scalar_type(), "conv_depthwise_fwd", [&] {
    DepthwiseForward<scalar_t> p{};
    p.x = data<scalar_t>(x);
    p.weight = data<scalar_t>(weight);
    p.epilogue = epilogue_of<scalar_t>(bias, scale, shift, x.size(1), x.scalar_type(), activation, slope);
    p.residual = data<scalar_t>(residual);
    p.out = mutable_data<scalar_t>(out);
    p.x_strides = strides_of_image(x);
    p.residual_strides = residual ? strides_of_image(*residual) : ImageStrides{};
    p.out_strides = strides_of_image(out);
    p.channels = static_cast<int>(x.size(1));
    p.in_h = size(x, 0), p.in_w = size(x, 1), p.out_h = size(out, 0), p.out_w = size(out, 1);
    p.kernel_h = axes == 1 ? 1 : static_cast<int>(weight.size(0)), p.kernel_w = static_cast<int>(weight.size(axes - 1));
    p.stride_h = per_axis(stride, 0, 1), p.stride_w = per_axis(stride, 1, 1);
    p.pad_h = per_axis(padding, 0, 0), p.pad_w = per_axis(padding, 1, 0);
    p.dilation_h = per_axis(dilation, 0, 1), p.dilation_w = per_axis(dilation, 1, 1);
    constexpr int kVector = kVectorSize<scalar_t>;
    const bool channels_last = out.stride(1) == 1 && x.size(1) > 1 && axes == 2;
    const bool vectors = channels_last && x.size(1) % kVector == 0 && has_vectors(x, kVector) && has_vectors(out, kVector) &&
                         reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % 16 == 0 && (!residual || has_vectors(*residual, kVector));
    if (vectors) return launch_for_height<scalar_t, kVector, true>(p, x.size(0), device.stream());
    if (channels_last) return launch_depthwise<scalar_t, 1, true, 0>(p, x.size(0), device.stream());
    launch_for_height<scalar_t, 1, false>(p, x.size(0), device.stream());
  });
}

}  // namespace bmk

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_native, m) {
  m.def(
      "conv_depthwise_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? residual, int[] stride, "
      "int[] padding, int[] dilation, str activation, float slope, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel_native, CUDA, m) { m.impl("conv_depthwise_fwd", TORCH_BOX(&bmk::conv_depthwise_fwd)); }
