// Q from its ring slots into A fragments in registers and, for the last column groups, into its own place in shared memory.
#pragma once

#include "cuda/sm90/config.h"
#include "cuda/sm90/ptx/fence.cuh"
#include "cuda/sm90/ptx/matrix.cuh"
#include "cuda/sm90/tile/load_rows.cuh"
#include "layout/swizzle.h"

namespace mla::cuda::sm90 {

// slot: the one that holds this warp's 16 rows. s_q: [group, 64 rows, 128 bytes], swizzled. Rows from `rows` on become zeros: what is in
// shared memory there must not move the maxima of a warp. The caller syncs the warpgroup afterwards.
template <DecodeConfig kCfg>
__device__ __forceinline__ void take_q(uint32_t slot, uint32_t s_q, int run, int rows, int warp, int lane,
                                       uint32_t (&r_q)[kCfg.q_register_steps()][4]) {
  const uint32_t row_in_slot = warp % 2 * 16 + lane % 16;
  const uint32_t row_in_tile = warp * 16 + lane % 16;
  const uint32_t half_chunk = lane / 16;
  const bool is_row[2] = {warp * 16 + lane / 4 < rows, warp * 16 + lane / 4 + 8 < rows};
#pragma unroll
  for (int step = 0; step < kCfg.q_steps(); ++step) {
    const int group = step / 4;
    const uint32_t chunk = step % 4 * 2 + half_chunk;
    uint32_t r[4];
    ptx::ldmatrix_x4(r, slot + layout::swizzled_chunk(query_line(run, row_in_slot, group), chunk));
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i] = is_row[i % 2] ? r[i] : 0;
    if (step < kCfg.q_register_steps()) {
#pragma unroll
      for (int i = 0; i < 4; ++i) r_q[step][i] = r[i];
    }
    if (group >= kCfg.q_first_shared_group()) {
      const uint32_t target = s_q + (group - kCfg.q_first_shared_group()) * kTileRows * layout::kSwizzleRowBytes;
      ptx::stmatrix_x4(target + layout::swizzled_chunk(row_in_tile, chunk), r[0], r[1], r[2], r[3]);
    }
  }
  ptx::fence_proxy_async();
}

}  // namespace mla::cuda::sm90
