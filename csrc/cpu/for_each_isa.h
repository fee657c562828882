// Compiles KERNEL_SOURCE (a header without include guard) once per instruction set, each in a namespace of its own:
//   #define KERNEL_SOURCE "foo_kernel.h"
//   #include "for_each_isa.h"
// simd.h and gemm.h come with it. One translation unit with target pragmas, rather than one object file per set of
// compiler flags: inline functions of the standard library are compiled before the pragmas, so the linker can never
// pick a copy of them that needs instructions this CPU lacks.
//
// -DONE_ISA_GENERIC or -DONE_ISA_AVX512 leaves out all but one, for builds that are made to be checked and not to be kept.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <torch/csrc/stable/ops.h>

#include "isa.h"
#include "scratch.h"

// The vectors never cross a function that is not inlined or in the same namespace.
#pragma GCC diagnostic ignored "-Wpsabi"

// clang-format off: the order of these includes matters
#if !defined(ONE_ISA_AVX512)
#define ISA_VECTOR_BYTES 16
namespace bmk::generic {
#include "simd.h"
#include "gemm.h"
#include KERNEL_SOURCE
}  // namespace bmk::generic
#undef ISA_VECTOR_BYTES
#endif

#if defined(__x86_64__) && !defined(ONE_ISA_GENERIC) && !defined(ONE_ISA_AVX512)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#define ISA_VECTOR_BYTES 32
namespace bmk::avx2 {
#include "simd.h"
#include "gemm.h"
#include KERNEL_SOURCE
}  // namespace bmk::avx2
#undef ISA_VECTOR_BYTES
#pragma GCC pop_options
#endif

#if defined(__x86_64__) && !defined(ONE_ISA_GENERIC)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define ISA_VECTOR_BYTES 64
namespace bmk::avx512 {
#include "simd.h"
#include "gemm.h"
#include KERNEL_SOURCE
}  // namespace bmk::avx512
#undef ISA_VECTOR_BYTES
#pragma GCC pop_options
#endif

// What is the same in all of them.
#if defined(ONE_ISA_AVX512)
namespace bmk {
namespace any_isa = avx512;
}
#else
namespace bmk {
namespace any_isa = generic;
}
#endif
