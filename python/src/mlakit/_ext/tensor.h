// Tensor: a Python object seen as an mla_tensor for the length of one call. Memory is borrowed, never copied.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>

#include "mlakit/mla.h"

namespace mlakit_py {

namespace nb = nanobind;

// A plain aligned host buffer: workspace of CPU plans, and outputs for callers without an array framework.
struct Buffer {
  Buffer(size_t nbytes, size_t alignment);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  size_t nbytes;
  size_t alignment;
  void* data;
};

struct Memory {
  void* data;
  uint64_t bytes;
};

struct ExchangeApi;
struct ManagedVersioned;

class Tensor {
 public:
  // object: None, a tensor with DLPack's C exchange API, a buffer (PEP 3118), a numpy array of an ml_dtypes type, or anything with
  // __dlpack__; tried in this order. name is the argument's, for messages. stream: where CUDA work will run, for __dlpack__.
  Tensor(nb::handle object, const char* name, bool is_written = false, void* stream = nullptr);
  ~Tensor();
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  const mla_tensor* get() const { return is_none_ ? nullptr : &tensor_; }
  // Keeps shape and strides here, so that they stay as they are when the object's own change.
  void own_shape();
  // The producer's current stream on the tensor's device, if it tells; else the default stream.
  void* current_stream() const;

 private:
  friend class FrameworkMemory;

  static constexpr int kMaxDims = 8;

  bool from_exchange_api(nb::handle object);
  bool from_buffer(nb::handle object);
  bool from_ml_dtypes(nb::handle object);
  bool from_dlpack(nb::handle object, void* stream);
  template <class ManagedTensor>
  bool from_capsule(const char* capsule_name);
  [[noreturn]] void refuse(const char* reason) const;

  const char* name_;
  bool is_written_;
  bool is_none_ = false;
  mla_tensor tensor_{};
  int64_t shape_[kMaxDims];
  int64_t strides_[kMaxDims];
  const ExchangeApi* api_ = nullptr;
  Py_buffer buffer_{};  // held while buffer_.obj is set
  nb::object capsule_;  // held while the tensor came by __dlpack__
};

// Uninitialised memory for work on the current stream of a tensor's device, from its framework's own allocator: reuse follows that
// stream, and a graph capture owns what it used. Needs no GIL. Null where the framework does not offer one, or has none left.
class FrameworkMemory {
 public:
  FrameworkMemory(const Tensor& like, uint64_t nbytes);
  ~FrameworkMemory();
  FrameworkMemory(const FrameworkMemory&) = delete;
  FrameworkMemory& operator=(const FrameworkMemory&) = delete;

  void* data() const;

 private:
  static constexpr uintptr_t kAlignment = 256;  // of every workspace; what an allocator promises differs

  ManagedVersioned* managed_ = nullptr;
};

// A Buffer, or a contiguous tensor of any type, as raw memory. stream: as for Tensor.
Memory memory_of(nb::handle object, const char* name, bool is_written, void* stream);

// The MLA_DTYPE_... of a DLPack type; MLA_DTYPE_DEFAULT if it is none of them.
int32_t dtype_of(mla_data_type type);

}  // namespace mlakit_py
