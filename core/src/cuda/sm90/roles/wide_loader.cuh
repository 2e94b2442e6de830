// The loader of wide blocks: one warp keeps the ring of slots full with Q and keys, of one piece after the other.
//
// A wide block lives long and the ring holds less than three, so that keys are late whenever the loader is. So between a slot's release and the
// instruction that fills it there is next to nothing; and what of Q goes to registers is asked for while the piece before is still
// computed, the rest of it, in whose place the piece before's is read, when its last Q K^T is done.
#pragma once

#include "cuda/sm90/ptx/common.cuh"
#include "cuda/sm90/ptx/mbarrier.cuh"
#include "cuda/sm90/ptx/pdl.cuh"
#include "cuda/sm90/roles/pages.cuh"
#include "cuda/sm90/roles/role.cuh"
#include "cuda/sm90/tile/load_rows.cuh"

namespace mla::cuda::sm90 {

template <DecodeConfig kCfg>
struct WideLoader {
  const DecodeParams& p;
  const RoleContext& ctx;
  Cursor<kCfg.ring_slots()> ring;
  Cursor<kCfg.loads()> load;
  Cursor<1> rope, q_at;

  static_assert(kCfg.shares_pages);
  static constexpr int kHalfBytes = layout::kGroupBytes;  // 32 rows of a column group of Q

  // What the compiler cannot see to be the same in all lanes goes into the copy engine's instructions by a loop over them.
  __device__ __forceinline__ static int32_t uniform(int32_t x) { return __shfl_sync(ptx::kWholeWarp, x, 0); }

  // Says how much the next load brings; the barrier that counts it.
  __device__ __forceinline__ uint32_t begin_load(uint32_t bytes) {
    const uint32_t barrier = barrier_address<Barrier::kSlotFull>(ctx.barriers, load.stage());
    if (ctx.lane == 0) ptx::mbarrier_arrive_expect_tx(barrier, bytes);
    load.advance();
    return barrier;
  }

  // One half of one column group of Q. place: of the group.
  __device__ __forceinline__ void load_q_box(uint32_t place, uint32_t barrier, int group, int half,
                                             const Work& work) const {
    const layout::Divider& heads = p.result.heads;
    const int32_t row = work.first_row + half * layout::kSlotRows;
    const int32_t token = heads.quotient(row);
    const bool is_rope = group == kLatentGroups;
    ptx::tma_load_5d(place + half * kHalfBytes, is_rope ? &p.q_rope : &p.q_latent, barrier,
                     {{0, head_of_row(heads, work, row, token), is_rope ? 0 : group, token, work.request}});
  }

  __device__ __forceinline__ void load_q(const Work& work) {
    constexpr layout::SmemPlan kPlan = smem_plan<kCfg>();
    constexpr int kSlots = q_slots<kCfg>(kTileRows);
    const int half = ctx.lane % 2, nth = ctx.lane / 2;  // a lane a box
#pragma unroll 1
    for (int i = 0; i < kSlots; ++i) wait_empty<Barrier::kSlotEmpty>(ctx.barriers, ring.ahead(i));
    const uint32_t slots_full = begin_load(kSlots * kCfg.slot_bytes());
    __syncwarp();
    if (nth < kCfg.q_first_shared_group())
      load_q_box(ctx.shared + kPlan.slot(ring.ahead(nth / kCfg.slot_groups()).stage()) +
                     nth % kCfg.slot_groups() * kCfg.group_bytes(),
                 slots_full, nth, half, work);
    __syncwarp();
    ring = ring.ahead(kSlots);

    wait_empty<Barrier::kQEmpty>(ctx.barriers, q_at);
    const uint32_t q_full = barrier_address<Barrier::kQFull>(ctx.barriers, q_at.stage());
    if (ctx.lane == 0) ptx::mbarrier_arrive_expect_tx(q_full, kPlan.q_bytes);
    __syncwarp();
    if (nth < kCfg.q_shared_groups())
      load_q_box(ctx.shared + kPlan.q() + nth * kCfg.group_bytes(), q_full, nth + kCfg.q_first_shared_group(), half,
                 work);
    __syncwarp();
    q_at.advance();
  }

