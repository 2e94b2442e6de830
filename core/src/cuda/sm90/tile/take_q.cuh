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
// once a column group, and the steps of a group differ in two bits of the address. A warp without rows reads nothing: with 16 heads three of
// four have none, and what they would read takes as long.
template <DecodeConfig kCfg>
__device__ __forceinline__ void take_q(uint32_t slot, uint32_t zeros, uint32_t s_q, int run, int rows, int warp,
                                       int lane, uint32_t (&r_q)[kCfg.q_register_steps()][4]) {
  constexpr uint32_t kStepBytes = 2 * layout::kChunkBytes;
  const uint32_t row_in_slot = warp % 2 * 16 + lane % 16;
  const uint32_t row_in_tile = warp * 16 + lane % 16;
  const uint32_t half_chunk = lane / 16;
  const uint32_t target_of_row = s_q + layout::swizzled_chunk(row_in_tile, half_chunk);
  const auto target = [&](int step) {
    const int group = step / 4 - kCfg.q_first_shared_group();
    return (target_of_row + group * kTileRows * layout::kSwizzleRowBytes) ^ step % 4 * kStepBytes;
  };
  constexpr int kFirstShared = kCfg.q_first_shared_group() * 4;
  if (warp * 16 >= rows) {
#pragma unroll
    for (int step = 0; step < kCfg.q_register_steps(); ++step)
      r_q[step][0] = r_q[step][1] = r_q[step][2] = r_q[step][3] = 0;
#pragma unroll
    for (int step = kFirstShared; step < kCfg.q_steps(); ++step) ptx::stmatrix_x4(target(step), 0, 0, 0, 0);
  } else {
    const bool is_row = static_cast<int>(row_in_tile) < rows;
#pragma unroll
    for (int group = 0; group < kCfg.groups(); ++group) {
      const uint32_t line = query_line(run, row_in_slot, group);
      const uint32_t source = is_row ? slot + layout::swizzled_chunk(line, half_chunk) : zeros;
#pragma unroll
      for (int step = group * 4; step < group * 4 + 4; ++step) {
        uint32_t r[4];
        ptx::ldmatrix_x4(r, source ^ step % 4 * kStepBytes);
        if (step < kCfg.q_register_steps()) {
#pragma unroll
          for (int j = 0; j < 4; ++j) r_q[step][j] = r[j];
        }
        if (step >= kFirstShared) ptx::stmatrix_x4(target(step), r[0], r[1], r[2], r[3]);
      }
    }
  }
  ptx::fence_proxy_async();
}

}  // namespace mla::cuda::sm90
