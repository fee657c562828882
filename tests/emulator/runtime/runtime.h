// The inside of the emulator: threads, blocks, clusters and what they wait for.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "../emulator.h"
#include "../launch.h"
#include "clock.h"
#include "fiber.h"

namespace emulator {

struct Block;

struct Launch {
  std::string kernel;
  Index grid, block, cluster;
  unsigned shared_bytes = 0;
  unsigned live_blocks = 1;  // how many blocks run at once at the most; all of a cluster always do
  uint64_t seed = 0;
};
extern Launch launch;

// ---- threads ----

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes, valid;
};

// What was released to a place in memory, by whom, and how far it reaches.
struct Release {
  unsigned block, cluster;
  Scope scope;
  Knowledge knowledge;
};

struct Fiber : Place {
  Context context;
  Stack stack;
  Block* home;
  unsigned index, warp;  // of the block
  bool finished = false;
  const char* waits_for = nullptr;  // null: may run
  long waits_which = 0;             // the barrier's number or address

  uint32_t epoch = 1;
  Knowledge known, known_at_proxy_fence;
  Knowledge released_by_fence[3];         // by the reach of the fence: block, cluster, device
  std::vector<Release> not_yet_acquired;  // read by relaxed loads: a fence acquires it
  uint32_t epoch_of_proxy_fence = 0;

  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> copy_groups;
  uint32_t copy_epoch = 1;            // of the open group
  uint32_t bulk_epoch = 1;            // of the next bulk copy
  std::vector<uint32_t> bulk_groups;  // the first epoch after each

  Agent agent() const;
  Agent copy_agent() const;     // its cp.async
  Agent bulk_agent() const;     // its st.async and bulk copies
  Knowledge knowledge() const;  // with its own epoch
  Knowledge released();         // the same, and the epoch is over
  void learn(const Knowledge& more) { known = together(known, more); }
  void learn(Agent agent, uint32_t epoch);
};
inline Fiber* running() { return static_cast<Fiber*>(self); }

// ---- what they wait for ----

struct NamedBarrier {
  int threads = 0;  // expected; 0 while nobody has come
  int arrived = 0;
  std::vector<Fiber*> waiting = {};
  Meeting meeting;
};

struct Exchange {
  const char* what;
  unsigned mask, arrived = 0;
  std::size_t bytes;
  Fiber* lanes[32] = {};
  const void* given[32] = {};
  void* wanted[32] = {};
  Meeting meeting = {};  // if it orders memory
};

struct MBarrier {
  unsigned count;
  long arrivals_left, bytes_left = 0;
  unsigned phase = 0;
  std::vector<Release> ended = {}, current = {};  // released in all phases that ended, and in this one
  std::vector<Fiber*> waiting = {};
};

struct Cluster {
  unsigned id;
  std::vector<std::unique_ptr<Block>> blocks;
  unsigned finished_blocks = 0;
  unsigned arrived = 0, generation = 0;
  std::vector<Fiber*> waiting = {};
  Meeting meeting;
  Knowledge met;  // of the generation before
};

struct Block {
  Cluster* cluster;
  Index index;
  unsigned id, rank;  // of the grid; of the cluster
  unsigned char* shared = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers;
  unsigned finished_fibers = 0;
  NamedBarrier barriers[16];
  std::vector<std::vector<Exchange>> warps;  // under way, by warp
  std::unordered_map<const void*, MBarrier> mbarriers;
  std::vector<unsigned> cluster_generations;  // by thread: the generation it arrived in
};

// ---- scheduler.cpp ----

void run_launch(Kernel& kernel);
void wait_for(const char* what, long which);  // until woken
void wake(Fiber* fiber);
void yield();
void made_progress();  // something that others may wait for has changed
uint64_t random_below(uint64_t n);
void for_each_live_block(void (*visit)(Block&));

[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);
[[noreturn, gnu::format(printf, 1, 2)]] void fail_with_state(const char* format, ...);

// ---- memory.cpp ----

constexpr std::size_t kMostShared = 227 * 1024;   // of a block, on sm_90
constexpr std::size_t kStaticShared = 48 * 1024;  // of it, declared in the kernel

unsigned char* new_region(std::size_t bytes, std::string name, Block* owner);
void declare(unsigned char* from, std::size_t bytes);  // a part of a region that may be used
void end_region(unsigned char* region);
bool is_device_memory(const void* address);
Block* owner_of(const void* shared);

extern bool checks_races;  // the program calls the hooks for every access (hooks.cpp)

enum class Access { read, write, ordered_read, ordered_write };
// Ends the launch if the bytes lie outside what was declared, or (checks_races) if another access races with this one.
void check_access(const void* address, std::size_t bytes, Access access, const void* pc);
// The same for a copy that runs by itself on behalf of the running thread, in this epoch of the agent's.
void check_access(const void* address, std::size_t bytes, Access access, const void* pc, Agent agent, uint32_t epoch);
void require_shared(const void* address, std::size_t bytes, std::size_t alignment, const char* what, const Block* owner);
void require_aligned(const void* address, std::size_t alignment, const char* what);

void add_release(std::vector<Release>& releases, const Release& release);
bool reaches(const Release& release, const Fiber& to, Scope scope);

// ---- async.cpp ----

bool async_pending();
void finish_some_async();  // one of them, at random
void finish_copies_of(Fiber& fiber);
void refuse_async_in(const Block& block);
void complete_bytes(uint64_t* barrier, unsigned bytes, const Knowledge& knowledge);  // barrier.cpp

}  // namespace emulator

#define EMULATOR_PC __builtin_extract_return_addr(__builtin_return_address(0))
