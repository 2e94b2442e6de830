// Q from its ring slots into A fragments in registers and, for the last column groups, into its own place in shared memory.
#pragma once

#include "cuda/sm90/config.h"
#include "cuda/sm90/ptx/fence.cuh"
#include "cuda/sm90/ptx/matrix.cuh"
#include "cuda/sm90/tile/load_rows.cuh"
#include "layout/swizzle.h"

namespace mla::cuda::sm90 {

// slot: the one that holds this warp's 16 rows. s_q: [group, 64 rows, 128 bytes], swizzled. Rows from `rows` on become zeros: what is in
// shared memory there must not move the maxima of a warp. zeros: a line of them. The caller syncs the warpgroup afterwards.
// A piece waits for this, and each instruction is fetched for the first time, so there are few of them: a lane looks for the line of its row
// once a column group, and the steps of a group differ in two bits of the address.
template <DecodeConfig kCfg>
__device__ __forceinline__ void take_q(uint32_t slot, uint32_t zeros, uint32_t s_q, int run, int rows, int warp,
                                       int lane, uint32_t (&r_q)[kCfg.q_register_steps()][4]) {
  constexpr uint32_t kStepBytes = 2 * layout::kChunkBytes;
  const uint32_t row_in_slot = warp % 2 * 16 + lane % 16;
  const uint32_t row_in_tile = warp * 16 + lane % 16;
  const uint32_t half_chunk = lane / 16;
  const bool is_row = static_cast<int>(row_in_tile) < rows;
  const uint32_t target_of_row = s_q + layout::swizzled_chunk(row_in_tile, half_chunk);
#pragma unroll
  for (int group = 0; group < kCfg.groups(); ++group) {
    const uint32_t line = query_line(run, row_in_slot, group);
    const uint32_t source = is_row ? slot + layout::swizzled_chunk(line, half_chunk) : zeros;
    const uint32_t target =
        target_of_row + (group - kCfg.q_first_shared_group()) * kTileRows * layout::kSwizzleRowBytes;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int step = group * 4 + i;
      uint32_t r[4];
      ptx::ldmatrix_x4(r, source ^ i * kStepBytes);
      if (step < kCfg.q_register_steps()) {
#pragma unroll
        for (int j = 0; j < 4; ++j) r_q[step][j] = r[j];
      }
      if (group >= kCfg.q_first_shared_group())
        ptx::stmatrix_x4(target ^ i * kStepBytes, r[0], r[1], r[2], r[3]);
    }
  }
  ptx::fence_proxy_async();
}

}  // namespace mla::cuda::sm90
