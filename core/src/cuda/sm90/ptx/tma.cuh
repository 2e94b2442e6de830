// The tensor copy engine: one instruction a function.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace mla::cuda::sm90::ptx {

// Coordinates of the box, innermost dimension first. Elements outside the tensor read as zero and count as bytes all the same.
struct TmaCoordinates {
  int32_t c[5];
};

__device__ __forceinline__ void tma_load_5d(uint32_t shared, const CUtensorMap* map, uint32_t barrier,
                                            const TmaCoordinates& at) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5, "
      "%6}], [%7];" ::"r"(shared),
      "l"(map), "r"(at.c[0]), "r"(at.c[1]), "r"(at.c[2]), "r"(at.c[3]), "r"(at.c[4]), "r"(barrier)
      : "memory");
}

// The same into several CTAs of the cluster (a bit each), at the same places; each one's barrier counts its bytes.
__device__ __forceinline__ void tma_multicast_5d(uint32_t shared, const CUtensorMap* map, uint32_t barrier,
                                                 const TmaCoordinates& at, uint16_t ctas) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8;" ::"r"(shared),
      "l"(map), "r"(at.c[0]), "r"(at.c[1]), "r"(at.c[2]), "r"(at.c[3]), "r"(at.c[4]), "r"(barrier), "h"(ctas)
      : "memory");
}

// Brings the box into the second-level cache.
__device__ __forceinline__ void tma_prefetch_5d(const CUtensorMap* map, const TmaCoordinates& at) {
  asm volatile("cp.async.bulk.prefetch.tensor.5d.L2.global.tile [%0, {%1, %2, %3, %4, %5}];" ::"l"(map), "r"(at.c[0]),
               "r"(at.c[1]), "r"(at.c[2]), "r"(at.c[3]), "r"(at.c[4])
               : "memory");
}

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

}  // namespace mla::cuda::sm90::ptx
