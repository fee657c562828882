// Copies that run by themselves. Their destination holds NaNs until they are over, and that is as late as the waits allow
// (cp.async) or at any time (bulk copies and st.async).
#include <algorithm>

#include "runtime.h"

namespace emulator {

namespace {

struct BulkCopy {
  unsigned char* to;
  const unsigned char* from;  // null if the data was given
  std::vector<unsigned char> data;
  unsigned bytes;
  uint64_t* barrier;  // null for a copy to global memory
  const Fiber* issuer;
  std::size_t group;
  Agent agent;
  uint32_t epoch;
};
std::vector<BulkCopy> under_way;

void invalidate(void* to, std::size_t bytes) { std::memset(to, 0xff, bytes); }

void run_group(const std::vector<Copy>& group) {
  for (const Copy& copy : group) {
    std::memcpy(copy.to, copy.from, static_cast<std::size_t>(copy.valid));
    std::memset(copy.to + copy.valid, 0, static_cast<std::size_t>(copy.bytes - copy.valid));
  }
}

void finish_bulk(std::size_t i) {
  BulkCopy copy = std::move(under_way[i]);
  under_way.erase(under_way.begin() + static_cast<std::ptrdiff_t>(i));
  std::memcpy(copy.to, copy.from ? copy.from : copy.data.data(), copy.bytes);
  if (!copy.barrier) return;
  Meeting meeting;
  meeting.add(copy.agent, copy.epoch);
  complete_bytes(copy.barrier, copy.bytes, checks_races ? meeting.knowledge() : nullptr);
}

void issue(void* to, const void* from, std::vector<unsigned char> data, unsigned bytes, uint64_t* barrier, const void* pc) {
  Fiber& fiber = *running();
  const Agent agent = fiber.bulk_agent();
  const uint32_t epoch = fiber.bulk_epoch++;
  if (barrier) {
    require_shared(to, bytes, 1, "asynchronous copy", nullptr);
    require_shared(barrier, 8, 8, "asynchronous copy", owner_of(to));
    if (owner_of(to)->cluster != fiber.home->cluster) fail("asynchronous copy to a block of another cluster");
  }
  if (from) check_access(from, bytes, Access::read, pc, agent, epoch);
  check_access(to, bytes, Access::write, pc, agent, epoch);
  if (barrier) invalidate(to, bytes);
  under_way.push_back({static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), std::move(data), bytes, barrier, &fiber,
                       fiber.bulk_groups.size(), agent, epoch});
  yield();
}

void require_bulk(const void* a, const void* b, unsigned bytes) {
  require_aligned(a, 16, "bulk copy");
  require_aligned(b, 16, "bulk copy");
  if (bytes % 16) fail("bulk copy of %u bytes, which is no multiple of 16", bytes);
}

}  // namespace

// ---- cp.async ----

void cp_async(void* shared, const void* global, int bytes, int valid) {
  Fiber& fiber = *running();
  const auto size = static_cast<std::size_t>(bytes);
  require_shared(shared, size, size, "cp.async", fiber.home);
  require_aligned(global, size, "cp.async");
  if (valid < 0 || valid > bytes) fail("cp.async: %d valid bytes of %d", valid, bytes);
  check_access(global, static_cast<std::size_t>(valid), Access::read, EMULATOR_PC, fiber.copy_agent(), fiber.copy_epoch);
  check_access(shared, size, Access::write, EMULATOR_PC, fiber.copy_agent(), fiber.copy_epoch);
  invalidate(shared, size);
  fiber.open_copies.push_back({static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), bytes, valid});
}

void cp_async_commit() {
  Fiber& fiber = *running();
  fiber.copy_groups.push_back(std::move(fiber.open_copies));
  fiber.open_copies.clear();
  ++fiber.copy_epoch;
}

void cp_async_wait(int pending) {
  Fiber& fiber = *running();
  while (fiber.copy_groups.size() > static_cast<std::size_t>(pending)) {
    run_group(fiber.copy_groups.front());
    fiber.copy_groups.pop_front();
  }
  if (checks_races) fiber.learn(fiber.copy_agent(), fiber.copy_epoch - 1 - static_cast<uint32_t>(fiber.copy_groups.size()));
  yield();
}

void finish_copies_of(Fiber& fiber) {
  for (const auto& group : fiber.copy_groups) run_group(group);
  run_group(fiber.open_copies);
}

// ---- st.async and bulk copies ----

void st_async(void* remote, const void* value, unsigned bytes, uint64_t* remote_barrier) {
  require_aligned(remote, bytes, "st.async");
  const auto* p = static_cast<const unsigned char*>(value);
  issue(remote, nullptr, {p, p + bytes}, bytes, remote_barrier, EMULATOR_PC);
}

void bulk_copy(void* to, const void* from, unsigned bytes, uint64_t* barrier) {
  require_bulk(to, from, bytes);
  issue(to, from, {}, bytes, barrier, EMULATOR_PC);
}

void bulk_store(void* global, const void* shared, unsigned bytes) {
  require_bulk(global, shared, bytes);
  require_shared(shared, bytes, 16, "bulk copy", running()->home);
  issue(global, shared, {}, bytes, nullptr, EMULATOR_PC);
}

void bulk_commit() { running()->bulk_groups.push_back(running()->bulk_epoch); }

void bulk_wait(int pending) {
  Fiber& fiber = *running();
  const std::size_t groups = fiber.bulk_groups.size(), over = groups - std::min(groups, static_cast<std::size_t>(pending));
  if (over == 0) return;
  for (std::size_t i = 0; i < under_way.size();) {
    if (under_way[i].issuer == &fiber && under_way[i].group < over)
      finish_bulk(i);
    else
      ++i;
  }
  if (checks_races) fiber.learn(fiber.bulk_agent(), fiber.bulk_groups[over - 1] - 1);
}

bool async_pending() { return !under_way.empty(); }
void finish_some_async() { finish_bulk(random_below(under_way.size())); }

void refuse_async_in(const Block& block) {
  for (const BulkCopy& copy : under_way)
    if (owner_of(copy.to) == &block || (copy.from && owner_of(copy.from) == &block))
      fail_with_state("a block ended while a copy from or to its shared memory was under way");
}

}  // namespace emulator
