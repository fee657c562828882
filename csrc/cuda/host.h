// What the launchers in csrc/cuda/*.cu share: argument checks, the current stream, launch errors. Host code only.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../check.h"
#include "../text.h"

#define CHECK_CUDA(t) STD_TORCH_CHECK((t).is_cuda(), #t " must be a CUDA tensor")

// For a dtype the CUDA kernels compute in.
#define DISPATCH_CUDA(dtype, name, ...)                                                            \
  DISPATCH_CASES(dtype, name, "the cuda kernels take float32, float16 and bfloat16",               \
                 DISPATCH_CASE(Float, float, __VA_ARGS__) DISPATCH_CASE(Half, __half, __VA_ARGS__) \
                     DISPATCH_CASE(BFloat16, __nv_bfloat16, __VA_ARGS__))

namespace bmk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A contiguous CUDA tensor of this shape and dtype.
inline void check_tensor(const Tensor& t, std::initializer_list<int64_t> shape, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(t.is_cuda() && t.is_contiguous() && t.scalar_type() == dtype && has_shape(t, shape), name,
                  " must be a contiguous CUDA tensor ", shape_string(shape), " of scalar type ", static_cast<int>(dtype), ", got ",
                  shape_string(t), " of ", static_cast<int>(t.scalar_type()));
}
inline void check_tensor(const std::optional<Tensor>& t, std::initializer_list<int64_t> shape, ScalarType dtype, const char* name) {
  if (t) check_tensor(*t, shape, dtype, name);
}

inline void check_cuda(cudaError_t status, const char* what) {
  STD_TORCH_CHECK(status == cudaSuccess, what, ": ", cudaGetErrorString(status));
}

// The device of a tensor as the current one, and torch's current stream there, for the life of this object.
//
// The function that gives the stream is in libtorch_cuda.so, which a CPU build of torch has not: it is looked up on first use, so
// that the binary loads there.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& t) : guard_(t.get_device_index()) {
    using GetStream = AOTITorchError (*)(int32_t, void**);
    static const GetStream get_stream = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      void* found = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
      STD_TORCH_CHECK(found, "this torch has no CUDA: install a CUDA build of torch");
      return reinterpret_cast<GetStream>(found);
    }();
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(get_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

template <class S>
const S* data(const Tensor& t) {
  return static_cast<const S*>(t.const_data_ptr());
}
template <class S>
const S* data(const std::optional<Tensor>& t) {
  return t ? data<S>(*t) : nullptr;
}
template <class S>
S* mutable_data(const Tensor& t) {
  return static_cast<S*>(t.mutable_data_ptr());
}

// As many blocks as `count` elements need at `per_block` each.
inline unsigned blocks_for(int64_t count, int64_t per_block) { return static_cast<unsigned>((count + per_block - 1) / per_block); }

}  // namespace bmk
