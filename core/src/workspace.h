// Workspace: lays out a buffer by one function that is run twice, first to count bytes, then to hand out pointers.
#pragma once

#include <cstddef>

namespace mla {

class Workspace {
 public:
  // base = nullptr: count only; take() then returns nullptr.
  explicit Workspace(std::byte* base = nullptr) : base_(base) {}

  template <class T>
  T* take(size_t count, size_t alignment = 64) {
    bytes_ = (bytes_ + alignment - 1) / alignment * alignment;
    T* p = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + bytes_);
    bytes_ += count * sizeof(T);
    return p;
  }
  size_t bytes() const { return bytes_; }

 private:
  std::byte* base_;
  size_t bytes_ = 0;
};

}  // namespace mla
