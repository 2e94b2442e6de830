// Fills one slot of the ring with up to 32 rows of all column groups, by one warp: lane i loads the run of rows [i * run, (i + 1) * run).
#pragma once

#include "cuda/sm90/config.h"
#include "cuda/sm90/ptx/cluster.cuh"
#include "cuda/sm90/ptx/tma.cuh"

namespace mla::cuda::sm90 {

// Where the run of rows that this lane loads begins. A run outside the tensor becomes zeros.
struct RunOrigin {
  int32_t row;        // token of the page, or head
  int32_t outer;      // kv head, or query token
  int32_t outermost;  // page, or request
};

inline constexpr uint32_t kRopeOffset = kLatentGroups * layout::kGroupBytes;  // of the rope group in a slot

template <bool kIsShared>
__device__ __forceinline__ void load_box(uint32_t shared, const CUtensorMap* map, uint32_t barrier,
                                         const ptx::TmaCoordinates& at) {
  constexpr uint16_t kBoth = 3;
  if constexpr (kIsShared) {
    ptx::tma_multicast_5d(shared, map, barrier, at, kBoth);
  } else {
    ptx::tma_load_5d(shared, map, barrier, at);
  }
}

// Keys lie as wgmma wants them: [group, 32 rows, 128 bytes]. A run of a whole slot is one box of all groups that this CTA loads; of shorter runs each
// group is a box. kIsShared: both CTAs of a cluster call this; one loads the first half of the latent groups and the rope into both, one the rest.
template <DecodeConfig kCfg, bool kIsShared>
__device__ __forceinline__ void load_key_rows(uint32_t slot, uint32_t barrier, const CUtensorMap* latent,
                                              const CUtensorMap* rope, int run, int lane, const RunOrigin& at) {
  if (lane * run >= layout::kSlotRows) return;
  const uint32_t rows = slot + lane * run * layout::kSwizzleRowBytes;
  const int rank = kIsShared ? static_cast<int>(ptx::cta_rank()) : 0;
  const int first = rank * kCfg.box_groups(), end = kIsShared ? first + kCfg.box_groups() : kLatentGroups;
  const int step = run == layout::kSlotRows ? kCfg.box_groups() : 1;
#pragma unroll 1
  for (int group = first; group < end; group += step) {
    load_box<kIsShared>(rows + group * layout::kGroupBytes, latent, barrier,
                        {{0, at.row, group, at.outer, at.outermost}});
  }
  if constexpr (kCfg.has_rope()) {
    if (rank == 0) load_box<kIsShared>(rows + kRopeOffset, rope, barrier, {{0, at.row, 0, at.outer, at.outermost}});
  }
}

// Rows of Q are read by ldmatrix, which takes any place: the latent groups of a run lie together, [run, group, rows of the run, 128 bytes].
template <DecodeConfig kCfg>
__device__ __forceinline__ void load_query_rows(uint32_t slot, uint32_t barrier, const CUtensorMap* latent,
                                                const CUtensorMap* rope, int run, int lane, const RunOrigin& at) {
  const uint32_t run_bytes = run * layout::kSwizzleRowBytes;
  ptx::tma_load_5d(slot + lane * run_bytes * kLatentGroups, latent, barrier, {{0, at.row, 0, at.outer, at.outermost}});
  if constexpr (kCfg.has_rope()) {
    ptx::tma_load_5d(slot + kRopeOffset + lane * run_bytes, rope, barrier, {{0, at.row, 0, at.outer, at.outermost}});
  }
}

// The 128-byte line of a slot that holds a column group of a row of Q.
MLA_HD constexpr uint32_t query_line(int run, uint32_t row, uint32_t group) {
  const uint32_t r = static_cast<uint32_t>(run);  // a power of two: run_rows
  const uint32_t in_run = row & (r - 1);
  return group < kLatentGroups ? (row - in_run) * kLatentGroups + group * r + in_run
                               : kRopeOffset / layout::kSwizzleRowBytes + row;
}

}  // namespace mla::cuda::sm90
