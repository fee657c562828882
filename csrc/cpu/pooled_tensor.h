// Tensors of what a forward keeps for its backward, in memory that outlives them: the allocator of the process gives large blocks
// back to the system and faults every page in again at the next step, or not, as its heap happens to stand. These come from the
// pool of scratch.h and return to it.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdlib>
#include <memory>

#include "new_tensor.h"
#include "scratch.h"

// Of torch 2.11 and later; null where this library, which is built for 2.10, runs on that.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides,
                                                                int64_t storage_offset, int32_t dtype, int32_t device_type,
                                                                int32_t device_index, AtenTensorHandle* result, int32_t layout,
                                                                const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
                                                                void (*deleter)(void* data, void* context), void* context);

namespace bmk {

namespace pooled {

// Set when the pool of this thread is about to go: a tensor that outlives it frees its memory itself.
inline thread_local bool pool_is_gone = false;
struct Farewell {
  ~Farewell() { pool_is_gone = true; }
};

inline void give_back(void*, void* context) {
  const std::unique_ptr<ScratchPool::Block> block(static_cast<ScratchPool::Block*>(context));
  if (pool_is_gone) {
    std::free(block->memory);
    return;
  }
  ScratchPool& pool = ScratchPool::of_this_thread();
  thread_local Farewell farewell;  // made after the pool, so gone before it
  pool.give(*block);
}

}  // namespace pooled

// A contiguous, uninitialised CPU tensor of three dimensions.
inline torch::stable::Tensor pooled_empty(std::array<int64_t, 3> sizes, torch::headeronly::ScalarType dtype, size_t element_size) {
  constexpr size_t kWorthwhile = 64 << 10;
  const size_t bytes = static_cast<size_t>(sizes[0] * sizes[1] * sizes[2]) * element_size;
  if (!torch_from_blob || bytes < kWorthwhile) return new_contiguous({sizes[0], sizes[1], sizes[2]}, dtype);
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const std::array<int64_t, 3> strides{sizes[1] * sizes[2], sizes[2], 1};
  auto block = std::make_unique<ScratchPool::Block>(ScratchPool::of_this_thread().take(bytes));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(torch_from_blob(block->memory, 3, sizes.data(), strides.data(), 0, to<int32_t>(from(dtype)),
                                         aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0,
                                         pooled::give_back, block.get()));
  block.release();  // the tensor's now
  return torch::stable::Tensor(handle);
}

}  // namespace bmk
