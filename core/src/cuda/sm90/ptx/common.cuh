// Shared by the instruction wrappers: shared-memory addresses as the instructions take them.
#pragma once

#include <cstdint>

namespace mla::cuda::sm90::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace mla::cuda::sm90::ptx
