// Switching between stacks: by hand on x86-64, where a switch takes some nanoseconds, through ucontext elsewhere.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <vector>
#if defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
#define EMULATOR_SWITCH
#else
#include <ucontext.h>
#endif

// AddressSanitizer is told of every switch, where it is there.
extern "C" {
[[gnu::weak]] void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, std::size_t size);
[[gnu::weak]] void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, std::size_t* size);
[[gnu::weak]] void __asan_poison_memory_region(const volatile void* address, std::size_t size);
[[gnu::weak]] void __asan_unpoison_memory_region(const volatile void* address, std::size_t size);
#ifdef EMULATOR_SWITCH
void emulator_switch(void** save, void* to);  // scheduler.cpp
#endif
}

namespace emulator {

struct Stack {
  static constexpr std::size_t kBytes = 256 * 1024, kGuard = 4096, kMadeAtOnce = 32;
  unsigned char* bottom;
  bool used = false;

  static void make(std::vector<Stack>& stacks) {
    constexpr std::size_t step = kGuard + kBytes;
    void* p = mmap(nullptr, kMadeAtOnce * step, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) __builtin_trap();
    for (std::size_t i = 0; i < kMadeAtOnce; ++i) {
      unsigned char* guard = static_cast<unsigned char*>(p) + i * step;
      if (mprotect(guard, kGuard, PROT_NONE) != 0) __builtin_trap();
      stacks.push_back({guard + kGuard});
    }
  }
};

struct Context {
#ifdef EMULATOR_SWITCH
  void* sp = nullptr;
#else
  ucontext_t context;
#endif
  const void* bottom = nullptr;  // of its stack
  std::size_t size = 0;
  void* fake_stack = nullptr;

  void start(Stack stack, void (*entry)()) {
    bottom = stack.bottom;
    size = Stack::kBytes;
    // The frames of the thread before it are still fenced off. On a stack nobody has used, saying so would only make pages.
    if (stack.used && __asan_unpoison_memory_region) __asan_unpoison_memory_region(bottom, size);
#ifdef EMULATOR_SWITCH
    auto* top = reinterpret_cast<uint64_t*>(stack.bottom + Stack::kBytes);
    *--top = 0;  // where entry would return to: it never does; keeps the stack aligned as a call does
    *--top = reinterpret_cast<uint64_t>(entry);
    for (int i = 0; i < 6; ++i) *--top = 0;  // the registers that emulator_switch restores
    sp = top;
#else
    getcontext(&context);
    context.uc_stack.ss_sp = stack.bottom;
    context.uc_stack.ss_size = Stack::kBytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
#endif
  }
};

// Goes on at `to`; returns when someone switches back to `from`, which is never if `last`.
inline void switch_context(Context& from, Context& to, bool last = false) {
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.bottom, to.size);
#ifdef EMULATOR_SWITCH
  emulator_switch(&from.sp, to.sp);
#else
  swapcontext(&from.context, &to.context);
#endif
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

}  // namespace emulator
