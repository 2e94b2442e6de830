// What the roles of the dense decode kernel have in common.
#pragma once

#include "cuda/sm90/params.h"
#include "cuda/sm90/pipeline.cuh"
#include "cuda/sm90/shared.h"

namespace mla::cuda::sm90 {

// Rows of this tile that exist.
__device__ __forceinline__ int32_t tile_rows(const schedule::Config& config, const Work& work) {
  return min(work.q_tokens * config.heads_per_kv_head - work.first_row, kTileRows);
}

using WorkCursor = Cursor<kWorkStages>;
using PCursor = Cursor<kPStages>;

// The row scales are one buffer, passed once for each work.
__device__ __forceinline__ Cursor<1> scale_at(WorkCursor at) { return {at.value}; }

}  // namespace mla::cuda::sm90
