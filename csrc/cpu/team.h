// A team of threads that share work in rounds and meet after each: a parallel region a round costs several microseconds, which is
// as long as a step of a small recurrent layer takes; meeting in one costs a fraction of one.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

// Of the OpenMP runtime that torch brings; null where it has none.
extern "C" __attribute__((weak)) int omp_in_parallel();

namespace bmk {

// Where the members wait for each other. Each counts for as many shares of the work as it has taken.
class Meeting {
 public:
  explicit Meeting(int64_t shares) : shares_(shares) {}

  void wait(int64_t own) {
    if (own == shares_) return;
    const int64_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(own, std::memory_order_acq_rel) + own == shares_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    constexpr int kSpins = 1 << 13;  // longer than the members are apart unless one of them has lost its CPU
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins >= kSpins)
        std::this_thread::yield();
      else
        pause();
    }
  }

 private:
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  const int64_t shares_;
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<int64_t> round_{0};
};

// f(first, last, meet) on every member, for its part of [0, count); meet() returns when all have called it. f must not throw.
// Where only this thread runs, or where threads are not OpenMP's and two parts might be run one after the other: f(0, count, ..).
template <class F>
void run_team(int64_t count, F f) {
  const int64_t members = torch::stable::get_num_threads();
  Meeting meeting(members);
  std::atomic<bool> done{false};
  torch::stable::parallel_for(0, members, 1, [&](int64_t begin, int64_t end) {
    if (end - begin < members && !(omp_in_parallel && omp_in_parallel())) return;
    done.store(true, std::memory_order_relaxed);
    f(begin * count / members, end * count / members, [&] { meeting.wait(end - begin); });
  });
  if (!done.load()) f(int64_t{0}, count, [] {});
}

// Tasks that threads take as they come: each those of its own share first, so that neighbours stay together, then what others
// have not come to yet. Fixed shares alone would leave threads waiting for the last where tasks differ in length.
class Claims {
 public:
  Claims(int64_t tasks, int64_t members) : tasks_(tasks), taken_(members) {}

  template <class F>
  void run(int64_t member, F f) {
    const auto members = static_cast<int64_t>(taken_.size());
    for (int64_t i = 0; i < members; ++i) {
      const int64_t share = (member + i) % members, begin = share * tasks_ / members, count = (share + 1) * tasks_ / members - begin;
      for (int64_t task; (task = taken_[share].fetch_add(1, std::memory_order_relaxed)) < count;) f(begin + task);
    }
  }

 private:
  const int64_t tasks_;
  std::vector<std::atomic<int64_t>> taken_;
};

}  // namespace bmk
