// Checks the tile unit in software, and the processor's where it has one: both must agree to the bit, in products of every
// shape and in the attention kernels. No PyTorch in it, so that it also runs as the only program of a small machine:
// as its first process it mounts what it needs, and switches the machine off at the end.
//
//   tile_unit_program            runs all checks and prints PASS or what is wrong
//   tile_unit_program attention  prints a number made of all results of the attention kernels
#include <fcntl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include <bit>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>

#define KERNEL_SOURCE "attention_kernel.h"
#include "cpu/attention_tasks.h"
#include "cpu/for_each_isa.h"

namespace {

using bmk::bfloat16;
using bmk::HardwareTiles;
using bmk::SoftwareTiles;
using bmk::TileConfig;
using bmk::avx512::TileProduct;

int failures = 0;

void expect(bool right, const std::string& what) {
  if (right) return;
  std::printf("WRONG: %s\n", what.c_str());
  ++failures;
}

std::mt19937 draw(1);

bfloat16 from_float(float x) { return {static_cast<uint16_t>(std::bit_cast<uint32_t>(x) >> 16)}; }
float to_float(bfloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

enum class Numbers { normal, wide, any };

// normal: about 1; wide: exponents from denormal to nearly overflowing; any: also infinities and NaNs.
bfloat16 number(Numbers numbers) {
  if (numbers == Numbers::normal) return from_float(std::normal_distribution<float>()(draw));
  for (;;) {
    const bfloat16 x{static_cast<uint16_t>(draw())};
    if (numbers == Numbers::any || (x.bits & 0x7f80) != 0x7f80) return x;
  }
}

std::vector<bfloat16> matrix(int64_t count, Numbers numbers) {
  std::vector<bfloat16> out(count);
  for (bfloat16& x : out) x = number(numbers);
  return out;
}

// The same bits; any NaN is like any other.
bool same(float a, float b) { return (std::isnan(a) && std::isnan(b)) || std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b); }

void check_faults() {
  const auto faults = [](const std::string& what, const std::function<void()>& run) {
    bool thrown = false;
    try {
      run();
    } catch (const std::runtime_error&) {
      thrown = true;
    }
    SoftwareTiles::release();
    expect(thrown, what + " must fault");
  };
  alignas(64) char memory[1024] = {};
  faults("a load without a configuration", [&] { SoftwareTiles::load<0>(memory, 64); });
  faults("a product without a configuration", [] { SoftwareTiles::multiply<0, 4, 6>(); });
  const auto with = [](auto change) {
    TileConfig config = TileConfig::of_rows(16);
    change(config);
    SoftwareTiles::configure(config);
  };
  faults("palette 2", [&] { with([](TileConfig& c) { c.palette = 2; }); });
  faults("a reserved byte", [&] { with([](TileConfig& c) { c.reserved[3] = 1; }); });
  faults("17 rows", [&] { with([](TileConfig& c) { c.rows[0] = 17; }); });
  faults("68 bytes", [&] { with([](TileConfig& c) { c.row_bytes[1] = 68; }); });
  faults("rows without bytes", [&] { with([](TileConfig& c) { c.row_bytes[1] = 0; }); });
  faults("a ninth tile", [&] { with([](TileConfig& c) { c.rows[8] = c.row_bytes[8] = 16; }); });
  faults("a tile that is not configured", [&] {
    with([](TileConfig& c) { c.rows[2] = c.row_bytes[2] = 0; });
    SoftwareTiles::zero<2>();
  });
  faults("the same tile twice", [&] {
    with([](TileConfig&) {});
    SoftwareTiles::multiply<0, 4, 4>();
  });
  faults("C with other rows than A", [&] {
    with([](TileConfig& c) { c.rows[4] = 8; });
    SoftwareTiles::multiply<0, 4, 6>();
  });
  faults("B with other steps than A", [&] {
    with([](TileConfig& c) { c.rows[6] = 8; });
    SoftwareTiles::multiply<0, 4, 6>();
  });
  faults("C with other columns than B", [&] {
    with([](TileConfig& c) { c.row_bytes[6] = 32; });
    SoftwareTiles::multiply<0, 4, 6>();
  });
}

// One multiplication of tiles of any shape: C in tile 1, A in 5, B in 7; and what lies around them in memory.
template <class Unit>
std::vector<float> multiply_once(int rows, int columns, int pairs, const std::vector<bfloat16>& a, const std::vector<bfloat16>& b,
                                 std::vector<float> c) {
  TileConfig config;
  config.rows[1] = config.rows[5] = static_cast<uint8_t>(rows), config.rows[7] = static_cast<uint8_t>(pairs);
  config.row_bytes[1] = config.row_bytes[7] = static_cast<uint16_t>(4 * columns), config.row_bytes[5] = static_cast<uint16_t>(4 * pairs);
  Unit::configure(config);
  Unit::template load<1>(c.data(), 80);
  Unit::template load<5>(a.data(), 68);
  Unit::template load<7>(b.data(), 72);
  Unit::template multiply<1, 5, 7>();
  Unit::template store<1>(c.data(), 80);
  Unit::release();
  return c;
}

// Against double arithmetic, and the two units against each other.
void check_shapes(bool hardware) {
  for (int trial = 0; trial < 300; ++trial) {
    const int rows = 1 + draw() % 16, columns = 1 + draw() % 16, pairs = 1 + draw() % 16;
    const Numbers numbers = static_cast<Numbers>(trial % 3);
    const std::vector<bfloat16> a = matrix(16 * 34, numbers), b = matrix(16 * 36, numbers);
    std::vector<float> c(16 * 20);
    for (float& x : c) x = to_float(number(numbers));
    const std::vector<float> software = multiply_once<SoftwareTiles>(rows, columns, pairs, a, b, c);
    const std::string shape = std::to_string(rows) + " x " + std::to_string(columns) + " x " + std::to_string(pairs);
    for (int i = 0; i < 16 * 20; ++i) {
      const int m = i / 20, n = i % 20;
      if (m >= rows || n >= columns) {
        expect(same(software[i], c[i]), shape + ": memory outside of the tile has changed");
      } else if (numbers == Numbers::normal) {
        double sum = c[i], size = std::fabs(c[i]);
        for (int k = 0; k < 2 * pairs; ++k) {
          const double term = double{to_float(a[m * 34 + k])} * to_float(b[k / 2 * 36 + 2 * n + k % 2]);
          sum += term, size += std::fabs(term);
        }
        expect(std::fabs(software[i] - sum) <= 1e-6 * size, shape + ": the sum is wrong");
      }
    }
    if (!hardware) continue;
    const std::vector<float> found = multiply_once<HardwareTiles>(rows, columns, pairs, a, b, c);
    for (int i = 0; i < 16 * 20; ++i)
      if (!same(software[i], found[i])) {
        std::printf("%s, numbers %d, element %d: software %a, processor %a\n", shape.c_str(), trial % 3, i, software[i], found[i]);
        expect(false, shape + ": the units differ");
        break;
      }
  }
}

template <class Unit>
std::vector<float> product(TileProduct p, std::vector<float> c) {
  p.c = c.data();
  int64_t configured = 0;
  bmk::avx512::multiply_in_tiles<Unit>(p, configured);
  Unit::release();
  return c;
}

void check_products(bool hardware) {
  for (int trial = 0; trial < 24; ++trial) {
    const int64_t rows = 1 + draw() % 50, columns = 16 * (1 + draw() % 5), steps = 32 * (1 + draw() % 3), blocks = (columns + 31) / 32;
    // Runs of 32 steps or one row of all of them; a run of all rows lies before the next.
    const bool runs = trial % 3 == 0;
    const int64_t run = runs ? 32 : steps, a_row = run + 8, a_run = rows * a_row;
    const std::vector<bfloat16> a = matrix(steps / run * a_run, Numbers::normal), b = matrix(blocks * steps * 32, Numbers::normal);
    std::vector<float> c(rows * (columns + 4), 0.5f);
    const TileProduct p{.rows = rows, .columns = columns, .steps = steps, .a = a.data(), .a_row = a_row, .run = run, .a_run = a_run, .b = b.data(), .b_pair = 64,
                        .b_block = steps * 32, .c = nullptr, .c_row = columns + 4, .add = trial % 2 == 1};
    const std::vector<float> software = product<SoftwareTiles>(p, c);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns + 4; ++j) {
        double sum = 0.5, size = 1;
        if (j < columns) {
          sum = p.add ? 0.5 : 0;
          for (int64_t k = 0; k < steps; ++k) {
            const double term =
                double{to_float(a[k / run * a_run + i * a_row + k % run])} * to_float(b[j / 32 * p.b_block + k / 2 * p.b_pair + 2 * (j % 32) + k % 2]);
            sum += term, size += std::fabs(term);
          }
        }
        expect(std::fabs(software[i * p.c_row + j] - sum) <= 1e-6 * size, "a product of blocks is wrong");
      }
    if (hardware) expect(product<HardwareTiles>(p, c) == software, "the units differ in a product of blocks");
  }
}

