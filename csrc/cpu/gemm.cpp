// Native ops for what the CPU kernels share: the product of gemm.h and the functions of simd.h. Tests check them by
// themselves; benchmarks take the product as the machine's measured ceiling.
#define KERNEL_SOURCE "gemm_kernel.h"
#define COMPILE_PRODUCTS
#include "for_each_isa.h"

#include <torch/csrc/stable/library.h>

#include "../check.h"
#include "../text.h"
#include "new_tensor.h"

namespace bmk {

using torch::stable::Tensor;

Tensor gemm(const Tensor& a, const Tensor& b) {
  CHECK_CPU(a);
  CHECK_CPU(b);
  CHECK_DIM(a, 2);
  CHECK_DIM(b, 2);
  CHECK_SAME_DTYPE(b, a);
  const int64_t m = a.size(0), k = a.size(1), n = b.size(1);
  CHECK_SHAPE(b, k, n);
  Tensor c = new_contiguous({m, n}, a.scalar_type());
  DISPATCH_FLOATING(a.scalar_type(), "gemm", [&] {
    ISA_CALL(gemm_kernel<scalar_t>, m, n, k, static_cast<const scalar_t*>(a.const_data_ptr()), a.stride(0), a.stride(1),
             static_cast<const scalar_t*>(b.const_data_ptr()), b.stride(0), b.stride(1), static_cast<scalar_t*>(c.mutable_data_ptr()));
  });
  return c;
}

Tensor unary(const Tensor& x, const Text& name) {
  CHECK_CPU(x);
  CHECK_CONTIGUOUS(x);
  const int which = name == "exp" ? 0 : name == "tanh" ? 1 : name == "sigmoid" ? 2 : -1;
  STD_TORCH_CHECK(which >= 0, "name must be exp, tanh or sigmoid, got ", std::string(name));
  Tensor out = new_like(x);
  DISPATCH_FLOATING(x.scalar_type(), "unary", [&] {
    ISA_CALL(unary_kernel<scalar_t>, which, static_cast<const scalar_t*>(x.const_data_ptr()),
             static_cast<scalar_t*>(out.mutable_data_ptr()), x.numel());
  });
  return out;
}

}  // namespace bmk

STABLE_TORCH_LIBRARY_FRAGMENT(bigmodel_native, m) {
  m.def("gemm(Tensor a, Tensor b) -> Tensor");
  m.def("unary(Tensor x, str name) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bigmodel_native, CPU, m) {
  m.impl("gemm", TORCH_BOX(&bmk::gemm));
  m.impl("unary", TORCH_BOX(&bmk::unary));
}
