// One warp brings of wide blocks what is loaded last from memory to the second-level cache.
//
// The ring holds three blocks but one slot. So a block's first slots are asked for more than a block's time before Q K^T needs them; its last
// slot only when the P V two blocks before has let go of one, and the rope when the last Q K^T has, some 1400 clocks before. From the cache that
// is enough, from memory at full clock it is not. More than this costs power, and what comes earlier is lost again before it is loaded
// (README.md).
#pragma once

#include "cuda/sm90/ptx/cluster.cuh"
#include "cuda/sm90/ptx/common.cuh"
#include "cuda/sm90/ptx/pdl.cuh"
#include "cuda/sm90/ptx/tma.cuh"
#include "cuda/sm90/roles/pages.cuh"
#include "cuda/sm90/roles/role.cuh"

namespace mla::cuda::sm90 {

template <DecodeConfig kCfg>
struct Prefetcher {
  const DecodeParams& p;
  const RoleContext& ctx;
  PCursor<kCfg> at_p;  // of the block to prefetch

  static constexpr uint32_t kAhead = 3;  // blocks, of that whose P V lets go of its first slot

  // Of the same boxes as this CTA's loader loads.
  __device__ __forceinline__ void prefetch_block(int32_t row, int32_t kv_head, int32_t page) const {
    const uint32_t rank = ptx::cta_rank();
    ptx::tma_prefetch_5d(
        &p.kv_latent, {{0, row, kCfg.slot_groups() * kCfg.early_slots() + static_cast<int32_t>(rank), kv_head, page}});
    if (at_p.value % 2 == rank) ptx::tma_prefetch_5d(&p.kv_rope, {{0, row, 0, kv_head, page}});
  }

  // Until the first output warpgroup has read the first slot of the block kAhead before. Who comes late would not find out, and goes on after a
  // while: what this warp does is but a hint.
  __device__ __forceinline__ void keep_pace() const {
    if (at_p.value >= kAhead) wait_briefly<Barrier::kTurn>(ctx.barriers, PCursor<kCfg>{at_p.value - kAhead});
  }

  __device__ __forceinline__ void run_piece(const Work& work) {
    const int32_t end = work.end_block, kv_head = work.kv_head;
    for (int32_t first = work.begin_block; first < end; first += kPageWindow) {
      const int32_t page = page_of_block<kCfg>(p, work, first + ctx.lane);
      const int32_t blocks = min(end - first, kPageWindow);
#pragma unroll 1
      for (int32_t i = 0; i < blocks; ++i, at_p.advance()) {
        keep_pace();
        const int32_t token = (first + i) * kCfg.block_tokens;
        const int32_t page_of_all = __shfl_sync(ptx::kWholeWarp, page, i);
        if (ctx.lane == 0)
          prefetch_block(p.page_size.remainder(token, p.page_size.quotient(token)), kv_head, page_of_all);
      }
    }
  }

  __device__ __forceinline__ void run_all() {
    ptx::griddepcontrol_wait();
    for (WorkCursor at;; at.advance()) {
      wait_full<Barrier::kWorkFull>(ctx.barriers, at);
      const Work& work = ctx.control->work[at.stage()];
      if (work.request < 0) return;
      if (p.prefetches_late) run_piece(work);
      __syncwarp();
      if (arrives(ctx.lane)) arrive<Barrier::kWorkEmpty>(ctx.barriers, at.stage());
    }
  }
};

}  // namespace mla::cuda::sm90
