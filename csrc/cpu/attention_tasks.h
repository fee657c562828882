// One attention, or those of many sequences that are run together: what they are, and how their tasks are shared out.
#pragma once

#include <algorithm>
#include <cstdint>
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

// The tasks of one problem after the other, each with its cost: a thread takes the tasks that begin in its share of all costs,
// so that sequences of any lengths keep the threads equally busy.
class CostedTasks {
 public:
  static constexpr int64_t kUnit = 1024;  // multiplications

  void add(int64_t tasks, int64_t multiplications) {
    const int64_t cost = std::max<int64_t>(1, multiplications / kUnit);
    runs_.push_back({total_, tasks, cost});
    total_ += tasks * cost;
  }

  int64_t total() const { return total_; }

  // Calls task_of(problem, task) for what begins in [begin, end).
  template <class Task>
  void each(int64_t begin, int64_t end, Task task_of) const {
    const auto after = std::upper_bound(runs_.begin(), runs_.end(), begin, [](int64_t cost, const Run& run) { return cost < run.first; });
    for (int64_t i = std::max<int64_t>(0, after - runs_.begin() - 1); i < static_cast<int64_t>(runs_.size()) && runs_[i].first < end; ++i) {
      const auto [first, tasks, cost] = runs_[i];
      for (int64_t task = std::max<int64_t>(0, (begin - first + cost - 1) / cost); task < tasks && first + task * cost < end; ++task)
        task_of(i, task);
    }
  }

 private:
  struct Run {
    int64_t first, tasks, cost;
  };
  std::vector<Run> runs_;
  int64_t total_ = 0;
};

}  // namespace bmk
