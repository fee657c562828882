// Of transformer_layer.h, what runs on vectors.
#define KERNEL_SOURCE "transformer_layer_kernel.h"
#include "transformer_layer.h"

#include "for_each_isa.h"

namespace bmk {

void gelu_tanh(void* numbers, int64_t count, ScalarType dtype) {
  DISPATCH_FLOATING(dtype, "gelu_tanh", [&] { ISA_CALL(gelu_tanh_of<scalar_t>, numbers, count); });
}

}  // namespace bmk
