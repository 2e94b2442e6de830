// The part of Q that wide blocks keep in registers, from its ring slots into A fragments.
#pragma once

#include "cuda/sm90/config.h"
#include "cuda/sm90/ptx/matrix.cuh"
#include "cuda/sm90/tile/fragment_place.cuh"

namespace mla::cuda::sm90 {

// slot(i): address of the i-th slot of Q, [column group, 64 rows, 128 bytes], swizzled. All rows exist. When this returns, all lanes of the warp have
// read.
template <DecodeConfig kCfg, class Slot>
__device__ __forceinline__ void take_wide_q(const Slot& slot, int warp, int lane,
                                            uint32_t (&r_q)[kCfg.q_register_steps()][4]) {
  const uint32_t place = fragment_place(warp, lane);
#pragma unroll
  for (int step = 0; step < kCfg.q_register_steps(); ++step) {
    const int group = step / 4;
    const uint32_t line = slot(group / kCfg.slot_groups()) + group % kCfg.slot_groups() * kCfg.group_bytes() + place;
    ptx::ldmatrix_x4(r_q[step], fragment_at_step(line, step % 4));
  }
  __syncwarp();
}

}  // namespace mla::cuda::sm90
