// Runs the threads of a launch, one at a time, in an order drawn from the seed, and says where they stand if none can go on.
#include <algorithm>
#include <cstdarg>
#include <random>

#include "runtime.h"

#ifdef EMULATOR_SWITCH
asm(R"(
.text
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size emulator_switch, .-emulator_switch
)");
#endif

namespace emulator {

Place* self = nullptr;
Index block_size, grid_size;
Launch launch;

namespace {

Context scheduler_context;
Kernel* kernel_under_way = nullptr;
std::mt19937_64 random_numbers;
std::vector<Fiber*> runnable;
std::vector<Stack> free_stacks;
std::vector<std::unique_ptr<Cluster>> live;
uint64_t switches = 0, switches_at_progress = 0;
unsigned depth_first;  // of 16 choices, how many go to the thread that was woken last
uint64_t async_delay;  // how many switches an asynchronous copy takes on average, if threads can run meanwhile

unsigned volume(Index size) { return size.x * size.y * size.z; }
Index unfold(unsigned i, Index size) { return {i % size.x, i / size.x % size.y, i / size.x / size.y}; }

void back_to_scheduler(bool last = false) { switch_context(running()->context, scheduler_context, last); }

void fiber_main() {
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, &scheduler_context.bottom, &scheduler_context.size);
  kernel_under_way->run();
  running()->finished = true;
  back_to_scheduler(true);
}

void start_block(Block& block) {
  const unsigned threads = volume(launch.block);
  block.shared = new_region(launch.shared_bytes + kStaticShared,
                            "shared memory of block (" + std::to_string(block.index.x) + ", " + std::to_string(block.index.y) + ", " +
                                std::to_string(block.index.z) + ")",
                            &block);
  declare(block.shared, launch.shared_bytes);
  block.warps.resize((threads + 31) / 32);
  block.cluster_generations.assign(threads, 0);
  for (unsigned i = 0; i < threads; ++i) {
    auto fiber = std::make_unique<Fiber>();
    fiber->thread = unfold(i, launch.block);
    fiber->Place::block = block.index;
    fiber->lane = i % 32;
    fiber->home = &block;
    fiber->index = i;
    fiber->warp = i / 32;
    if (free_stacks.empty()) Stack::make(free_stacks);
    fiber->stack = free_stacks.back();
    free_stacks.pop_back();
    fiber->context.start(fiber->stack, fiber_main);
    runnable.push_back(fiber.get());
    block.fibers.push_back(std::move(fiber));
  }
}

// Blocks of a cluster are neighbours in the grid.
void start_cluster(unsigned id) {
  const Index clusters{launch.grid.x / launch.cluster.x, launch.grid.y / launch.cluster.y, launch.grid.z / launch.cluster.z};
  const Index at = unfold(id, clusters);
  auto cluster = std::make_unique<Cluster>();
  cluster->id = id;
  for (unsigned rank = 0; rank < volume(launch.cluster); ++rank) {
    const Index in = unfold(rank, launch.cluster);
    auto block = std::make_unique<Block>();
    block->cluster = cluster.get();
    block->rank = rank;
    block->index = {at.x * launch.cluster.x + in.x, at.y * launch.cluster.y + in.y, at.z * launch.cluster.z + in.z};
    block->id = (block->index.z * launch.grid.y + block->index.y) * launch.grid.x + block->index.x;
    start_block(*block);
    cluster->blocks.push_back(std::move(block));
  }
  live.push_back(std::move(cluster));
}

void check_nothing_left(const Block& block) {
  for (int id = 0; id < 16; ++id)
    if (block.barriers[id].threads)
      fail_with_state("the block ended while %d of %d threads had arrived at barrier %d", block.barriers[id].arrived,
                      block.barriers[id].threads, id);
  refuse_async_in(block);
}

void finish(Fiber* fiber) {
  Block& block = *fiber->home;
  for (const Exchange& open : block.warps[fiber->warp])
    if (open.mask >> fiber->lane & 1)
      fail_with_state("a thread has exited while its warp waits for it in %s (mask %08x)", open.what, open.mask);
  finish_copies_of(*fiber);
  free_stacks.push_back({fiber->stack.bottom, true});
  made_progress();
  Cluster& cluster = *block.cluster;
  if (++block.finished_fibers == block.fibers.size()) {
    check_nothing_left(block);
    end_region(block.shared);
    ++cluster.finished_blocks;
  }
  if (cluster.finished_blocks < cluster.blocks.size()) return;
  for (auto& candidate : live)
    if (candidate.get() == &cluster) {
      std::swap(candidate, live.back());
      live.pop_back();
      return;
    }
}

Fiber* choose() {
  std::size_t i = runnable.size() - 1;
  if (random_below(16) >= depth_first) i = random_below(runnable.size());
  std::swap(runnable[i], runnable.back());
  Fiber* fiber = runnable.back();
  runnable.pop_back();
  return fiber;
}

void describe(Block& block) {
  std::fprintf(stderr, "  block (%u, %u, %u): %zu threads, %u finished\n", block.index.x, block.index.y, block.index.z, block.fibers.size(),
               block.finished_fibers);
  for (int id = 0; id < 16; ++id)
    if (block.barriers[id].threads)
      std::fprintf(stderr, "    barrier %d: %d of %d threads have arrived\n", id, block.barriers[id].arrived, block.barriers[id].threads);
  for (const auto& [address, barrier] : block.mbarriers)
    std::fprintf(stderr, "    mbarrier at byte %td of shared memory: phase %u, %ld of %u arrivals and %ld bytes missing, %zu waiting\n",
                 static_cast<const unsigned char*>(address) - block.shared, barrier.phase, barrier.arrivals_left, barrier.count,
                 barrier.bytes_left, barrier.waiting.size());
  std::map<std::pair<std::string, long>, std::vector<unsigned>> waiting;
  for (const auto& fiber : block.fibers)
    if (!fiber->finished) waiting[{fiber->waits_for ? fiber->waits_for : "nothing (spins)", fiber->waits_which}].push_back(fiber->index);
  for (const auto& [what, threads] : waiting) {
    std::fprintf(stderr, "    %zu threads wait for %s %ld:", threads.size(), what.first.c_str(), what.second);
    for (std::size_t i = 0; i < threads.size(); ++i)
      if (i < 8) std::fprintf(stderr, " %u", threads[i]);
    std::fprintf(stderr, threads.size() > 8 ? " ...\n" : "\n");
  }
}

void print_place() {
  if (self)
    std::fprintf(stderr, "  in block (%u, %u, %u), thread (%u, %u, %u)\n", self->block.x, self->block.y, self->block.z, self->thread.x,
                 self->thread.y, self->thread.z);
}

void print_message(const char* format, std::va_list arguments) {
  std::fflush(stdout);
  std::fprintf(stderr, "emulator: ");
  std::vfprintf(stderr, format, arguments);
  std::fprintf(stderr, "\n");
  print_place();
}

constexpr int kExitCode = 3;

}  // namespace

