// Where the lanes of ldmatrix and stmatrix find an A fragment (m64k16, 16 rows a warp) in a [64 rows, 128 bytes] tile, swizzled.
#pragma once

#include "layout/swizzle.h"

namespace mla::cuda::sm90 {

// This lane's chunk of the first 16 columns, in a tile that begins at 0.
__device__ __forceinline__ uint32_t fragment_place(int warp, int lane) {
  return layout::swizzled_chunk(warp * 16 + lane % 16, lane / 16);
}

// The same 16 `step` columns on, step < 4. An even number of chunks changes bits that the swizzle leaves where they are.
__device__ __forceinline__ uint32_t fragment_at_step(uint32_t place, int step) {
  return place ^ step * 2 * layout::kChunkBytes;
}

}  // namespace mla::cuda::sm90
