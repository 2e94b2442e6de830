// P of 32 keys from registers into half of a [64 rows, 64 keys] tile of shared memory, swizzled.
#pragma once

#include "cuda/sm90/ptx/matrix.cuh"
#include "layout/swizzle.h"

namespace mla::cuda::sm90 {

// half: which 32 of the 64 keys.
__device__ __forceinline__ void store_p(uint32_t s_p, int half, int warp, int lane, const uint32_t (&packed)[8]) {
  const uint32_t row = warp * 16 + lane % 16;
  const uint32_t chunk = half * 4 + lane / 16;
  ptx::stmatrix_x4(s_p + layout::swizzled_chunk(row, chunk), packed[0], packed[1], packed[2], packed[3]);
  ptx::stmatrix_x4(s_p + layout::swizzled_chunk(row, chunk + 2), packed[4], packed[5], packed[6], packed[7]);
}

}  // namespace mla::cuda::sm90
