// How a kernel is called by name, with arguments that were written down elsewhere: EMULATE(kernel) makes it known.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "emulator.h"

namespace emulator {

// One argument: a buffer, null, an integer, a real number, or a list of them for the members of an aggregate.
struct Argument {
  enum Kind { pointer, integer, real, list } kind;
  void* address = nullptr;
  long long whole = 0;
  double number = 0;
  std::vector<Argument> members = {};
};

[[noreturn]] void wrong_arguments(const char* expected, std::size_t given);

template <typename T>
T converted(const Argument& a);

// Stands for whatever type a member of Parent has, and becomes it.
template <typename Parent>
struct Member {
  const Argument* argument;
  template <typename T>
    requires(!std::is_same_v<T, Parent>)
  operator T() const {
    return converted<T>(*argument);
  }
};

template <typename T, std::size_t... I>
constexpr bool has_members(std::index_sequence<I...>) {
  return requires { T{(static_cast<void>(I), Member<T>{})...}; };
}
template <typename T, std::size_t N = 32>
constexpr std::size_t member_count() {
  if constexpr (N == 0 || has_members<T>(std::make_index_sequence<N>{}))
    return N;
  else
    return member_count<T, N - 1>();
}
template <typename T, std::size_t... I>
T aggregate(const std::vector<Argument>& members, std::index_sequence<I...>) {
  return T{Member<T>{&members[I]}...};
}

template <typename T>
T converted(const Argument& a) {
  if constexpr (std::is_pointer_v<T>) {
    if (a.kind != Argument::pointer) wrong_arguments("a pointer", 1);
    return static_cast<T>(a.address);
  } else if constexpr (std::is_integral_v<T>) {
    if (a.kind != Argument::integer || !std::in_range<std::conditional_t<std::is_same_v<T, bool>, unsigned char, T>>(a.whole))
      wrong_arguments("an integer in the range of the parameter's type", 1);
    return static_cast<T>(a.whole);
  } else if constexpr (std::is_enum_v<T>) {
    return static_cast<T>(converted<std::underlying_type_t<T>>(a));
  } else if constexpr (std::is_floating_point_v<T>) {
    if (a.kind != Argument::real) wrong_arguments("a real number", 1);
    return static_cast<T>(a.number);
  } else {
    constexpr std::size_t count = member_count<T>();
    if (a.kind != Argument::list || a.members.size() != count) wrong_arguments("as many values as the aggregate has members", count);
    return aggregate<T>(a.members, std::make_index_sequence<count>{});
  }
}

// A kernel and, once bound, its arguments.
struct Kernel {
  virtual ~Kernel() = default;
  virtual void bind(const std::vector<Argument>& arguments) = 0;
  virtual void run() const = 0;  // as one thread
};

template <typename... Parameters>
struct KernelOf final : Kernel {
  using Function = void (*)(Parameters...);
  Function function;
  std::optional<std::tuple<std::remove_cv_t<Parameters>...>> bound;

  explicit KernelOf(Function f) : function(f) {}
  void bind(const std::vector<Argument>& arguments) override {
    if (arguments.size() != sizeof...(Parameters)) wrong_arguments("as many arguments as the kernel has parameters", sizeof...(Parameters));
    bind(arguments, std::index_sequence_for<Parameters...>{});
  }
  template <std::size_t... I>
  void bind([[maybe_unused]] const std::vector<Argument>& arguments, std::index_sequence<I...>) {
    bound.emplace(converted<std::remove_cv_t<Parameters>>(arguments[I])...);
  }
  void run() const override { std::apply(function, *bound); }
};

void add_kernel(const char* name, std::unique_ptr<Kernel> kernel);

struct Registration {
  template <typename... Parameters>
  Registration(const char* name, void (*function)(Parameters...)) {
    add_kernel(name, std::make_unique<KernelOf<Parameters...>>(function));
  }
};

}  // namespace emulator

#define EMULATE_NAME2(line) emulated_kernel_##line
#define EMULATE_NAME(line) EMULATE_NAME2(line)
#define EMULATE(...) static const ::emulator::Registration EMULATE_NAME(__LINE__)(#__VA_ARGS__, &__VA_ARGS__);
