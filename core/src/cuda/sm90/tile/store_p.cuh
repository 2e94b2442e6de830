// P from registers into a [64 rows, 64 keys] tile of shared memory, swizzled: all of it, or half.
#pragma once

#include "cuda/sm90/ptx/matrix.cuh"
#include "cuda/sm90/tile/fragment_place.cuh"

namespace mla::cuda::sm90 {

// packed: A fragments of kCount / 4 steps of 16 keys. place: fragment_place in this tile. first_key: a multiple of 32.
template <int kCount>
__device__ __forceinline__ void store_p(uint32_t place, int first_key, const uint32_t (&packed)[kCount]) {
  const uint32_t first = fragment_at_step(place, first_key / 16);
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    ptx::stmatrix_x4(fragment_at_step(first, i / 4), packed[i], packed[i + 1], packed[i + 2], packed[i + 3]);
  }
}

}  // namespace mla::cuda::sm90
