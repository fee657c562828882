// Which instruction set the CPU kernels run with: found once, at the first call.
#pragma once

#include <cstdint>

namespace bmk {

// Storage of a bfloat16 number; the kernels convert it to float to compute.
struct bfloat16 {
  uint16_t bits;
};

// Each has what the one before it has; avx512_bf16 adds dot products of bfloat16 to the kernels of avx512.
enum class Isa { generic, avx2, avx512, avx512_bf16 };

// The best set this CPU has, or the one that the environment variable BIGMODEL_ISA names (never one the CPU lacks).
Isa selected_isa();
const char* isa_name(Isa isa);

}  // namespace bmk

// Calls `function` of the namespace compiled for the selected instruction set (see for_each_isa.h).
#if defined(ONE_ISA_AVX512)
#define ISA_CALL(function, ...) bmk::avx512::function(__VA_ARGS__)
#elif defined(__x86_64__) && !defined(ONE_ISA_GENERIC)
#define ISA_CALL(function, ...)                                                 \
  (bmk::selected_isa() >= bmk::Isa::avx512 ? bmk::avx512::function(__VA_ARGS__) \
   : bmk::selected_isa() == bmk::Isa::avx2 ? bmk::avx2::function(__VA_ARGS__)   \
                                           : bmk::generic::function(__VA_ARGS__))
#else
#define ISA_CALL(function, ...) bmk::generic::function(__VA_ARGS__)
#endif
