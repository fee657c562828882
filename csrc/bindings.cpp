// Module _C (pybind11): what Python asks about the build. No tensor op passes here: see docs/architecture.md.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "cpu/isa.h"
#include "cpu/tile_unit.h"

namespace py = pybind11;

namespace {

std::map<std::string, std::string> build_info() {
  return {
      {"compiler", BUILD_COMPILER}, {"cuda", BUILD_CUDA},     {"cuda_archs", BUILD_CUDA_ARCHS},
      {"torch", BUILD_TORCH},       {"torch_target", "2.10"},
  };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "Compiler, CUDA toolkit and torch this extension was built with.");
  m.def(
      "isa",
      [] {
        const bmk::Tiles tiles = bmk::selected_tiles();
        return tiles == bmk::Tiles::hardware   ? "amx"
               : tiles == bmk::Tiles::software ? "amx_emulated"
                                               : bmk::isa_name(bmk::selected_isa());
      },
      "Instruction set the CPU kernels run with: amx, avx512_bf16, avx512, avx2 or generic; BIGMODEL_ISA chooses a lower one, or amx_emulated.");
  m.def("why_no_amx", &bmk::why_no_tiles, "Why products of bfloat16 numbers do not use AMX; empty where they do.");
}
