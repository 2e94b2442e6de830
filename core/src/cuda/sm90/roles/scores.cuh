// One warpgroup makes S = Q K^T, its softmax and P.
#pragma once

#include "cuda/sm90/epilogue.cuh"
#include "cuda/sm90/mask.cuh"
#include "cuda/sm90/ptx/named_barrier.cuh"
#include "cuda/sm90/ptx/wgmma.cuh"
#include "cuda/sm90/roles/role.cuh"
#include "cuda/sm90/softmax.cuh"
#include "cuda/sm90/tile/store_p.cuh"
#include "cuda/sm90/tile/take_q.cuh"
#include "cuda/sm90/tile/take_wide_q.cuh"
#include "shard.h"

namespace mla::cuda::sm90 {

template <DecodeConfig kCfg>
struct Scores {
  const DecodeParams& p;
  const RoleContext& ctx;
  Cursor<kCfg.ring_slots()> ring;
  Cursor<kCfg.loads()> load;
  PCursor<kCfg> p_at;
  uint32_t r_q[kCfg.q_register_steps()][4];
  SoftmaxState state;

  using ScoreFragment = float[kCfg.block_tokens / 2];

  // Lower halves of the descriptors of a block's keys, of each slot.
  using Keys = uint32_t[kCfg.slots_of_block()];

  // Of the block at `ring`.
  __device__ __forceinline__ void find_keys(Keys& keys) const {
#pragma unroll
    for (int i = 0; i < kCfg.slots_of_block(); ++i)
      keys[i] =
          static_cast<uint32_t>(ptx::k_major_descriptor(ctx.shared + smem_plan<kCfg>().slot(ring.ahead(i).stage())));
  }

  // From a block to the next one. Q lies behind the ring.
  __device__ __forceinline__ static void advance_keys(Keys& keys, uint32_t queries) {
    constexpr uint32_t kSlot = ptx::descriptor_step(kCfg.slot_bytes());
    uint32_t key = keys[kCfg.slots_of_block() - 1];
#pragma unroll
    for (int i = 0; i < kCfg.slots_of_block(); ++i) {
      key += kSlot;
      if (key == queries) key -= kCfg.ring_slots() * kSlot;
      keys[i] = ptx::low_half_now(key);
    }
  }

  // Of a wide block: what its first groups did not need.
  __device__ __forceinline__ void wait_late(bool is_first, WorkCursor at) const {
    if (is_first) wait_full<Barrier::kQFull>(ctx.barriers, once_a_work(at));
    wait_full<Barrier::kSlotFull>(ctx.barriers, load.ahead(1));
    ptx::wgmma_fence();  // else products are serialised (C7519)
  }

  // s [64 rows, keys of a block] (+)= Q K^T over some steps of 16 columns, in the order of group_at: issued, not waited for. The warps are held while
  // they issue all but the last few products.
  template <int kBegin, int kEnd>
  __device__ __forceinline__ void issue_steps(ScoreFragment& s, uint32_t queries, const Keys& keys, bool is_first,
                                              WorkCursor at) {
    if constexpr (kBegin < kEnd) {
      constexpr int kGroup = kCfg.group_at(kBegin / 4);
      constexpr int kStep = kGroup * 4 + kBegin % 4;
      constexpr bool kHasPlace = kCfg.rope_places() > 0 && kGroup == kLatentGroups;  // the rope
      constexpr int kSlot = kCfg.is_wide() && !kHasPlace ? kGroup / kCfg.slot_groups() : 0;
      constexpr uint32_t kColumns = ptx::descriptor_step(32) * (kBegin % 4);
      constexpr uint32_t kInSlot = ptx::descriptor_step(kCfg.group_bytes()) * (kGroup - kSlot * kCfg.slot_groups());
      constexpr uint32_t kBehindQ = ptx::descriptor_step(smem_plan<kCfg>().rope() - smem_plan<kCfg>().q());
      if constexpr (kCfg.is_wide() && kBegin == kCfg.q_register_steps()) wait_late(is_first, at);
      const uint64_t k = ptx::descriptor((kHasPlace ? queries + kBehindQ : keys[kSlot] + kInSlot) + kColumns);
      if constexpr (kStep < kCfg.q_register_steps()) {
        ptx::wgmma_scores_rs<kCfg.dtype>(s, r_q[kStep], k, kBegin > 0);
      } else {
        constexpr uint32_t kInQ =
            ptx::descriptor_step(kTileRows * layout::kSwizzleRowBytes) * (kGroup - kCfg.q_first_shared_group());
        ptx::wgmma_scores_ss<kCfg.dtype>(s, ptx::descriptor(queries + kInQ + kColumns), k, kBegin > 0);
      }
      issue_steps<kBegin + 1, kEnd>(s, queries, keys, is_first, at);
    }
  }

