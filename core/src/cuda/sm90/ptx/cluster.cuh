// Thread block clusters: one instruction a function.
#pragma once

#include <cstdint>

namespace mla::cuda::sm90::ptx {

// A barrier of all threads of the cluster, in two halves. What is to be seen behind it needs a fence of its own before.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

__device__ __forceinline__ uint32_t cta_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;"
               : "=r"(rank));  // volatile: read where it is needed, not kept in a register
  return rank;
}

// A shared-memory address of this CTA as the same place in another CTA of the cluster.
__device__ __forceinline__ uint32_t map_to_cta(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

// At a barrier of any CTA of the cluster. Releases nothing to other CTAs: with .release.cluster a fence of the whole device stands before each
// (nvcc 13.0), which made decode 1.4 times as slow.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

}  // namespace mla::cuda::sm90::ptx
