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
#include "shard.h"

namespace mla::cuda::sm90 {

template <DecodeConfig kCfg>
struct Scores {
  const DecodeParams& p;
  const RoleContext& ctx;
  Cursor<kCfg.ring_slots()> ring;
  PCursor p_at;
  uint32_t r_q[kCfg.q_register_steps()][4];
  SoftmaxState state;

  __device__ __forceinline__ uint32_t slot_address() const { return ctx.shared + smem_plan<kCfg>().slot(ring.stage()); }

  // The keys of the ring's next slot, as issue_steps wants them.
  __device__ __forceinline__ uint32_t next_keys() const {
    return ptx::low_half_now(ptx::k_major_descriptor(slot_address()));
  }

  // s [64 rows, 32 keys] (+)= Q K^T over some steps of 16 columns: issued, not waited for. The warps are held while they issue all but the last few
  // products.
  template <int kBegin, int kEnd>
  __device__ __forceinline__ void issue_steps(float (&s)[16], uint32_t queries, uint32_t keys) {
    constexpr uint64_t kGroupStep = ptx::descriptor_step(layout::kGroupBytes);
    constexpr uint64_t kQGroupStep = ptx::descriptor_step(kTileRows * layout::kSwizzleRowBytes);
    constexpr uint64_t kStep = ptx::descriptor_step(32);  // 16 columns
    constexpr int kFirstShared = kCfg.q_register_steps();
    const uint64_t k = ptx::descriptor(keys);
    const uint64_t q = ptx::descriptor(queries);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = kBegin; step < min(kFirstShared, kEnd); ++step) {
      ptx::wgmma_m64n32k16_rs<kCfg.dtype>(s, r_q[step], k + step / 4 * kGroupStep + step % 4 * kStep, step > 0);
    }
#pragma unroll
    for (int step = max(kFirstShared, kBegin); step < kEnd; ++step) {
      ptx::wgmma_m64n32k16_ss<kCfg.dtype>(s,
                                          q + (step / 4 - kCfg.q_first_shared_group()) * kQGroupStep + step % 4 * kStep,
                                          k + step / 4 * kGroupStep + step % 4 * kStep, 1);
    }
  }

  __device__ __forceinline__ void take_q_slots(int32_t rows) {
    Cursor<kCfg.ring_slots()> mine = ring;  // of a warp without rows: any full slot will do
    if (ctx.warp >= 2 && q_slots(rows) == 2) mine.advance();
    wait_full<Barrier::kSlotFull>(ctx.barriers, mine);
    ptx::bar_sync<NamedBarrier::kScores>(kMathThreads);  // no warp reads the previous Q any more
    take_q<kCfg>(ctx.shared + smem_plan<kCfg>().slot(mine.stage()), ptx::shared_address(ctx.control->zeros),
                 ctx.shared + smem_plan<kCfg>().q(), p.q_run, rows, ctx.warp, ctx.lane, r_q);
    ptx::bar_sync<NamedBarrier::kScores>(kMathThreads);
    for (int half = 0; half < q_slots(rows); ++half) {
      if (ctx.lane == 0) {
        release_slot<kCfg.shares_pages>(ctx.barriers, ring.stage());
        release_slot<kCfg.shares_pages>(ctx.barriers, ring.stage());
      }
      ring.advance();
    }
  }

  // One slot: s holds its scores; visible counts the keys of each row from this slot's first on. Leaves P and the rescale factors in
  // shared memory; hand_over_p tells.
  __device__ __forceinline__ void weigh(float (&s)[16], bool is_masked, const int (&visible)[2]) {
    if (is_masked) mask_scores(s, ctx.lane, visible);
    float rescale[2];
    uint32_t packed[8];
    const bool is_rescaled = move_maximum(s, p.scale_log2e, state, rescale);
    exponentials<kCfg.dtype>(s, p.scale_log2e, state, packed);
    store_p(ctx.shared + smem_plan<kCfg>().p(p_at.stage() / 2), p_at.stage() % 2, ctx.warp, ctx.lane, packed);
    if (is_rescaled && ctx.lane % 4 == 0) {
      ctx.control->rescale[p_at.stage()][layout::fragment_row(ctx.thread, 0)] = rescale[0];
      ctx.control->rescale[p_at.stage()][layout::fragment_row(ctx.thread, 1)] = rescale[1];
    }
    if (ctx.lane == 0) ctx.control->is_rescaled[p_at.stage()][ctx.warp] = is_rescaled;
  }

  // I2: P and the rescale factors of the slot are in shared memory before this arrive. The readers fence: it would hold these warps for 200 clocks.
  __device__ __forceinline__ void hand_over_p() {
    __syncwarp();
    if (ctx.lane == 0) arrive<Barrier::kPFull>(ctx.barriers, p_at.stage());
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

  // Whether the slot at `ring` is; the warp agrees.
  __device__ __forceinline__ bool is_slot_full() const {
    return __all_sync(ptx::kWholeWarp, is_full<Barrier::kSlotFull>(ctx.barriers, ring));
  }

  // P is handed over only when a part of the next slot's products is issued, so that P V, which takes its time to begin, runs under the next
  // exponentials and not beside the next Q K^T; where the next slot is not there yet, at once. Whatever else has to be waited or asked for is so
  // while the tensor cores finish.
  __device__ __forceinline__ void run_slots(const Work& work) {
    const int32_t begin = work.begin_block * kBlockTokens;
    const int32_t slots = work.end_block - work.begin_block;
    int visible[2] = {visible_keys(work, layout::fragment_row(ctx.thread, 0)) - begin,
                      visible_keys(work, layout::fragment_row(ctx.thread, 1)) - begin};
    const int32_t first_masked = (max(visible_keys(work, 0), 0) - begin) / layout::kSlotRows;  // row 0 sees least
    const uint32_t queries = ptx::low_half_now(ptx::k_major_descriptor(ctx.shared + smem_plan<kCfg>().q()));
    uint32_t keys = next_keys();
    bool has_p = false;     // a P that was not handed over
    bool is_there = false;  // whether the slot is known to be full
#pragma unroll 1
    for (int32_t slot = 0; slot < slots; ++slot) {
      if (!is_there) {
        if (has_p && !is_slot_full()) {
          hand_over_p();
          has_p = false;
        }
        wait_full<Barrier::kSlotFull>(ctx.barriers, ring);
      }
      float s[16];
      issue_steps<0, kCfg.hand_over_step()>(s, queries, keys);
      if (has_p) hand_over_p();
      issue_steps<kCfg.hand_over_step(), kCfg.q_steps()>(s, queries, keys);
      ptx::wgmma_commit_group();
      ring.advance();
      keys = next_keys();
      wait_empty<Barrier::kPEmpty>(ctx.barriers, p_at);
      is_there = is_slot_full();
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_pin(s);
      weigh(s, slot >= first_masked, visible);
      has_p = true;
      visible[0] -= layout::kSlotRows;
      visible[1] -= layout::kSlotRows;
    }
    hand_over_p();
  }

  __device__ __forceinline__ void finish(const Work& work, WorkCursor at, int tile) {
    wait_empty<Barrier::kScaleEmpty>(ctx.barriers, scale_at(at));
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
      if (work.begin_block < work.end_block) run_slots(work);
      finish(work, at, tile);
      if (ctx.lane == 0) arrive<Barrier::kWorkEmpty>(ctx.barriers, at.stage());
    }
  }
};

}  // namespace mla::cuda::sm90
