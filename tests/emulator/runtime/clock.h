// Who knows what: vector clocks, by which an access is told from one that races with it.
//
// Every thread counts its releases: its epoch. An access happens before another if the other's thread has learnt, through
// barriers and ordered accesses, of the epoch in which the first was made. Copies that run by themselves (cp.async, bulk copies)
// are agents with epochs of their own, which a thread learns of when it waits for them.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

namespace emulator {

struct Agent {
  unsigned block, index;  // of the grid; of the block: threads first, then their copies
  bool operator==(const Agent&) const = default;
};

// The last known epoch of each agent, by block. Shared by all who know the same, and never changed: after a barrier that is
// every thread of a block.
using Epochs = std::vector<uint32_t>;
using Blocks = std::map<unsigned, std::shared_ptr<const Epochs>>;
using Knowledge = std::shared_ptr<const Blocks>;

inline bool knows(const Knowledge& knowledge, Agent agent, uint32_t epoch) {
  if (!knowledge) return false;
  const auto found = knowledge->find(agent.block);
  return found != knowledge->end() && agent.index < found->second->size() && (*found->second)[agent.index] >= epoch;
}

// Collects the knowledge of several.
class Meeting {
 public:
  void add(const Knowledge& knowledge) {
    if (!knowledge || knowledge == last_) return;
    last_ = knowledge;
    for (const auto& [block, epochs] : *knowledge) {
      if (seen_[block] == epochs) continue;
      seen_[block] = epochs;
      Epochs& mine = result_[block];
      if (mine.size() < epochs->size()) mine.resize(epochs->size());
      for (std::size_t i = 0; i < epochs->size(); ++i)
        if (mine[i] < (*epochs)[i]) mine[i] = (*epochs)[i];
    }
  }
  void add(Agent agent, uint32_t epoch) {
    Epochs& mine = result_[agent.block];
    if (mine.size() <= agent.index) mine.resize(agent.index + 1);
    if (mine[agent.index] < epoch) mine[agent.index] = epoch;
  }
  Knowledge knowledge() const {
    auto blocks = std::make_shared<Blocks>();
    for (const auto& [block, epochs] : result_) blocks->emplace(block, std::make_shared<const Epochs>(epochs));
    return blocks;
  }

 private:
  std::map<unsigned, Epochs> result_;
  Blocks seen_;  // what was added as a whole
  Knowledge last_;
};

inline Knowledge together(const Knowledge& a, const Knowledge& b) {
  if (!a || a == b) return b;
  if (!b) return a;
  Meeting meeting;
  meeting.add(a);
  meeting.add(b);
  return meeting.knowledge();
}

}  // namespace emulator
