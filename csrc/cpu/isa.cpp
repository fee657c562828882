#include "isa.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace bmk {
namespace {

Isa best_isa() {
#if defined(__x86_64__) && !defined(ONE_ISA_GENERIC)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
#if defined(ONE_ISA_AVX512)
  std::fputs("this build of bigmodel_kernels needs AVX-512, which the CPU lacks\n", stderr);
  std::abort();
#endif
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::generic;
}

Isa choose_isa() {
  const Isa best = best_isa();
  const char* wanted = std::getenv("BIGMODEL_ISA");
  if (!wanted) return best;
  for (Isa isa : {Isa::generic, Isa::avx2, Isa::avx512, Isa::avx512_bf16})
    if (isa <= best && std::strcmp(wanted, isa_name(isa)) == 0) return isa;
  return best;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "generic";
  }
}

Isa selected_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace bmk
