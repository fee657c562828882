// Barriers of a block, exchanges within a warp, mbarriers, and the barrier of a cluster.
#include "runtime.h"

namespace emulator {

Agent Fiber::agent() const { return {home->id, index}; }
Agent Fiber::copy_agent() const { return {home->id, static_cast<unsigned>(home->fibers.size()) + index}; }
Agent Fiber::bulk_agent() const { return {home->id, 2 * static_cast<unsigned>(home->fibers.size()) + index}; }

void Fiber::learn(Agent agent, uint32_t epoch) {
  Meeting meeting;
  meeting.add(known);
  meeting.add(agent, epoch);
  known = meeting.knowledge();
}
Knowledge Fiber::knowledge() const {
  Meeting meeting;
  meeting.add(known);
  meeting.add(agent(), epoch);
  return meeting.knowledge();
}
Knowledge Fiber::released() {
  Knowledge mine = knowledge();
  ++epoch;
  return mine;
}

namespace {

// What a thread knows goes into the meeting; what it does from now on is not part of it.
void attend(Meeting& meeting, Fiber& fiber) {
  if (!checks_races) return;
  meeting.add(fiber.known);
  meeting.add(fiber.agent(), fiber.epoch++);
}

void come_to_barrier(int id, int threads, bool stays) {
  Fiber* fiber = running();
  if (id < 0 || id >= 16) fail("barrier %d does not exist: a block has 16", id);
  NamedBarrier& barrier = fiber->home->barriers[id];
  if (barrier.threads && barrier.threads != threads)
    fail_with_state("barrier %d: %d threads are expected here, and %d where others came", id, threads, barrier.threads);
  barrier.threads = threads;
  attend(barrier.meeting, *fiber);
  ++barrier.arrived;
  if (stays) barrier.waiting.push_back(fiber);
  if (barrier.arrived == threads) {
    const Knowledge met = checks_races ? barrier.meeting.knowledge() : nullptr;
    for (Fiber* other : barrier.waiting) {
      other->known = met;
      wake(other);
    }
    barrier = {};
    made_progress();
  }
  if (stays)
    wait_for("barrier", id);
  else
    yield();
}

int require_whole_warps(int threads) {
  if (threads <= 0 || threads % 32) fail("a barrier counts whole warps, and %d threads are not", threads);
  return threads;
}

}  // namespace

void barrier_sync(int id, int threads) { come_to_barrier(id, require_whole_warps(threads), true); }
void barrier_arrive(int id, int threads) { come_to_barrier(id, require_whole_warps(threads), false); }
void sync_threads() { come_to_barrier(0, static_cast<int>(running()->home->fibers.size()), true); }

// ---- warps ----

namespace {

Exchange& find_exchange(const char* what, unsigned mask, std::size_t bytes) {
  Fiber* fiber = running();
  Block& block = *fiber->home;
  if (!(mask >> fiber->lane & 1)) fail("%s: lane %u is not in its own mask %08x", what, fiber->lane, mask);
  const std::size_t first = fiber->warp * 32;
  for (unsigned lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1 && (first + lane >= block.fibers.size() || block.fibers[first + lane]->finished))
      fail_with_state("%s: lane %u is in the mask %08x, but has exited or does not exist", what, lane, mask);
  auto& open = block.warps[fiber->warp];
  for (Exchange& e : open) {
    if (e.mask == mask && e.what == what && e.bytes == bytes) return e;
    if (e.mask & mask)
      fail_with_state("divergent warp: lane %u is at %s (mask %08x), others at %s (mask %08x)", fiber->lane, what, mask, e.what, e.mask);
  }
  return open.emplace_back(Exchange{what, mask, 0, bytes});
}

void hand_out(const Exchange& e) {
  for (unsigned to = 0; to < 32; ++to)
    for (unsigned from = 0; from < 32 && e.mask >> to & 1; ++from) {
      unsigned char* place = static_cast<unsigned char*>(e.wanted[to]) + from * e.bytes;
      // Lanes that take no part give nothing that could be taken for a value.
      if (e.mask >> from & 1)
        std::memcpy(place, e.given[from], e.bytes);
      else
        std::memset(place, 0xff, e.bytes);
    }
}

void meet_in_warp(const char* what, unsigned mask, const void* mine, void* all, std::size_t bytes, bool orders_memory) {
  Fiber* fiber = running();
  Exchange& e = find_exchange(what, mask, bytes);
  if (orders_memory) attend(e.meeting, *fiber);
  e.lanes[fiber->lane] = fiber;
  e.given[fiber->lane] = mine;
  e.wanted[fiber->lane] = all;
  e.arrived |= 1u << fiber->lane;
  if (e.arrived == mask) {
    if (bytes) hand_out(e);
    const Knowledge met = orders_memory && checks_races ? e.meeting.knowledge() : nullptr;
    for (Fiber* lane : e.lanes) {
      if (!lane) continue;
      if (met) lane->known = met;
      wake(lane);
    }
    auto& open = fiber->home->warps[fiber->warp];
    open.erase(open.begin() + (&e - open.data()));
  }
  wait_for(what, static_cast<long>(mask));
}

}  // namespace

// A shuffle or a vote moves values and orders no memory accesses; __syncwarp does.
void exchange(const char* what, unsigned mask, const void* mine, void* all, std::size_t bytes) {
  meet_in_warp(what, mask, mine, all, bytes, false);
}
void sync_warp(unsigned mask) { meet_in_warp("__syncwarp", mask, nullptr, nullptr, 0, true); }

// ---- mbarriers ----

namespace {

MBarrier& find_mbarrier(const void* address) {
  Block* owner = owner_of(address);
  if (!owner) fail("%p is not in shared memory of a running block: no mbarrier", address);
  const auto found = owner->mbarriers.find(address);
  if (found == owner->mbarriers.end())
    fail_with_state("mbarrier at byte %td of shared memory was not initialised",
                    static_cast<const unsigned char*>(address) - owner->shared);
  return found->second;
}

void end_phase_if_complete(MBarrier& barrier) {
  if (barrier.arrivals_left || barrier.bytes_left) return;
  ++barrier.phase;
  barrier.arrivals_left = barrier.count;
  for (const Release& release : barrier.current) add_release(barrier.ended, release);
  barrier.current.clear();
  for (Fiber* fiber : barrier.waiting) wake(fiber);
  barrier.waiting.clear();
  made_progress();
}

}  // namespace

void mbarrier_init(uint64_t* address, unsigned count) {
  require_shared(address, sizeof(*address), sizeof(*address), "mbarrier", running()->home);
  check_access(address, sizeof(*address), Access::write, EMULATOR_PC);
  if (count == 0 || count >= 1u << 20) fail("mbarrier.init: a count of %u", count);
  *address = 0;
  MBarrier& barrier = running()->home->mbarriers[address];
  if (!barrier.waiting.empty()) fail_with_state("an mbarrier is initialised while threads wait for it");
  barrier = {count, static_cast<long>(count)};
}

void mbarrier_arrive(uint64_t* address, unsigned expected_bytes, Scope scope) {
  Fiber* fiber = running();
  MBarrier& barrier = find_mbarrier(address);
  check_access(address, sizeof(*address), Access::ordered_write, EMULATOR_PC);
  if (scope == Scope::block && owner_of(address) != fiber->home) fail("an arrival at another block's mbarrier must be remote");
  if (barrier.arrivals_left == 0) fail_with_state("more than the %u arrivals that an mbarrier counts in a phase", barrier.count);
  if (checks_races) add_release(barrier.current, {fiber->home->id, fiber->home->cluster->id, scope, fiber->released()});
  barrier.bytes_left += expected_bytes;
  --barrier.arrivals_left;
  end_phase_if_complete(barrier);
  yield();
}

void complete_bytes(uint64_t* address, unsigned bytes, const Knowledge& knowledge) {
  MBarrier& barrier = find_mbarrier(address);
  // The copy is known to whoever waits, in whatever scope.
  if (checks_races) add_release(barrier.current, {owner_of(address)->id, owner_of(address)->cluster->id, Scope::device, knowledge});
  barrier.bytes_left -= bytes;
  end_phase_if_complete(barrier);
}

bool mbarrier_wait(uint64_t* address, unsigned parity, Scope scope, bool may_sleep) {
  Fiber* fiber = running();
  require_shared(address, sizeof(*address), sizeof(*address), "mbarrier", fiber->home);
  check_access(address, sizeof(*address), Access::ordered_read, EMULATOR_PC);
  if (parity > 1) fail("a parity is 0 or 1, not %u", parity);
  MBarrier& barrier = find_mbarrier(address);
  if ((barrier.phase & 1) == parity) {
    // It may sleep until the phase is over, or come back without result.
    if (may_sleep && random_below(8)) {
      barrier.waiting.push_back(fiber);
      wait_for("mbarrier at byte", static_cast<unsigned char*>(static_cast<void*>(address)) - fiber->home->shared);
    } else {
      yield();
      return false;
    }
  }
  for (const Release& release : barrier.ended)
    if (reaches(release, *fiber, scope)) fiber->learn(release.knowledge);
  return true;
}

// ---- clusters ----

unsigned cluster_rank() { return running()->home->rank; }
unsigned cluster_size() { return static_cast<unsigned>(running()->home->cluster->blocks.size()); }

const void* mapa(const void* shared, unsigned rank) {
  const Block& block = *running()->home;
  require_shared(shared, 1, 1, "mapa", &block);
  if (rank >= block.cluster->blocks.size()) fail("mapa: block %u of a cluster of %zu", rank, block.cluster->blocks.size());
  const Block& other = *block.cluster->blocks[rank];
  if (other.finished_fibers == other.fibers.size()) fail("mapa: block %u of the cluster has exited", rank);
  return other.shared + (static_cast<const unsigned char*>(shared) - block.shared);
}

void cluster_arrive() {
  Fiber* fiber = running();
  Cluster& cluster = *fiber->home->cluster;
  unsigned& arrived_in = fiber->home->cluster_generations[fiber->index];
  if (arrived_in > cluster.generation) fail_with_state("a thread arrives twice at the cluster's barrier");
  arrived_in = cluster.generation + 1;
  attend(cluster.meeting, *fiber);
  if (++cluster.arrived == cluster.blocks.size() * fiber->home->fibers.size()) {
    cluster.met = checks_races ? cluster.meeting.knowledge() : nullptr;
    cluster.meeting = {};
    cluster.arrived = 0;
    ++cluster.generation;
    for (Fiber* other : cluster.waiting) wake(other);
    cluster.waiting.clear();
    made_progress();
  }
  yield();
}

void cluster_wait() {
  Fiber* fiber = running();
  Cluster& cluster = *fiber->home->cluster;
  const unsigned generation = fiber->home->cluster_generations[fiber->index];
  if (generation == 0) fail_with_state("a thread waits at the cluster's barrier without having arrived");
  if (cluster.generation < generation) {
    cluster.waiting.push_back(fiber);
    wait_for("the cluster's barrier, phase", generation);
  }
  fiber->learn(cluster.met);
}

}  // namespace emulator
