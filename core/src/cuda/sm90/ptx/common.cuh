// Shared by the instruction wrappers.
#pragma once

#include <cstdint>

namespace mla::cuda::sm90::ptx {

inline constexpr unsigned kWholeWarp = 0xffffffffu;

// A shared-memory address as the instructions take it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace mla::cuda::sm90::ptx