// Threads that run into each other's time slices: the system must keep the tiles of each.
void check_threads() {
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t)
    threads.emplace_back([t] {
      float c[256], out[256];
      for (int i = 0; i < 256; ++i) c[i] = static_cast<float>(1000 * t + i);
      for (int round = 0; round < 200; ++round) {
        HardwareTiles::configure(TileConfig::of_rows(16));
        HardwareTiles::load<3>(c, 64);
        sched_yield();
        HardwareTiles::store<3>(out, 64);
        HardwareTiles::release();
        if (std::memcmp(c, out, sizeof c)) std::printf("WRONG: thread %d lost its tiles\n", t), std::_Exit(1);
      }
    });
  for (std::thread& thread : threads) thread.join();
}

// Forward and backward of several shapes and flags, every result turned into one number.
uint64_t attention_results() {
  uint64_t hash = 14695981039346656037u;
  const auto take = [&](const void* data, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i) hash = (hash ^ static_cast<const uint8_t*>(data)[i]) * 1099511628211u;
  };
  const int64_t shapes[][6] = {{1, 2, 1, 50, 17, 7}, {1, 1, 1, 50, 66, 16}, {2, 2, 1, 40, 200, 33}, {1, 2, 2, 70, 70, 80}};
  for (const auto& [batch, heads, kv_heads, q_len, k_len, dim] : shapes)
    for (int flags = 0; flags < 3; ++flags) {
      const int64_t rows = batch * heads * q_len, keys = batch * kv_heads * k_len, value_dim = dim + 3;
      const std::vector<bfloat16> q = matrix(rows * dim, Numbers::normal), k = matrix(keys * dim, Numbers::normal);
      const std::vector<bfloat16> v = matrix(keys * value_dim, Numbers::normal), grad = matrix(rows * value_dim, Numbers::normal);
      std::vector<bfloat16> out(rows * value_dim), dq(rows * dim), dk(keys * dim), dv(keys * value_dim);
      std::vector<float> lse(rows);
      bmk::AttentionBackward backward{};
      bmk::AttentionArgs& a = backward.a;
      a.batch = batch, a.heads = heads, a.kv_heads = kv_heads, a.q_len = q_len, a.k_len = k_len, a.head_dim = dim, a.value_dim = value_dim;
      a.q = {q.data(), {heads * q_len * dim, q_len * dim, dim, 1}};
      a.k = {k.data(), {kv_heads * k_len * dim, k_len * dim, dim, 1}};
      a.v = {v.data(), {kv_heads * k_len * value_dim, k_len * value_dim, value_dim, 1}};
      a.scale = 0.2, a.dropout_p = flags == 2 ? 0.25 : 0, a.softcap = flags == 2 ? 3 : 0, a.seed = 5;
      a.left = flags == 2 ? 20 : -1, a.right = flags ? 0 : -1, a.offset = 0;
      a.lse_stride = q_len;
      const bmk::AttentionForward forward{a, out.data(), lse.data()};
      bmk::avx512::attention_forward<bfloat16>(&forward, 1);
      bmk::AttentionGradArgs& g = backward.g;
      const bmk::Strided results{nullptr, {q_len * heads * value_dim, value_dim, heads * value_dim, 1}};
      g.out = results, g.out.data = out.data();
      g.grad_out = {grad.data(), {heads * q_len * value_dim, q_len * value_dim, value_dim, 1}};
      g.lse = {lse.data(), {heads * q_len, q_len, 1, 0}};
      g.dq = bmk::heads_inside(dq.data(), heads, q_len);
      g.dk = bmk::heads_inside(dk.data(), kv_heads, k_len), g.dv = bmk::heads_inside(dv.data(), kv_heads, k_len);
      bmk::avx512::attention_backward<bfloat16>(&backward, 1);
      take(lse.data(), lse.size() * sizeof lse[0]);
      for (const auto* t : {&out, &dq, &dk, &dv}) take(t->data(), t->size() * sizeof(bfloat16));
    }
  return hash;
}

