// One mla_tensor against what an argument must be: DLPack's rules, element type, shape, strides, device, alignment, overlap.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "problem.h"
#include "status.h"

namespace mla {

struct Place {
  DeviceType device_type;
  int32_t device_id;
};

inline constexpr int64_t kAnySize = -1;

struct Dim {
  const char* name;
  int64_t size;        // kAnySize: as it comes
  const char* source;  // what fixes the size, for the message: "problem", "q"
};

constexpr uint32_t dtype_bit(DType t) { return 1u << static_cast<uint32_t>(t); }

enum class LastDim { kContiguous, kFree };

struct TensorSpec {
  const char* name;
  uint32_t dtypes;  // dtype_bit()s of those allowed
  Place place;
  LastDim last_dim;
  int32_t ndim;
  Dim dims[4];
};

// A checked tensor in plain numbers. The stride of a dimension of size 0 or 1 means nothing to DLPack; here it is the compact one.
struct TensorInfo {
  const char* name = nullptr;
  std::byte* data = nullptr;  // byte_offset added; nullptr: not given, or no element
  DType dtype = DType::kFp32;
  int32_t elem_bytes = 1;
  int32_t ndim = 0;
  int64_t shape[4] = {};
  int64_t stride[4] = {};    // elements, >= 0
  int64_t extent_bytes = 0;  // from the first to past the last element
};

Status check_tensor(const mla_tensor* tensor, const TensorSpec& spec, TensorInfo& info);

// A workspace as a tensor of bytes.
TensorInfo raw_bytes(const char* name, const void* data, uint64_t bytes);

// No two elements of a tensor that is written share memory.
Status check_no_self_overlap(const TensorInfo& info);

// No element of a is at an address of b. May say true for interleaved tensors that have no common stride.
bool may_overlap(const TensorInfo& a, const TensorInfo& b);

// Nothing in `written` overlaps with anything else in it or with anything in `read`.
Status check_no_overlap(std::span<const TensorInfo* const> written, std::span<const TensorInfo* const> read);

}  // namespace mla
