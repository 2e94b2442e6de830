// bar.sync among some of a CTA's warps.
#pragma once

#include <cstdint>

#include "cuda/sm90/protocol.h"

namespace mla::cuda::sm90::ptx {

// The id is an immediate: with one in a register ptxas reserves all 16 barriers.
template <NamedBarrier kId>
__device__ __forceinline__ void bar_sync(uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"n"(static_cast<uint32_t>(kId)), "r"(threads) : "memory");
}

}  // namespace mla::cuda::sm90::ptx
