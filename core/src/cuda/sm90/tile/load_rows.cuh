// Fills one slot of the ring with 32 rows of all column groups, by one warp.
#pragma once

#include "cuda/sm90/config.h"
#include "cuda/sm90/ptx/tma.cuh"

namespace mla::cuda::sm90 {

// Where the run of rows that this lane loads begins.
struct RunOrigin {
  int32_t row;        // token of the page, or head
  int32_t outer;      // kv head, or query token
  int32_t outermost;  // page, or request
};

// Lane i < 32 / run loads rows [i * run, (i + 1) * run) of the slot. Rows outside the tensor become zeros.
template <DecodeConfig kCfg>
__device__ __forceinline__ void load_rows(uint32_t slot, uint32_t barrier, const CUtensorMap* latent, const CUtensorMap* rope, int run,
                                          int lane, const RunOrigin& at) {
  if (run == layout::kSlotRows) {
    if (lane == 0) {
      ptx::tma_load_5d(slot, latent, barrier, {{0, at.row, 0, at.outer, at.outermost}});
      if constexpr (kCfg.has_rope()) {
        ptx::tma_load_5d(slot + kLatentGroups * layout::kGroupBytes, rope, barrier, {{0, at.row, 0, at.outer, at.outermost}});
      }
    }
  } else if (lane * run < layout::kSlotRows) {
    const uint32_t rows = slot + lane * run * layout::kSwizzleRowBytes;
#pragma unroll 1
    for (int group = 0; group < kLatentGroups; ++group) {
      ptx::tma_load_5d(rows + group * layout::kGroupBytes, latent, barrier, {{0, at.row, group, at.outer, at.outermost}});
    }
    if constexpr (kCfg.has_rope()) {
      ptx::tma_load_5d(rows + kLatentGroups * layout::kGroupBytes, rope, barrier, {{0, at.row, 0, at.outer, at.outermost}});
    }
  }
}

}  // namespace mla::cuda::sm90
