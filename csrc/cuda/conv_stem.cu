// Native op conv_stem_fwd: checks, launch and registration of conv_stem.cuh.
#include "conv_stem.cuh"

#include "conv_host.h"

namespace bmk {

namespace {

template <class T, int kChannels>
void launch_stem(const StemForward<T>& p, int64_t batch, cudaStream_t stream) {
  const int bytes = StemTile(p).shared_bytes(p.in_channels, kChannels);
  const int64_t tiles = ceil_div<int64_t>(p.out_h, p.tile_h) * ceil_div(p.out_w, p.tile_w);
  const int64_t parts = ceil_div(p.out_channels, kChannels);
  constexpr int64_t kMost = 65535;  // of a grid's second and third dimensions
  STD_TORCH_CHECK(tiles < (int64_t{1} << 31) && parts <= kMost && batch <= kMost, "conv_stem_fwd: too many outputs: ", batch, " times ",
                  parts, " times ", tiles, " tiles");
  check_cuda(cudaFuncSetAttribute(conv_stem<T, kChannels>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
             "conv_stem_fwd: shared memory");
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(parts), static_cast<unsigned>(batch));
  conv_stem<T, kChannels><<<grid, kStemThreads, bytes, stream>>>(p);
  check_cuda(cudaGetLastError(), "conv_stem_fwd");
}

struct Pair {
  int h, w;
};
Pair pair_of(const std::vector<int64_t>& list, const char* name, int64_t least) {
  STD_TORCH_CHECK(list.size() == 2 && list[0] >= least && list[1] >= least && list[0] < 65536 && list[1] < 65536, name,
                  " must have 2 entries from ", least, " to 65535");
  return {static_cast<int>(list[0]), static_cast<int>(list[1])};
}

void check_image(const Tensor& t, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(t.is_cuda() && t.dim() == 4 && t.scalar_type() == dtype, name,
                  " must be a CUDA tensor of 4 dimensions, of the dtype of x");
  for (int64_t i = 0; i < 4; ++i)
    STD_TORCH_CHECK(t.size(i) < (int64_t{1} << 31), name, " must have sizes below 2^31, got ", shape_string(t));
}

}  // namespace

// All lists have an entry for h and one for w; padding is that before the first element. `full_size` is the convolution's output before
// pooling, `tile` the part of the pooled output that a block makes. Writes out.
void conv_stem_fwd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& scale,
                   const std::optional<Tensor>& shift, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation, const std::string& activation, double slope, const std::string& pool,
                   const std::vector<int64_t>& pool_size, const std::vector<int64_t>& pool_stride, const std::vector<int64_t>& pool_padding,
                   const std::vector<int64_t>& full_size, const std::vector<int64_t>& tile, Tensor out) {
  check_image(x, x.scalar_type(), "x");
  check_image(weight, x.scalar_type(), "weight");
  check_image(out, x.scalar_type(), "out");
  CHECK_CONTIGUOUS(weight);
  STD_TORCH_CHECK(weight.size(1) == x.size(1) && out.size(0) == x.size(0) && out.size(1) == weight.size(0),
                  "x, weight and out do not go together: ", shape_string(x), ", ", shape_string(weight), ", ", shape_string(out));
  const Pair strides = pair_of(stride, "stride", 1), pads = pair_of(padding, "padding", 0), dilations = pair_of(dilation, "dilation", 1);
  const Pair window = pair_of(pool_size, "pool_size", 1), steps = pair_of(pool_stride, "pool_stride", 1);
  const Pair rim = pair_of(pool_padding, "pool_padding", 0), full = pair_of(full_size, "full_size", 1), part = pair_of(tile, "tile", 1);
  if (out.numel() == 0) return;
  const OnDeviceOf device(x);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    StemForward<T> p{};
    p.x = data<T>(x);
    p.weight = data<T>(weight);
    p.out = mutable_data<T>(out);
    p.epilogue = epilogue_of<T>(bias, scale, shift, out.size(1), x.scalar_type(), activation, slope);
    p.x_strides = strides_of_image(x);
    p.out_strides = strides_of_image(out);
    p.in_channels = static_cast<int>(x.size(1)), p.in_h = static_cast<int>(x.size(2)), p.in_w = static_cast<int>(x.size(3));
    p.out_channels = static_cast<int>(out.size(1)), p.out_h = static_cast<int>(out.size(2)), p.out_w = static_cast<int>(out.size(3));
    p.full_h = full.h, p.full_w = full.w;
    p.kernel_h = static_cast<int>(weight.size(2)), p.kernel_w = static_cast<int>(weight.size(3));
    p.stride_h = strides.h, p.stride_w = strides.w, p.pad_h = pads.h, p.pad_w = pads.w;
    p.dilation_h = dilations.h, p.dilation_w = dilations.w;
    p.pool = pool == "avg" ? Pool::avg : Pool::max;
    p.pool_h = window.h, p.pool_w = window.w, p.pool_stride_h = steps.h, p.pool_stride_w = steps.w;
    p.pool_pad_h = rim.h, p.pool_pad_w = rim.w;
    p.tile_h = part.h, p.tile_w = part.w;
    if (p.out_channels <= 16) return launch_stem<T, 16>(p, x.size(0), device.stream());
    if (p.out_channels <= 32) return launch_stem<T, 32>(p, x.size(0), device.stream());
    launch_stem<T, 64>(p, x.size(0), device.stream());
  };
  if (x.scalar_type() == ScalarType::Half) return run(__half{});
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "conv_stem_fwd: the kernel takes float16 and bfloat16, got scalar type ",
                  static_cast<int>(x.scalar_type()));
  run(__nv_bfloat16{});
}

}  // namespace bmk

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_native, m) {
  m.def(
      "conv_stem_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, int[] stride, int[] padding, int[] dilation, "
      "str activation, float slope, str pool, int[] pool_size, int[] pool_stride, int[] pool_padding, int[] full_size, int[] tile, "
      "Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel_native, CUDA, m) { m.impl("conv_stem_fwd", TORCH_BOX(&bmk::conv_stem_fwd)); }
