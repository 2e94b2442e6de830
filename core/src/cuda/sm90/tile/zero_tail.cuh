// Overwrites value rows past the end of a request with zeros: P is 0 there, but 0 x NaN is NaN.
#pragma once

#include "cuda/sm90/config.h"
#include "cuda/sm90/ptx/fence.cuh"
#include "layout/swizzle.h"

namespace mla::cuda::sm90 {

// values: address of the first of kGroups column groups that lie together. Rows [first_row, kRows) of them; the caller syncs.
template <int kRows, int kGroups>
__device__ __forceinline__ void zero_tail(uint32_t values, int first_row, int thread) {
  constexpr int kChunksOfRow = layout::kSwizzleRowBytes / layout::kChunkBytes;
  const int begin = first_row < 0 ? 0 : first_row;
  for (int i = begin * kChunksOfRow * kGroups + thread; i < kRows * kChunksOfRow * kGroups; i += kMathThreads) {
    const int row = i / (kChunksOfRow * kGroups);
    const int group = i / kChunksOfRow % kGroups;
    const uint32_t address =
        values + (group * kRows + row) * layout::kSwizzleRowBytes + i % kChunksOfRow * layout::kChunkBytes;
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
  }
  ptx::fence_proxy_async();
}

}  // namespace mla::cuda::sm90
