// What the compiler calls before every access to memory, in programs built with -fsanitize=thread. ThreadSanitizer's own
// library is not linked: it knows nothing of fibers and of CUDA's memory model.
#include "runtime.h"

namespace emulator {
namespace {

void hook(const void* address, std::size_t bytes, Access access, const void* pc) {
  // Locals and the program's own data are nobody else's.
  if (self && is_device_memory(address)) check_access(address, bytes, access, pc);
}
// A volatile access is a relaxed one, and others run before it.
void volatile_hook(const void* address, std::size_t bytes, Access access, const void* pc) {
  if (!self || !is_device_memory(address)) return;
  yield();
  check_access(address, bytes, access, pc);
  if (access == Access::ordered_write) made_progress();
}

}  // namespace
}  // namespace emulator

using emulator::Access;

#define HOOKS(bytes)                                                                                                  \
  void __tsan_read##bytes(void* p) { emulator::hook(p, bytes, Access::read, EMULATOR_PC); }                           \
  void __tsan_write##bytes(void* p) { emulator::hook(p, bytes, Access::write, EMULATOR_PC); }                         \
  void __tsan_unaligned_read##bytes(void* p) { emulator::hook(p, bytes, Access::read, EMULATOR_PC); }                 \
  void __tsan_unaligned_write##bytes(void* p) { emulator::hook(p, bytes, Access::write, EMULATOR_PC); }               \
  void __tsan_volatile_read##bytes(void* p) { emulator::volatile_hook(p, bytes, Access::ordered_read, EMULATOR_PC); } \
  void __tsan_volatile_write##bytes(void* p) { emulator::volatile_hook(p, bytes, Access::ordered_write, EMULATOR_PC); }

extern "C" {
void __tsan_init() { emulator::checks_races = true; }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, std::size_t bytes) { emulator::hook(p, bytes, Access::read, EMULATOR_PC); }
void __tsan_write_range(void* p, std::size_t bytes) { emulator::hook(p, bytes, Access::write, EMULATOR_PC); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
