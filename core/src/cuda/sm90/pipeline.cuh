// Walking a ring of buffers guarded by barriers: the only place where a phase flips, and the only place that waits.
#pragma once

#include "cuda/sm90/protocol.h"
#include "cuda/sm90/ptx/cluster.cuh"
#include "cuda/sm90/ptx/mbarrier.cuh"

namespace mla::cuda::sm90 {

// A position in a ring of kStages buffers and how often (mod 2) the ring was walked, in one register.
template <uint32_t kStages>
struct Cursor {
  static constexpr bool kIsPowerOfTwo = (kStages & (kStages - 1)) == 0;
  static constexpr uint32_t kPhaseBit = 256;
  uint32_t value = 0;  // power of two: buffers passed. Else: stage, and the phase in kPhaseBit.

  __device__ __forceinline__ uint32_t stage() const { return kIsPowerOfTwo ? value % kStages : value % kPhaseBit; }
  __device__ __forceinline__ uint32_t phase() const { return value / (kIsPowerOfTwo ? kStages : kPhaseBit) & 1; }
  __device__ __forceinline__ void advance() {
    ++value;
    if constexpr (!kIsPowerOfTwo) {
      if (value % kPhaseBit == kStages) value = value / kPhaseBit * kPhaseBit ^ kPhaseBit;
    }
  }
  // By several buffers, at most kStages.
  __device__ __forceinline__ Cursor ahead(uint32_t buffers) const {
    Cursor there{value + buffers};
    if constexpr (!kIsPowerOfTwo) {
      if (there.value % kPhaseBit >= kStages) there.value = (there.value - kStages) ^ kPhaseBit;
    }
    return there;
  }
};

#ifdef MLAKIT_BOUNDED_WAITS
inline constexpr uint32_t kMostTries = 1u << 24;  // each suspends the thread for a while: seconds in all

// Where a wait that gave up faults: (1 + Barrier) * 4096 + stage * 16, so that compute-sanitizer and cuda-gdb show which it was. A trap
// would do, but with one in a role ptxas drops setmaxnreg and spills (nvcc 13.0).
__device__ __forceinline__ void fault_at(uint64_t address) {
  asm volatile("st.global.u32 [%0], %1;" ::"l"(address), "r"(0) : "memory");
}
#endif

// Address of barrier kId of a stage, given the address of the first barrier of the table.
template <Barrier kId>
__device__ __forceinline__ uint32_t barrier_address(uint32_t barriers, uint32_t stage) {
  return barriers + (first_barrier(kId) + stage) * static_cast<uint32_t>(sizeof(uint64_t));
}

// Waits until the phase of that parity is over. Debug builds give up after some seconds, by a fault that names the barrier.
template <Barrier kId>
__device__ __forceinline__ void wait(uint32_t barriers, uint32_t stage, uint32_t parity) {
  const uint32_t address = barrier_address<kId>(barriers, stage);
#ifdef MLAKIT_BOUNDED_WAITS
  uint32_t tries = 0;  // not a clock: the roles have no registers to spare
  while (!ptx::mbarrier_try_wait_parity(address, parity)) {
    if (++tries == kMostTries) fault_at((1 + static_cast<uint32_t>(kId)) * 4096 + stage * 16);
  }
#else
  while (!ptx::mbarrier_try_wait_parity(address, parity)) {
  }
#endif
}

// A full buffer, for its reader; an empty one, for its writer (passes at once on the first walk).
template <Barrier kId, uint32_t kStages>
__device__ __forceinline__ void wait_full(uint32_t barriers, const Cursor<kStages>& at) {
  wait<kId>(barriers, at.stage(), at.phase());
}
template <Barrier kId, uint32_t kStages>
__device__ __forceinline__ void wait_empty(uint32_t barriers, const Cursor<kStages>& at) {
  wait<kId>(barriers, at.stage(), at.phase() ^ 1);
}

// wait_full for who only wants to be about in time: gives up after some tries, so that nobody is held up by it, nor it by having come late.
template <Barrier kId, uint32_t kStages>
__device__ __forceinline__ void wait_briefly(uint32_t barriers, const Cursor<kStages>& at) {
  const uint32_t address = barrier_address<kId>(barriers, at.stage());
  for (int tries = 0; tries < 256 && !ptx::mbarrier_try_wait_parity(address, at.phase()); ++tries) {
  }
}

// Whether wait_full would pass at once.
template <Barrier kId, uint32_t kStages>
__device__ __forceinline__ bool is_full(uint32_t barriers, const Cursor<kStages>& at) {
  return ptx::mbarrier_test_wait_parity(barrier_address<kId>(barriers, at.stage()), at.phase());
}

// One lane arrives for its warp, behind a __syncwarp where the others used what is let go of, or wrote what is handed over. To compute-sanitizer's
// racecheck a barrier orders only what the arriving thread did itself, so it reports all that as hazards: a build for it lets every lane arrive.
#ifdef MLAKIT_EVERY_LANE_ARRIVES
inline constexpr int kArrivingLanes = 32;
#else
inline constexpr int kArrivingLanes = 1;
#endif
__device__ __forceinline__ bool arrives(int lane) { return kArrivingLanes == 32 || lane == 0; }

template <Barrier kId>
__device__ __forceinline__ void arrive(uint32_t barriers, uint32_t stage) {
  ptx::mbarrier_arrive(barrier_address<kId>(barriers, stage));
}

// Lets go of a place for keys, where pages are shared to the other CTA too.
template <bool kSharesPages, Barrier kEmpty = Barrier::kSlotEmpty>
__device__ __forceinline__ void release_slot(uint32_t barriers, uint32_t stage) {
  arrive<kEmpty>(barriers, stage);
  if constexpr (kSharesPages)
    ptx::mbarrier_arrive_cluster(ptx::map_to_cta(barrier_address<kEmpty>(barriers, stage), ptx::cta_rank() ^ 1));
}

template <DecodeConfig kCfg, uint32_t kIndex = 0>
__device__ __forceinline__ void init_barriers(uint32_t barriers) {
  constexpr BarrierSpec kSpec = kBarriers[kIndex];
  constexpr bool kIsOfWarps = kSpec.arrivals > 1 && kSpec.id != Barrier::kScaleFull;
  constexpr int kArrivals = arrivals_of(kSpec, kCfg) * (kIsOfWarps ? kArrivingLanes : 1);
#pragma unroll
  for (int stage = 0; stage < stages_of(kSpec, kCfg); ++stage)
    ptx::mbarrier_init(barrier_address<kSpec.id>(barriers, stage), kArrivals);
  if constexpr (kIndex + 1 < static_cast<uint32_t>(Barrier::kCount)) {
    init_barriers<kCfg, kIndex + 1>(barriers);
  } else {
    ptx::fence_mbarrier_init();
  }
}

}  // namespace mla::cuda::sm90
