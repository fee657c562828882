// A `str` argument of a native op. torch::stable takes one as std::string by a `new` that nothing deletes, up to and with PyTorch 2.13
// (its issue 191340): 48 bytes lost at every call, each of which keeps the free memory on its two sides apart, so that the heap
// of a training loop grew by gigabytes.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>
#include <utility>

namespace bmk {

class Text {
 public:
  explicit Text(std::string characters) : characters_(std::move(characters)) {}
  operator const std::string&() const { return characters_; }
  bool operator==(const char* other) const { return characters_ == other; }

 private:
  std::string characters_;
};

}  // namespace bmk

namespace torch::stable::detail {

template <>
struct ToImpl<bmk::Text> {
  static bmk::Text call(StableIValue value, uint64_t, bool) {
    const StringHandle handle = to<StringHandle>(value);
    size_t length;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    const char* characters;
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &characters));
    bmk::Text text(std::string(characters, length));
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};

}  // namespace torch::stable::detail
