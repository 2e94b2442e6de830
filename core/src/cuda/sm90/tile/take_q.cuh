// Q from its two ring slots into A fragments in registers and, for the last column groups, into its own place in shared memory.
#pragma once

#include "cuda/sm90/config.h"
#include "cuda/sm90/ptx/fence.cuh"
#include "cuda/sm90/ptx/matrix.cuh"
#include "layout/swizzle.h"

namespace mla::cuda::sm90 {

// slot: the one that holds this warp's 16 rows. s_q: [group, 64 rows, 128 bytes], swizzled. The caller syncs the warpgroup afterwards.
template <DecodeConfig kCfg>
__device__ __forceinline__ void take_q(uint32_t slot, uint32_t s_q, int warp, int lane, uint32_t (&r_q)[4 * kCfg.q_register_groups()][4]) {
  const uint32_t row_in_slot = warp % 2 * 16 + lane % 16;
  const uint32_t row_in_tile = warp * 16 + lane % 16;
  const uint32_t half_chunk = lane / 16;
#pragma unroll
  for (int step = 0; step < 4 * kCfg.groups(); ++step) {
    const int group = step / 4;
    const uint32_t chunk = step % 4 * 2 + half_chunk;
    const uint32_t source = slot + group * layout::kGroupBytes + layout::swizzled_chunk(row_in_slot, chunk);
    if (group < kCfg.q_register_groups()) {
      ptx::ldmatrix_x4(r_q[step], source);
    } else {
      uint32_t r[4];
      ptx::ldmatrix_x4(r, source);
      const uint32_t target = s_q + (group - kCfg.q_register_groups()) * kTileRows * layout::kSwizzleRowBytes;
      ptx::stmatrix_x4(target + layout::swizzled_chunk(row_in_tile, chunk), r[0], r[1], r[2], r[3]);
    }
  }
  ptx::fence_proxy_async();
}

}  // namespace mla::cuda::sm90
