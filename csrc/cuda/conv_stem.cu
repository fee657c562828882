// Native op conv_stem_fwd: checks, launch and registration of conv_stem.cuh.
#include "conv_stem.cuh"

#include "conv_host.h"

namespace bmk {

namespace {

template <class T, int kChannels, bool kSave>
void launch_stem(const StemForward<T>& p, int64_t batch, cudaStream_t stream) {
  const int bytes = StemTile(p).shared_bytes(kChannels, sizeof(T), sizeof(StemFull<T, kSave>));
  const int64_t tiles = ceil_div<int64_t>(p.out_h, p.tile_h) * ceil_div(p.out_w, p.tile_w) * batch;
  const int64_t parts = ceil_div(p.out_channels, kChannels);
  STD_TORCH_CHECK(tiles <= kMostBlocks && parts <= kMostBlocksYZ, "conv_stem_fwd: too many outputs: ", tiles, " tiles of ", parts,
                  " runs of channels");
  const auto kernel = conv_stem<T, kChannels, kSave>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "conv_stem_fwd: shared memory");
  kernel<<<dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(parts)), kStemThreads, bytes, stream>>>(p);
  check_cuda(cudaGetLastError(), "conv_stem_fwd");
}

template <class T, bool kSave>
void launch_for_channels(const StemForward<T>& p, int64_t batch, cudaStream_t stream) {
  if (p.out_channels <= 16) return launch_stem<T, 16, kSave>(p, batch, stream);
  if (p.out_channels <= 32) return launch_stem<T, 32, kSave>(p, batch, stream);
  launch_stem<T, 64, kSave>(p, batch, stream);
}

}  // namespace

// `full_size` is the convolution's output before pooling, `tile` the part of the pooled output that a block makes, `pool_sizes` window,
// stride and padding. Writes out and, where they are given, index and pre.
void conv_stem_fwd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& scale,
                   const std::optional<Tensor>& shift, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation, const Text& activation, double slope, const Text& pool,
                   const std::vector<int64_t>& pool_sizes, const std::vector<int64_t>& full_size, const std::vector<int64_t>& tile,
                   Tensor out, std::optional<Tensor> index, std::optional<Tensor> pre) {
  const ScalarType dtype = x.scalar_type();
  check_image(x, dtype, {-1, -1, -1, -1}, "x");
  check_image(weight, dtype, {-1, x.size(1), -1, -1}, "weight");
  check_image(out, dtype, {x.size(0), weight.size(0), -1, -1}, "out");
  CHECK_CONTIGUOUS(weight);
  const PoolWindow window = pool_of(pool, pool_sizes);
  const Pair full = pair_of(full_size, "full_size", 1), part = pair_of(tile, "tile", 1);
  if (index) check_image(*index, ScalarType::Byte, {out.size(0), out.size(1), out.size(2), out.size(3)}, "index");
  const bool pooled = window.kind == Pool::max;
  if (pre) check_image(*pre, dtype, {out.size(0), out.size(1), pooled ? out.size(2) : full.h, pooled ? out.size(3) : full.w}, "pre");
  if (out.numel() == 0) return;
  const OnDeviceOf device(x);
  DISPATCH_CUDA(dtype, "conv_stem_fwd", [&] {
    using T = scalar_t;
    const StemForward<T> p{{data<T>(x), strides_of_image(x), size_of(x, 1), size_of(x, 2), size_of(x, 3)},
                           window_of({size_of(weight, 2), size_of(weight, 3)}, stride, padding, dilation),
                           window,
                           data<T>(weight),
                           mutable_data<T>(out),
                           index ? mutable_data<uint8_t>(*index) : nullptr,
                           pre ? mutable_data<T>(*pre) : nullptr,
                           epilogue_of<T>(bias, scale, shift, out.size(1), dtype, activation, slope),
                           strides_of_image(out),
                           strides_of_image(index),
                           strides_of_image(pre),
                           size_of(out, 1),
                           full.h,
                           full.w,
                           size_of(out, 2),
                           size_of(out, 3),
                           part.h,
                           part.w};
    if constexpr (sizeof(T) == 2)
      if (!index && !pre) return launch_for_channels<T, false>(p, x.size(0), device.stream());
    launch_for_channels<T, true>(p, x.size(0), device.stream());
  });
}

}  // namespace bmk

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_native, m) {
  m.def(
      "conv_stem_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, int[] stride, int[] padding, int[] dilation, "
      "str activation, float slope, str pool, int[] pool_sizes, int[] full_size, int[] tile, Tensor(a!) out, Tensor(b!)? index, "
      "Tensor(c!)? pre) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel_native, CUDA, m) { m.impl("conv_stem_fwd", TORCH_BOX(&bmk::conv_stem_fwd)); }
