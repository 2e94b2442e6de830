// Shared by the instruction wrappers.
#pragma once

#include <cstdint>

namespace mla::cuda::sm90::ptx {

inline constexpr unsigned kWholeWarp = 0xffffffffu;

// A shared-memory address as the instructions take it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// x, worked out before what follows, and what depends on it after what comes before: nvcc moves arithmetic over everything but volatile
// instructions.
__device__ __forceinline__ int32_t known_here(int32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}
__device__ __forceinline__ uint64_t known_here(uint64_t x) {
  asm volatile("" : "+l"(x));
  return x;
}

}  // namespace mla::cuda::sm90::ptx
