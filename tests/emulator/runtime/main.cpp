// Reads one launch from standard input, runs it, and writes the buffers to standard output. emulator.py speaks the other side:
// words separated by spaces, then a newline, then the bytes of the buffers.
#include <algorithm>
#include <iostream>

#include "runtime.h"

namespace emulator {

namespace {

std::map<std::string, std::unique_ptr<Kernel>>& kernels() {
  static std::map<std::string, std::unique_ptr<Kernel>> all;
  return all;
}

struct Buffer {
  unsigned char* data;
  std::size_t bytes;
};
std::vector<Buffer> buffers;

std::string without_spaces(std::string name) {
  std::erase(name, ' ');
  return name;
}

Index read_index() {
  Index i;
  std::cin >> i.x >> i.y >> i.z;
  return i;
}

// pointer: p buffer offset | null: n | integer: i value | real: r value (hexadecimal) | list: ( ... )
Argument read_argument(const std::string& kind) {
  Argument a{Argument::pointer};
  if (kind == "p") {
    std::size_t buffer = 0, offset = 0;
    std::cin >> buffer >> offset;
    a.address = buffers.at(buffer).data + offset;
  } else if (kind == "i") {
    a.kind = Argument::integer;
    std::cin >> a.whole;
  } else if (kind == "r") {
    std::string word;
    std::cin >> word;
    a.kind = Argument::real;
    a.number = std::strtod(word.c_str(), nullptr);
  } else if (kind == "(") {
    a.kind = Argument::list;
    for (std::string word; std::cin >> word && word != ")";) a.members.push_back(read_argument(word));
  }
  return a;
}

void check_launch() {
  const auto& [kernel, grid, block, cluster, shared_bytes, live, seed] = launch;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64) fail("a block of (%u, %u, %u) threads", block.x, block.y, block.z);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    fail("a grid of (%u, %u, %u) blocks", grid.x, grid.y, grid.z);
  if (grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z) fail("the grid is no multiple of the cluster");
  if (uint64_t{cluster.x} * cluster.y * cluster.z > 16) fail("a cluster of more than 16 blocks");
  if (shared_bytes > kMostShared) fail("%u bytes of shared memory: a block has %zu at the most", shared_bytes, kMostShared);
}

}  // namespace

void add_kernel(const char* name, std::unique_ptr<Kernel> kernel) { kernels()[without_spaces(name)] = std::move(kernel); }

void wrong_arguments(const char* expected, std::size_t given) {
  fail("%s: an argument does not fit its parameter: expected %s (%zu)", launch.kernel.c_str(), expected, given);
}

int run_main() {
  std::ios::sync_with_stdio(false);
  std::cin >> launch.kernel;
  launch.grid = read_index();
  launch.block = read_index();
  launch.cluster = read_index();
  std::cin >> launch.shared_bytes >> launch.live_blocks >> launch.seed;
  check_launch();
  const auto found = kernels().find(launch.kernel);
  if (found == kernels().end()) fail("the program has no kernel %s", launch.kernel.c_str());
  std::size_t count = 0;
  std::cin >> count;
  for (std::size_t i = 0; i < count; ++i) {
    std::size_t bytes = 0;
    std::cin >> bytes;
    unsigned char* data = new_region(bytes, "buffer " + std::to_string(i), nullptr);
    declare(data, bytes);
    buffers.push_back({data, bytes});
  }
  std::vector<Argument> arguments;
  for (std::string word; std::cin >> word && word != ";";) arguments.push_back(read_argument(word));
  std::cin.get();  // the newline
  for (const Buffer& buffer : buffers) std::cin.read(reinterpret_cast<char*>(buffer.data), static_cast<std::streamsize>(buffer.bytes));
  if (!std::cin) fail("the description of the launch is cut short");
  found->second->bind(arguments);
  run_launch(*found->second);
  for (const Buffer& buffer : buffers)
    std::cout.write(reinterpret_cast<const char*>(buffer.data), static_cast<std::streamsize>(buffer.bytes));
  std::cout.flush();
  return std::cout ? 0 : 1;
}

}  // namespace emulator

int main() { return emulator::run_main(); }
