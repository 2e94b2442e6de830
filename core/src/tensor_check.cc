// One mla_tensor against what an argument must be: DLPack's rules, element type, shape, strides, device, alignment, overlap.
#include "tensor_check.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>

#include "dtype_table.h"

namespace mla {
namespace {

const char* device_type_name(int32_t type) {
  return type == MLA_DEVICE_CPU ? "CPU" : type == MLA_DEVICE_CUDA ? "CUDA" : "other";
}

// "[batch, q_len, q_heads, head_dim]"
std::string dim_names(const TensorSpec& spec) {
  std::string names = "[";
  for (int32_t i = 0; i < spec.ndim; ++i) names += std::string(i > 0 ? ", " : "") + spec.dims[i].name;
  return names + "]";
}

std::string dtype_names(uint32_t dtypes) {
  std::string names;
  for (const DTypeInfo& info : kDTypes) {
    if ((dtypes & dtype_bit(info.dtype)) == 0) continue;
    if (!names.empty()) names += " or ";
    names += info.name;
  }
  return names;
}

const DTypeInfo* find_dlpack_dtype(const mla_data_type& type) {
  for (const DTypeInfo& info : kDTypes) {
    if (info.dlpack_code == type.code && info.bits == type.bits && type.lanes == 1) return &info;
  }
  return nullptr;
}

Status check_dtype(const mla_tensor& tensor, const TensorSpec& spec, const DTypeInfo** dtype) {
  *dtype = find_dlpack_dtype(tensor.dtype);
  if (*dtype != nullptr && (spec.dtypes & dtype_bit((*dtype)->dtype)) != 0) return Status::ok();
  const std::string allowed = dtype_names(spec.dtypes);
  if (*dtype != nullptr) return invalid("%s: dtype must be %s, got %s", spec.name, allowed.c_str(), (*dtype)->name);
  return invalid("%s: dtype must be %s, got DLPack code %d with %d bits and %d lanes", spec.name, allowed.c_str(),
                 tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes);
}

Status check_shape(const mla_tensor& tensor, const TensorSpec& spec) {
  if (tensor.ndim != spec.ndim) {
    return invalid("%s: must have %d dimensions %s, got %d", spec.name, spec.ndim, dim_names(spec).c_str(),
                   tensor.ndim);
  }
  if (tensor.shape == nullptr) return invalid("%s: shape must point at %d sizes, got NULL", spec.name, spec.ndim);
  for (int32_t i = 0; i < spec.ndim; ++i) {
    const Dim& dim = spec.dims[i];
    const long long size = tensor.shape[i];
    if (size < 0) return invalid("%s: %s must be at least 0, got shape[%d] = %lld", spec.name, dim.name, i, size);
    if (dim.size != kAnySize && size != dim.size) {
      return invalid("%s: %s must be %lld (%s), got shape[%d] = %lld", spec.name, dim.name,
                     static_cast<long long>(dim.size), dim.source, i, size);
    }
  }
  return Status::ok();
}

// Fills shape, stride and extent of info.
Status check_strides(const mla_tensor& tensor, const TensorSpec& spec, TensorInfo& info) {
  bool is_too_far = false;
  // Without elements the strides mean nothing (numpy makes them 0).
  const bool is_empty = std::find(tensor.shape, tensor.shape + spec.ndim, 0) != tensor.shape + spec.ndim;
  int64_t compact = 1;
  for (int32_t i = spec.ndim - 1; i >= 0; --i) {
    const int64_t size = tensor.shape[i];
    info.shape[i] = size;
    info.stride[i] = tensor.strides == nullptr || is_empty || size <= 1 ? compact : tensor.strides[i];
    if (info.stride[i] < 0) {
      return invalid("%s: the stride of %s must be at least 0, got strides[%d] = %lld; make a copy in order", spec.name,
                     spec.dims[i].name, i, static_cast<long long>(info.stride[i]));
    }
    is_too_far = __builtin_mul_overflow(info.stride[i], std::max<int64_t>(size, 1), &compact) || is_too_far;
  }
  const int32_t last = spec.ndim - 1;
  if (spec.last_dim == LastDim::kContiguous && info.shape[last] > 1 && info.stride[last] != 1) {
    return invalid("%s: the stride of %s must be 1, got strides[%d] = %lld; make that dimension contiguous", spec.name,
                   spec.dims[last].name, last, static_cast<long long>(info.stride[last]));
  }
  int64_t extent = 1;  // elements
  for (int32_t i = 0; i < spec.ndim && !is_empty; ++i) {
    int64_t reach = 0;
    is_too_far = __builtin_mul_overflow(info.stride[i], info.shape[i] - 1, &reach) ||
                 __builtin_add_overflow(extent, reach, &extent) || is_too_far;
  }
  is_too_far = __builtin_mul_overflow(extent, info.elem_bytes, &info.extent_bytes) || is_too_far;
  // Half of the address space: sums of two addresses or extents then fit as well.
  if (is_too_far || info.extent_bytes > INT64_MAX / 2)
    return invalid("%s: shape and strides must stay inside the address space, got more", spec.name);
  if (is_empty) info.extent_bytes = 0;
  return Status::ok();
}

Status check_place(const mla_tensor& tensor, const TensorSpec& spec) {
  const int32_t want_type = static_cast<int32_t>(spec.place.device_type);
  const bool is_same_device = want_type == MLA_DEVICE_CPU || tensor.device.device_id == spec.place.device_id;
  if (tensor.device.device_type == want_type && is_same_device) return Status::ok();
  return invalid("%s: must be on the plan's device, %s:%d, got %s:%d (DLPack device type %d)", spec.name,
                 device_type_name(want_type), spec.place.device_id, device_type_name(tensor.device.device_type),
                 tensor.device.device_id, tensor.device.device_type);
}

Status check_data(const mla_tensor& tensor, const TensorSpec& spec, TensorInfo& info) {
  if (info.extent_bytes == 0) return Status::ok();  // no element: data may be NULL
  if (tensor.data == nullptr) return invalid("%s: data must point at the elements, got NULL", spec.name);
  info.data = static_cast<std::byte*>(tensor.data) + tensor.byte_offset;
  if (reinterpret_cast<uintptr_t>(info.data) % static_cast<uintptr_t>(info.elem_bytes) != 0) {
    return invalid("%s: data + byte_offset must be a multiple of %d bytes (its element), got address %p", spec.name,
                   info.elem_bytes, static_cast<void*>(info.data));
  }
  return Status::ok();
}

uintptr_t address(const TensorInfo& info) { return reinterpret_cast<uintptr_t>(info.data); }

// Whether every element lies in a window of `window` bytes at the beginning of a period of `period` bytes. window gets its size.
bool is_periodic(const TensorInfo& info, int64_t period, int64_t& window) {
  window = info.elem_bytes;
  for (int32_t i = 0; i < info.ndim; ++i) {
    const int64_t stride = info.stride[i] * info.elem_bytes;
    if (info.shape[i] <= 1 || stride % period == 0) continue;
    window += (info.shape[i] - 1) * stride;
  }
  return window <= period;
}

// Whether the common period keeps a and b apart: rows of two tensors that take turns in one buffer.
bool is_interleaved(const TensorInfo& a, const TensorInfo& b, int64_t period) {
  int64_t window_a = 0;
  int64_t window_b = 0;
  if (period <= 0 || !is_periodic(a, period, window_a) || !is_periodic(b, period, window_b)) return false;
  const auto period_u = static_cast<uintptr_t>(period);
  const auto b_after_a = static_cast<int64_t>((address(b) % period_u + period_u - address(a) % period_u) % period_u);
  return b_after_a >= window_a && b_after_a + window_b <= period;
}

}  // namespace

Status check_tensor(const mla_tensor* tensor, const TensorSpec& spec, TensorInfo& info) {
  info = {};
  info.name = spec.name;
  if (tensor == nullptr) return invalid("%s: must be given as %s, got NULL", spec.name, dim_names(spec).c_str());
  const DTypeInfo* dtype = nullptr;
  MLA_RETURN_IF_ERROR(check_place(*tensor, spec));
  MLA_RETURN_IF_ERROR(check_dtype(*tensor, spec, &dtype));
  MLA_RETURN_IF_ERROR(check_shape(*tensor, spec));
  info.dtype = dtype->dtype;
  info.elem_bytes = dtype->bits / 8;
  info.ndim = spec.ndim;
  MLA_RETURN_IF_ERROR(check_strides(*tensor, spec, info));
  return check_data(*tensor, spec, info);
}

TensorInfo raw_bytes(const char* name, const void* data, uint64_t bytes) {
  TensorInfo info;
  info.name = name;
  info.data = static_cast<std::byte*>(const_cast<void*>(data));
  info.ndim = 1;
  info.shape[0] = info.extent_bytes = static_cast<int64_t>(bytes);
  info.stride[0] = 1;
  return info;
}

Status check_no_self_overlap(const TensorInfo& info) {
  if (info.extent_bytes == 0) return Status::ok();  // no element, whatever the strides say
  // From the shortest stride to the longest, each dimension has to step over all that the ones before it reach.
  int64_t reach = 1;
  uint32_t done = 0;
  for (int32_t step = 0; step < info.ndim; ++step) {
    int32_t i = -1;
    for (int32_t k = 0; k < info.ndim; ++k) {
      if ((done >> k & 1u) == 0 && (i < 0 || info.stride[k] < info.stride[i])) i = k;
    }
    done |= 1u << i;
    if (info.shape[i] <= 1) continue;
    if (info.stride[i] < reach) {
      return invalid("%s: its elements must not share memory, got strides[%d] = %lld where %lld is the least",
                     info.name, i, static_cast<long long>(info.stride[i]), static_cast<long long>(reach));
    }
    reach += (info.shape[i] - 1) * info.stride[i];
  }
  return Status::ok();
}

bool may_overlap(const TensorInfo& a, const TensorInfo& b) {
  if (a.data == nullptr || b.data == nullptr || a.extent_bytes == 0 || b.extent_bytes == 0) return false;
  if (address(a) + static_cast<uintptr_t>(a.extent_bytes) <= address(b) ||
      address(b) + static_cast<uintptr_t>(b.extent_bytes) <= address(a))
    return false;
  for (int32_t i = 0; i < a.ndim; ++i) {
    if (a.shape[i] > 1 && is_interleaved(a, b, a.stride[i] * a.elem_bytes)) return false;
  }
  return true;
}

Status check_no_overlap(std::span<const TensorInfo* const> written, std::span<const TensorInfo* const> read) {
  const auto refuse = [](const TensorInfo& a, const TensorInfo& b) {
    return invalid("%s: is written and must not share memory with %s, got an overlap; give it memory of its own",
                   a.name, b.name);
  };
  for (size_t i = 0; i < written.size(); ++i) {
    for (size_t j = i + 1; j < written.size(); ++j) {
      if (may_overlap(*written[i], *written[j])) return refuse(*written[i], *written[j]);
    }
    for (const TensorInfo* other : read) {
      if (may_overlap(*written[i], *other)) return refuse(*written[i], *other);
    }
  }
  return Status::ok();
}

}  // namespace mla