// What this program prints with the argument "attention" and another instruction set.
std::string attention_in_process(const char* isa) {
  int ends[2];
  if (pipe(ends)) return "no pipe";
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], 1);
    setenv("BIGMODEL_ISA", isa, 1);
    execl("/proc/self/exe", "tile_unit_program", "attention", nullptr);
    std::_Exit(127);
  }
  close(ends[1]);
  std::string said(256, '\0');
  said.resize(std::max<ssize_t>(0, read(ends[0], said.data(), said.size())));
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  return status ? "exit status " + std::to_string(status) : said;
}

int run() {
  const std::string& why = bmk::why_no_tiles();
  const bool hardware = why.empty();
  std::printf("the processor's tiles: %s\n", hardware ? "in use" : why.c_str());
  check_faults();
  expect(bmk::check_tiles<SoftwareTiles>().empty(), "the check of the unit itself fails in software");
  check_shapes(hardware);
  check_products(hardware);
  if (hardware) check_threads();
  if (bmk::selected_isa() == bmk::Isa::avx512_bf16) {
    const std::string software = attention_in_process("amx_emulated"), dots = attention_in_process("avx512_bf16");
    std::printf("attention: %s dot products %s", software.c_str(), dots.c_str());
    expect(software.starts_with("software") && dots.starts_with("none") && software.substr(9) != dots.substr(5), "attention in software");
    if (hardware) {
      const std::string found = attention_in_process("amx");
      std::printf("attention: %s", found.c_str());
      expect(found.starts_with("hardware") && found.substr(9) == software.substr(9), "the units differ in attention");
    }
  }
  std::printf(failures ? "FAIL\n" : "PASS\n");
  return failures ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "attention") {
    const char* names[] = {"none", "software", "hardware"};
    std::printf("%s %016llx\n", names[static_cast<int>(bmk::selected_tiles())], static_cast<unsigned long long>(attention_results()));
    return 0;
  }
  const bool alone = getpid() == 1;
  if (alone) mount("proc", "/proc", "proc", 0, nullptr);
  const int status = run();
  if (!alone) return status;
  std::fflush(stdout);
  tcdrain(1);
  return reboot(RB_POWER_OFF);
}