  __device__ __forceinline__ void take_q_slots(int32_t rows) {
    constexpr layout::SmemPlan kPlan = smem_plan<kCfg>();
    if constexpr (kCfg.is_wide()) {
      wait_full<Barrier::kSlotFull>(ctx.barriers, load);
      take_wide_q<kCfg>([&](int i) { return ctx.shared + kPlan.slot(ring.ahead(i).stage()); }, ctx.warp, ctx.lane, r_q);
    } else {
      Cursor<kCfg.ring_slots()> mine = ring;  // of a warp without rows: any full slot will do
      if (ctx.warp >= 2 && q_slots<kCfg>(rows) == 2) mine.advance();
      wait_full<Barrier::kSlotFull>(ctx.barriers, mine);
      ptx::bar_sync<NamedBarrier::kScores>(kMathThreads);  // no warp reads the previous Q any more
      take_q<kCfg>(ctx.shared + kPlan.slot(mine.stage()), ptx::shared_address(ctx.control->zeros),
                   ctx.shared + kPlan.q(), p.q_run, rows, ctx.warp, ctx.lane, r_q);
      ptx::bar_sync<NamedBarrier::kScores>(kMathThreads);
    }
    for (int i = 0; i < q_slots<kCfg>(rows); ++i) {
      if (arrives(ctx.lane)) {
        release_slot<kCfg.shares_pages>(ctx.barriers, ring.stage());
        if constexpr (!kCfg.is_wide()) release_slot<kCfg.shares_pages>(ctx.barriers, ring.stage());
      }
      ring.advance();
    }
    load = load.ahead(kCfg.is_wide() ? 1 : q_slots<kCfg>(rows));
  }

  // One block: s holds its scores; visible counts the keys of each row from this block's first on. Leaves P and the rescale factors in shared
  // memory; hand_over_p tells. place: fragment_place.
  __device__ __forceinline__ void weigh(ScoreFragment& s, bool is_masked, const int (&visible)[2], uint32_t place) {
    if (is_masked) mask_scores(s, ctx.lane, visible);
    Rescale& of_block = ctx.control->rescale[p_at.stage()];
    const bool is_rescaled = move_maximum(s, p.scale_log2e, state, [&](const float (&factor)[2]) {
      if (ctx.lane % 4 != 0) return;
      of_block.factor[layout::fragment_row(ctx.thread, 0)] = factor[0];
      of_block.factor[layout::fragment_row(ctx.thread, 1)] = factor[1];
    });
    if (ctx.lane == 0) of_block.is_needed[ctx.warp] = is_rescaled;
    uint32_t packed[kCfg.block_tokens / 4];
    exponentials<kCfg.dtype>(s, p.scale_log2e, state, packed);
    store_p(place + p_tile<kCfg>(ctx, p_at), first_key_in_tile<kCfg>(p_at), packed);
  }

  // I2: P and the rescale factors of the block are in shared memory before this arrive. The readers fence: it would hold these warps for 200 clocks.
  __device__ __forceinline__ void hand_over_p() {
    __syncwarp();
    if (arrives(ctx.lane)) arrive<Barrier::kPFull>(ctx.barriers, p_at.stage());
    p_at.advance();
  }

  // Keys that row `row` of the tile sees, at most len.
  __device__ __forceinline__ int32_t visible_keys(const Work& work, int32_t row) const {
    if (!p.is_causal) return work.len_tokens;
    const int32_t token = p.result.heads.quotient(work.first_row + row);
    if (p.cp_world == 1) return min(work.len_tokens, work.len_tokens - work.q_tokens + 1 + token);
    const int64_t seen_of_all =
        p.global_seqlens.data[work.request * p.global_seqlens.stride] - work.q_tokens + int64_t{1} + token;
    return static_cast<int32_t>(
        min(int64_t{work.len_tokens}, shard_tokens(seen_of_all, p.cp_world, p.cp_rank, p.cp_turn)));
  }

  // Whether the load at `load` is there; the warp agrees.
  __device__ __forceinline__ bool is_load_there() const {
    return __all_sync(ptx::kWholeWarp, is_full<Barrier::kSlotFull>(ctx.barriers, load));
  }

  // Nobody reads the block's rope any more; of the last one, nor Q.
  __device__ __forceinline__ void release_wide(bool is_last) {
    if constexpr (kCfg.rope_places() > 0) {
      if (arrives(ctx.lane)) release_slot<kCfg.shares_pages, Barrier::kRopeEmpty>(ctx.barriers, 0);
    }
    if (is_last && arrives(ctx.lane)) arrive<Barrier::kQEmpty>(ctx.barriers, 0);
  }

