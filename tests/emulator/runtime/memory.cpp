// Memory that kernels may touch: where it begins and ends, what was written, and whether two accesses race.
#include <sys/mman.h>

#include <algorithm>

#include "runtime.h"

namespace emulator {

bool checks_races = false;

namespace {

constexpr std::size_t kPage = 4096, kReserved = std::size_t{16} << 30;
constexpr std::size_t kWordBytes = 4;

// One access to some bytes of a word.
struct Touch {
  Agent agent;
  uint32_t epoch;
  uint32_t pc;    // programs are linked below 4 GiB
  uint8_t bytes;  // a bit for each
  Access access;
};
constexpr int kTouches = 8;  // remembered for a word; when they are used up, one of them is forgotten at random
struct Word {
  Touch touches[kTouches];
  uint8_t used = 0, written = 0;
};
constexpr std::size_t kShadowWords = 256;

struct Region {
  unsigned char* begin;
  std::size_t bytes;
  std::string name;
  Block* owner;                                               // null for global memory
  std::vector<std::pair<std::size_t, std::size_t>> declared;  // from, to
  std::vector<std::unique_ptr<Word[]>> shadow;
};

unsigned char* reserve() {
  void* p = mmap(nullptr, kReserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) fail("cannot reserve address space");
  return static_cast<unsigned char*>(p);
}
unsigned char* const reserved = reserve();
std::size_t used = 0;
std::map<std::size_t, Region> regions;  // by offset
Region* last_found = nullptr;

std::size_t pages(std::size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

// The region that holds the address, or the nearest one before it.
Region* region_at(const void* address) {
  const auto offset = static_cast<std::size_t>(static_cast<const unsigned char*>(address) - reserved);
  if (offset >= kReserved) return nullptr;
  if (last_found && offset - static_cast<std::size_t>(last_found->begin - reserved) < last_found->bytes) return last_found;
  auto found = regions.upper_bound(offset);
  if (found == regions.begin()) return nullptr;
  return last_found = &(--found)->second;
}

bool is_write(Access access) { return access == Access::write || access == Access::ordered_write; }
bool is_ordered(Access access) { return access == Access::ordered_read || access == Access::ordered_write; }

std::string describe(Agent agent) {
  const std::size_t threads = std::size_t{block_size.x} * block_size.y * block_size.z;
  static const char* const kinds[] = {"thread ", "cp.async of thread ", "bulk copy of thread "};
  return kinds[agent.index / threads] + std::to_string(agent.index % threads) + " of block " + std::to_string(agent.block);
}

const char* describe(Access access) {
  switch (access) {
    case Access::read: return "read";
    case Access::write: return "write";
    case Access::ordered_read: return "ordered read";
    default: return "ordered write";
  }
}

// Bulk copies see what threads wrote only after a fence of the writer's, or of the thread that issues the copy.
bool behind_proxy_fence(const Touch& touch, const Region& region) {
  const Fiber& issuer = *running();
  const std::size_t threads = issuer.home->fibers.size();
  if (touch.agent.index >= threads || !region.owner || touch.agent.block != region.owner->id) return true;
  return region.owner->fibers[touch.agent.index]->epoch_of_proxy_fence > touch.epoch ||
         knows(issuer.known_at_proxy_fence, touch.agent, touch.epoch);
}

void check_word(Region& region, std::size_t index, const Touch& now) {
  if (region.shadow.empty()) region.shadow.resize(region.bytes / kWordBytes / kShadowWords + 1);
  auto& group = region.shadow[index / kShadowWords];
  if (!group) group = std::make_unique<Word[]>(kShadowWords);
  Word& word = group[index % kShadowWords];
  const Fiber& fiber = *running();
  const bool bulk = now.agent == fiber.bulk_agent();
  int kept = 0;
  for (int i = 0; i < word.used; ++i) {
    const Touch& then = word.touches[i];
    const bool same_bytes = then.bytes & now.bytes;
    const bool ordered = then.agent == now.agent || then.agent == fiber.agent() || knows(fiber.known, then.agent, then.epoch);
    if (same_bytes && !ordered && (is_write(then.access) || is_write(now.access)) && !(is_ordered(then.access) && is_ordered(now.access)))
      fail("race in %s, byte %zu: this %s by %s (pc=0x%x) and the %s by %s (pc=0x%x) before it are not ordered", region.name.c_str(),
           index * kWordBytes, describe(now.access), describe(now.agent).c_str(), now.pc, describe(then.access),
           describe(then.agent).c_str(), then.pc);
    if (same_bytes && bulk && then.access == Access::write && !is_write(now.access) && !behind_proxy_fence(then, region))
      fail("%s, byte %zu: a bulk copy (pc=0x%x) reads what %s wrote (pc=0x%x) without fence_proxy_async between", region.name.c_str(),
           index * kWordBytes, now.pc, describe(then.agent).c_str(), then.pc);
    // Who is ordered after this access is ordered after those before it.
    const bool superseded = ordered && (then.bytes & ~now.bytes) == 0 && (is_write(now.access) || then.access == now.access);
    if (!superseded) word.touches[kept++] = then;
  }
  word.used = static_cast<uint8_t>(kept < kTouches ? kept + 1 : kTouches);
  word.touches[kept < kTouches ? kept : static_cast<int>(random_below(kTouches))] = now;
  if (is_write(now.access))
    word.written |= now.bytes;
  else if (region.owner && now.bytes & ~word.written)
    fail("%s, byte %zu, is read (pc=0x%x) and was never written", region.name.c_str(), index * kWordBytes, now.pc);
}

[[noreturn]] void out_of_bounds(const Region& region, const unsigned char* address, std::size_t bytes, Access access, const void* pc) {
  std::string extents;
  for (const auto& [from, to] : region.declared) extents += " [" + std::to_string(from) + ", " + std::to_string(to) + ")";
  fail("%s of %zu bytes out of bounds: at byte %td of %s, of which there are%s (pc=%p)", describe(access), bytes, address - region.begin,
       region.name.c_str(), extents.c_str(), pc);
}

Region& require_declared(const void* pointer, std::size_t bytes, Access access, const void* pc) {
  const auto* address = static_cast<const unsigned char*>(pointer);
  Region* region = region_at(address);
  if (region) {
    const auto from = static_cast<std::size_t>(address - region->begin);
    for (const auto& [begin, end] : region->declared)
      if (from >= begin && from + bytes <= end) return *region;
  }
  if (!is_device_memory(address)) fail("%p is not memory of the device (%s of %zu bytes, pc=%p)", pointer, describe(access), bytes, pc);
  // Just before a region, or somewhere behind its beginning.
  const auto next = regions.upper_bound(static_cast<std::size_t>(address - reserved));
  if (next != regions.end() && next->second.begin - address < static_cast<std::ptrdiff_t>(kPage)) region = &next->second;
  if (region) out_of_bounds(*region, address, bytes, access, pc);
  fail("%s of %zu bytes out of bounds: at %p, where nothing is (pc=%p)", describe(access), bytes, pointer, pc);
}

}  // namespace

bool is_device_memory(const void* address) {
  return static_cast<std::size_t>(static_cast<const unsigned char*>(address) - reserved) < kReserved;
}

unsigned char* new_region(std::size_t bytes, std::string name, Block* owner) {
  const std::size_t offset = used + kPage;  // a page that belongs to nobody lies between
  used = offset + pages(bytes ? bytes : 1);
  if (used + kPage > kReserved) fail("out of address space");
  Region& region = regions[offset];
  region = {reserved + offset, bytes, std::move(name), owner, {}, {}};
  if (__asan_poison_memory_region) __asan_poison_memory_region(region.begin - kPage, pages(bytes) + 2 * kPage);
  return region.begin;
}

void declare(unsigned char* from, std::size_t bytes) {
  Region& region = *region_at(from);
  const auto offset = static_cast<std::size_t>(from - region.begin);
  region.declared.emplace_back(offset, offset + bytes);
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(from, bytes);
  if (region.owner) std::memset(from, 0xff, bytes);  // not a number, in every format
}

void end_region(unsigned char* begin) {
  const auto offset = static_cast<std::size_t>(begin - reserved);
  const std::size_t bytes = pages(regions.at(offset).bytes);
  regions.erase(offset);
  last_found = nullptr;
  if (__asan_poison_memory_region) __asan_poison_memory_region(begin, bytes);
  madvise(begin, bytes, MADV_DONTNEED);
}

Block* owner_of(const void* shared) {
  const Region* region = region_at(shared);
  const bool inside = region && static_cast<const unsigned char*>(shared) < region->begin + region->bytes;
  return inside ? region->owner : nullptr;
}

unsigned char* dynamic_shared() { return running()->home->shared; }

void* static_shared(const char* name, int line, std::size_t bytes, std::size_t alignment) {
  // The same place in every block of a launch: the address is what mapa maps.
  static std::map<std::tuple<std::string_view, int, std::size_t>, std::size_t> places;
  static std::size_t end = 0;
  const auto [place, is_new] = places.try_emplace({name, line, bytes});
  if (is_new) {
    constexpr std::size_t kRedzone = 64;
    if (end == 0) end = (launch.shared_bytes + kRedzone + 127) / 128 * 128;
    place->second = (end + alignment - 1) / alignment * alignment;
    end = place->second + bytes + kRedzone;
    if (end > launch.shared_bytes + kStaticShared) fail("more than %zu bytes of static shared memory", kStaticShared);
  }
  unsigned char* address = running()->home->shared + place->second;
  const Region& region = *region_at(address);
  for (const auto& [from, to] : region.declared)
    if (from == place->second && to == from + bytes) return address;
  declare(address, bytes);
  return address;
}

void check_access(const void* address, std::size_t bytes, Access access, const void* pc) {
  const Fiber& fiber = *running();
  check_access(address, bytes, access, pc, fiber.agent(), fiber.epoch);
}

void check_access(const void* address, std::size_t bytes, Access access, const void* pc, Agent agent, uint32_t epoch) {
  if (bytes == 0) return;
  Region& region = require_declared(address, bytes, access, pc);
  if (!checks_races) return;
  const auto from = static_cast<std::size_t>(static_cast<const unsigned char*>(address) - region.begin);
  Touch touch{agent, epoch, static_cast<uint32_t>(reinterpret_cast<uintptr_t>(pc)), 0, access};
  for (std::size_t word = from / kWordBytes; word * kWordBytes < from + bytes; ++word) {
    touch.bytes = 0;
    for (std::size_t i = 0; i < kWordBytes; ++i)
      if (const std::size_t byte = word * kWordBytes + i; byte >= from && byte < from + bytes) touch.bytes |= static_cast<uint8_t>(1u << i);
    check_word(region, word, touch);
  }
}

void require_aligned(const void* address, std::size_t alignment, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % alignment) fail("%s: address %p is not a multiple of %zu", what, address, alignment);
}

void require_shared(const void* address, std::size_t bytes, std::size_t alignment, const char* what, const Block* owner) {
  const Region* region = region_at(address);
  if (!region || !region->owner || (owner && region->owner != owner) ||
      static_cast<const unsigned char*>(address) + bytes > region->begin + region->bytes)
    fail("%s: %p is not in %s", what, address, owner ? "this block's shared memory" : "shared memory");
  require_aligned(address, alignment, what);
}

// ---- ordered accesses ----

namespace {

std::unordered_map<const void*, std::vector<Release>> released_at;

void publish(const void* address, Scope scope, const Knowledge& knowledge) {
  const Block& block = *running()->home;
  if (knowledge) add_release(released_at[address], {block.id, block.cluster->id, scope, knowledge});
}

}  // namespace

// What was released from the same block with the same reach is kept together.
void add_release(std::vector<Release>& releases, const Release& release) {
  for (Release& old : releases)
    if (old.block == release.block && old.scope == release.scope) {
      old.knowledge = together(old.knowledge, release.knowledge);
      return;
    }
  releases.push_back(release);
}

bool reaches(const Release& release, const Fiber& to, Scope scope) {
  const Scope narrower = release.scope < scope ? release.scope : scope;
  if (narrower == Scope::block) return release.block == to.home->id;
  return narrower == Scope::device || release.cluster == to.home->cluster->id;
}

void begin_access(const void* address, std::size_t bytes, bool writes, const char* what) {
  require_aligned(address, bytes, what);
  yield();
  check_access(address, bytes, writes ? Access::ordered_write : Access::ordered_read, EMULATOR_PC);
}

void copy_bytes(void* to, const void* from, std::size_t bytes) { std::memcpy(to, from, bytes); }

void end_load(const void* address, Order order, Scope scope) {
  if (!checks_races) return;
  const auto found = released_at.find(address);
  if (found == released_at.end()) return;
  Fiber& fiber = *running();
  for (const Release& release : found->second) {
    if (!reaches(release, fiber, scope)) continue;
    if (order == Order::relaxed)
      add_release(fiber.not_yet_acquired, release);
    else
      fiber.learn(release.knowledge);
  }
}

void end_store(const void* address, Order order, Scope scope, bool read_modify_write, bool changes) {
  if (changes) made_progress();
  if (!checks_races) return;
  Fiber& fiber = *running();
  if (!read_modify_write) released_at[address].clear();  // a plain store ends the release sequences of others
  if (order == Order::release || order == Order::acq_rel) return publish(address, scope, fiber.released());
  for (const Scope reach : {Scope::block, Scope::cluster, Scope::device})
    publish(address, std::min(reach, scope), fiber.released_by_fence[static_cast<int>(reach)]);
}

// What was read before becomes known, and what is written from now on tells of what was done before: to those in reach.
void fence(Scope scope) {
  if (checks_races) {
    Fiber& fiber = *running();
    for (const Release& release : fiber.not_yet_acquired)
      if (reaches(release, fiber, scope)) fiber.learn(release.knowledge);
    const Knowledge released = fiber.released();
    for (int reach = 0; reach <= static_cast<int>(scope); ++reach) fiber.released_by_fence[reach] = released;
  }
  yield();
}

void fence_proxy_async() {
  Fiber& fiber = *running();
  if (!checks_races) return;
  fiber.known_at_proxy_fence = fiber.known;
  fiber.epoch_of_proxy_fence = ++fiber.epoch;
}

}  // namespace emulator