  // The rope is loaded by the two CTAs in turns.
  __device__ __forceinline__ void load_rope(uint32_t shared, uint32_t barrier, int32_t row, int32_t kv_head,
                                            int32_t page) {
    if (ctx.lane == 0 && rope.phase() == ptx::cta_rank())
      load_box<true>(shared + smem_plan<kCfg>().rope(), &p.kv_rope, barrier, {{0, row, 0, kv_head, page}});
    rope.advance();
  }

  // Of each slot either CTA loads one of two column groups, into both. All arguments are the same in all lanes.
  __device__ __forceinline__ void load_block(int32_t row, int32_t kv_head, int32_t page) {
    const uint32_t shared = uniform(ctx.shared);
    const uint32_t rank = ptx::cta_rank();
    constexpr int kLast = kCfg.early_slots();
    uint32_t barrier = 0;
#pragma unroll 1
    for (int i = 0; i <= kLast; ++i) {
      if constexpr (kCfg.rope_places() > 0) {
        if (i == kLast) wait_empty<Barrier::kRopeEmpty>(ctx.barriers, rope);
      }
      const uint32_t place = shared + smem_plan<kCfg>().slot(ring.stage()) + rank * kCfg.group_bytes();
      if constexpr (kCfg.rope_places() > 0) {
        if (i == kLast) {
          barrier = begin_load(kCfg.slot_bytes() + kCfg.group_bytes());
          load_rope(shared, barrier, row, kv_head, page);
        }
      }
      wait_empty<Barrier::kSlotEmpty>(ctx.barriers, ring);
      if (i == 0) barrier = begin_load(kLast * kCfg.slot_bytes());
      if (kCfg.rope_places() == 0 && i == kLast) barrier = begin_load(kCfg.slot_bytes());
      if (ctx.lane == 0)
        load_box<true>(place, &p.kv_latent, barrier,
                       {{0, row, kCfg.slot_groups() * i + static_cast<int32_t>(rank), kv_head, page}});
      ring.advance();
    }
    __syncwarp();
  }

  // next_page: of this lane's block in the first window. Each window is looked up while the one before is loaded.
  __device__ __forceinline__ void load_keys(const Work& work, int32_t next_page) {
    const int32_t end = uniform(work.end_block), kv_head = uniform(work.kv_head);
    for (int32_t first = uniform(work.begin_block); first < end; first += kPageWindow) {
      const int32_t page = next_page;
      next_page = page_of_block<kCfg>(p, work, first + kPageWindow + ctx.lane);
      const int32_t blocks = min(end - first, kPageWindow);
#pragma unroll 1
      for (int32_t i = 0; i < blocks; ++i) {
        const int32_t token = (first + i) * kCfg.block_tokens;
        load_block(p.page_size.remainder(token, p.page_size.quotient(token)), kv_head,
                   uniform(__shfl_sync(ptx::kWholeWarp, page, i)));
      }
    }
  }

  // Until both CTAs of the pair have let go of all places: then nothing is under way any more from one to the other.
  __device__ __forceinline__ void drain() const {
#pragma unroll 1
    for (int i = 0; i < kCfg.ring_slots(); ++i) wait_empty<Barrier::kSlotEmpty>(ctx.barriers, ring.ahead(i));
    if constexpr (kCfg.rope_places() > 0) wait_empty<Barrier::kRopeEmpty>(ctx.barriers, rope);
  }

  __device__ __forceinline__ void run_all() {
    ptx::griddepcontrol_wait();
    if (ctx.lane == 0) {  // there is no guess: pieces of wide blocks are long
      ctx.control->is_guess_right = false;
      arrive<Barrier::kGuessJudged>(ctx.barriers, 0);
    }
    ptx::cluster_wait();  // the other CTA's barriers are there
    for (WorkCursor at;; at.advance()) {
      wait_full<Barrier::kWorkFull>(ctx.barriers, at);
      const Work& work = ctx.control->work[at.stage()];
      if (work.request < 0) break;
      const int32_t first_page =
          page_of_block<kCfg>(p, work, work.begin_block + ctx.lane);  // in flight while Q is asked for
      load_q(work);
      load_keys(work, first_page);
      __syncwarp();
      if (arrives(ctx.lane)) arrive<Barrier::kWorkEmpty>(ctx.barriers, at.stage());
    }
    drain();
  }
};

}  // namespace mla::cuda::sm90
