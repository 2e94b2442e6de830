// P from registers into a [64 rows, 64 keys] tile of shared memory, swizzled: all of it, or half.
#pragma once

#include "cuda/sm90/ptx/matrix.cuh"
#include "layout/swizzle.h"

namespace mla::cuda::sm90 {

// Where this lane's rows of P begin in a tile that begins at 0.
__device__ __forceinline__ uint32_t p_place(int warp, int lane) {
  return layout::swizzled_chunk(warp * 16 + lane % 16, lane / 16);
}

// packed: A fragments of kCount / 4 steps of 16 keys. place: p_place in this tile. first_key: a multiple of 32. Chunks 2, 4 and 6 differ from chunk 0 in bits
// that the swizzle leaves where they are.
template <int kCount>
__device__ __forceinline__ void store_p(uint32_t place, int first_key, const uint32_t (&packed)[kCount]) {
  const uint32_t first = place ^ first_key / 8 * layout::kChunkBytes;
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    ptx::stmatrix_x4(first ^ i / 2 * layout::kChunkBytes, packed[i], packed[i + 1], packed[i + 2], packed[i + 3]);
  }
}

}  // namespace mla::cuda::sm90
