// One attention, or those of many sequences that are run together: what they are, and how their tasks are shared out.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <vector>

#include "attention_args.h"

namespace bmk {

struct AttentionForward {
  AttentionArgs a;
  void* out;  // [B, Sq, Hq, Dv], contiguous
  void* lse;  // [B, Hq, Sq], a.lse_stride from head to head
  uint16_t* kept = nullptr;  // [B, Hkv, rows of the group, a.kept_row()], where the probabilities are kept
  int16_t* rest = nullptr;   // [B, Hq, Sq, Dv], where what rounding takes from out is kept
};

struct AttentionBackward {
  AttentionArgs a;
  AttentionGradArgs g;
};

// The tasks of one problem after the other, each with its cost. A thread begins with the tasks of its share of all costs, so that sequences
// of any lengths keep the threads equally busy, and goes on with what others have left: cores are rarely equally fast.
class CostedTasks {
 public:
  static constexpr int64_t kUnit = 1024;  // multiplications

  void add(int64_t tasks, int64_t multiplications) {
    const int64_t cost = std::max<int64_t>(1, multiplications / kUnit);
    runs_.push_back({total_, tasks_, tasks, cost});
    total_ += tasks * cost, tasks_ += tasks;
  }

  int64_t total() const { return total_; }

  // Calls body(each) on as many threads as `grain` of cost each allows, and each(task_of) calls task_of(problem, task) for the tasks that
  // the thread gets.
  template <class Body>
  void run(int64_t grain, const Body& body) const {
    if (tasks_ == 0) return;
    const int64_t most = torch::stable::get_num_threads(), threads = std::min({most, tasks_, (total_ + grain - 1) / grain});
    std::vector<Share> shares(threads);
    for (int64_t i = 0; i < threads; ++i) {
      shares[i].next = i == 0 ? 0 : shares[i - 1].end;
      shares[i].end = i + 1 == threads ? tasks_ : first_after(total_ / threads * (i + 1));
    }
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      body([&](const auto& task_of) {
        for (int64_t i = begin; i < end; ++i)
          while (const auto some = shares[i].take(true)) each(some, task_of);
        for (int64_t i = end; i < begin + threads; ++i)
          while (const auto some = shares[i % threads].take(false)) each(some, task_of);
      });
    });
  }

 private:
  struct Run {
    int64_t first_cost, first, tasks, cost;
  };
  struct Range {
    int64_t begin, end;
    explicit operator bool() const { return begin < end; }
  };

  // The tasks that a thread has still to begin. It takes some from the front, others from the back.
  struct alignas(64) Share {
    std::mutex mutex;
    int64_t next = 0, end = 0;

    Range take(bool own) {
      const std::lock_guard<std::mutex> lock(mutex);
      const int64_t count = (end - next + kSlices - 1) / kSlices;
      if (own) return {next, next += count};
      return {end -= count, end + count};
    }
  };
  static constexpr int64_t kSlices = 4;  // of what is left of a share; so the last ones are single tasks

  // The first task that begins at or after `cost`.
  int64_t first_after(int64_t cost) const {
    const auto after = std::upper_bound(runs_.begin(), runs_.end(), cost, [](int64_t c, const Run& run) { return c < run.first_cost; });
    const Run& run = after[-1];
    return run.first + std::min(run.tasks, (cost - run.first_cost + run.cost - 1) / run.cost);
  }

  template <class Task>
  void each(Range range, const Task& task_of) const {
    const auto after =
        std::upper_bound(runs_.begin(), runs_.end(), range.begin, [](int64_t task, const Run& run) { return task < run.first; });
    for (int64_t i = after - runs_.begin() - 1; i < static_cast<int64_t>(runs_.size()) && runs_[i].first < range.end; ++i)
      for (int64_t task = std::max(range.begin, runs_[i].first); task < std::min(range.end, runs_[i].first + runs_[i].tasks); ++task)
        task_of(i, task - runs_[i].first);
  }

  std::vector<Run> runs_;
  int64_t total_ = 0, tasks_ = 0;
};

}  // namespace bmk