  // P is handed over only when a part of the next block's products is issued, so that P V, which takes its time to begin, runs under the next
  // exponentials and not beside the next Q K^T. Where the next block is not there yet, a narrow one's is handed over at once. A wide one's is not: late keys
  // would put P V beside Q K^T, so that it ends late and makes room late, and the keys stay late. Whatever else has to be waited or
  // asked for is so while the tensor cores finish.
  __device__ __forceinline__ void run_blocks(const Work& work, WorkCursor at) {
    const int32_t begin = work.begin_block * kCfg.block_tokens;
    const int32_t blocks = work.end_block - work.begin_block;
    int visible[2] = {visible_keys(work, layout::fragment_row(ctx.thread, 0)) - begin,
                      visible_keys(work, layout::fragment_row(ctx.thread, 1)) - begin};
    const int32_t first_masked = (max(visible_keys(work, 0), 0) - begin) / kCfg.block_tokens;  // row 0 sees least
    const uint32_t queries = ptx::low_half_now(ptx::k_major_descriptor(ctx.shared + smem_plan<kCfg>().q()));
    const uint32_t place = ptx::low_half_now(fragment_place(ctx.warp, ctx.lane));
    Keys keys;
    find_keys(keys);
    bool has_p = false;     // a P that was not handed over
    bool is_there = false;  // whether the block's first slot is known to be full
#pragma unroll 1
    for (int32_t block = 0; block < blocks; ++block) {
      if (!is_there) {
        if constexpr (!kCfg.is_wide()) {
          if (has_p && !is_load_there()) {
            hand_over_p();
            has_p = false;
          }
        }
        wait_full<Barrier::kSlotFull>(ctx.barriers, load);
      }
      ScoreFragment s;
      ptx::wgmma_fence();
      issue_steps<0, kCfg.hand_over_step()>(s, queries, keys, block == 0, at);
      if (has_p) hand_over_p();
      ptx::wgmma_fence();
      issue_steps<kCfg.hand_over_step(), kCfg.q_steps()>(s, queries, keys, block == 0, at);
      ptx::wgmma_commit_group();
      ring = ring.ahead(kCfg.slots_of_block());
      load = load.ahead(kCfg.loads_of_block());
      advance_keys(keys, queries);
      wait_empty<Barrier::kPEmpty>(ctx.barriers, p_at);
      if constexpr (!kCfg.is_wide()) is_there = is_load_there();
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_pin(s);
      if constexpr (kCfg.is_wide()) release_wide(block + 1 == blocks);
      weigh(s, block >= first_masked, visible, place);
      has_p = true;
      visible[0] -= kCfg.block_tokens;
      visible[1] -= kCfg.block_tokens;
    }
    hand_over_p();
  }

  __device__ __forceinline__ void finish(const Work& work, WorkCursor at, int tile) {
    wait_empty<Barrier::kScaleEmpty>(ctx.barriers, once_a_work(at));
    const int32_t rows = tile_rows(p.config, work);
    float sum[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = work.len_tokens == schedule::kInvalidLen ? NAN : sum_of_quad(state.sum[r]);
      const int row = layout::fragment_row(ctx.thread, r);
      if (ctx.lane % 4 == 0 && row < rows)
        ctx.control->scale[row] = row_scale(p.result, work, work.first_row + row, state.maximum[r], sum[r]);
    }
    if (ctx.lane % 4 == 0) arrive<Barrier::kScaleFull>(ctx.barriers, 0);
    // The outputs do not wait for what follows.
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = layout::fragment_row(ctx.thread, r);
      if (ctx.lane % 4 == 0 && row < rows)
        store_row_state(p.result, work, tile * kTileRows + row, work.first_row + row, state.maximum[r], sum[r]);
    }
    __syncwarp();
  }

  __device__ __forceinline__ void run_all(int tile) {
    for (WorkCursor at;; at.advance()) {
      wait_full<Barrier::kWorkFull>(ctx.barriers, at);
      const Work& work = ctx.control->work[at.stage()];
      if (work.request < 0) return;
      take_q_slots(tile_rows(p.config, work));
      state = {};
      if (work.begin_block < work.end_block) {
        run_blocks(work, at);
      } else if constexpr (kCfg.is_wide()) {
        wait_full<Barrier::kQFull>(ctx.barriers, once_a_work(at));  // nobody else does, and the next Q comes there
        if (arrives(ctx.lane)) arrive<Barrier::kQEmpty>(ctx.barriers, 0);
      }
      finish(work, at, tile);
      if (arrives(ctx.lane)) arrive<Barrier::kWorkEmpty>(ctx.barriers, at.stage());
    }
  }
};

}  // namespace mla::cuda::sm90