void fail(const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  print_message(format, arguments);
  std::_Exit(kExitCode);
}

void fail_with_state(const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  print_message(format, arguments);
  for_each_live_block(describe);
  std::_Exit(kExitCode);
}

void trap_with(const char* why) { fail_with_state("trap: %s", why); }

uint64_t random_below(uint64_t n) { return random_numbers() % n; }

void for_each_live_block(void (*visit)(Block&)) {
  for (const auto& cluster : live)
    for (const auto& block : cluster->blocks) visit(*block);
}

void made_progress() { switches_at_progress = switches; }

void wait_for(const char* what, long which) {
  Fiber* fiber = running();
  fiber->waits_for = what;
  fiber->waits_which = which;
  back_to_scheduler();
  fiber->waits_for = nullptr;
}

void wake(Fiber* fiber) {
  fiber->waits_for = nullptr;
  runnable.push_back(fiber);
  made_progress();
}

void yield() {
  runnable.push_back(running());
  back_to_scheduler();
}

void nanosleep(unsigned) { yield(); }
uint64_t globaltimer() { return 1000 * ++switches; }  // as if every switch took a microsecond

void run_launch(Kernel& kernel) {
  kernel_under_way = &kernel;
  block_size = launch.block;
  grid_size = launch.grid;
  random_numbers.seed(launch.seed);
  depth_first = static_cast<unsigned>(random_below(3) * 7);
  async_delay = uint64_t{1} << 5 * random_below(3);
  std::vector<unsigned> clusters(volume(launch.grid) / volume(launch.cluster));
  for (unsigned i = 0; i < clusters.size(); ++i) clusters[i] = i;
  std::shuffle(clusters.begin(), clusters.end(), random_numbers);
  const std::size_t most_live = std::max(1u, launch.live_blocks / volume(launch.cluster));
  while (!clusters.empty() || !live.empty()) {
    while (!clusters.empty() && live.size() < most_live) {
      start_cluster(clusters.back());
      clusters.pop_back();
    }
    if (async_pending() && (runnable.empty() || random_below(async_delay) == 0)) finish_some_async();
    if (runnable.empty()) {
      if (async_pending()) continue;
      self = nullptr;
      fail_with_state("deadlock: no thread can go on");
    }
    Fiber* fiber = choose();
    self = fiber;
    // All that can run may be spinning on a word that nobody will write.
    if (++switches - switches_at_progress > 100000 + 200 * runnable.size())
      fail_with_state("no progress: threads spin, and nothing that they read changes");
    switch_context(scheduler_context, fiber->context);
    if (fiber->finished) finish(fiber);
    self = nullptr;
  }
}

}  // namespace emulator
