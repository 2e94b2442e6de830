// Two warpgroups make O [64 rows, 256 columns each] = O * rescale + P V, and store it.
#pragma once

#include "cuda/sm90/epilogue.cuh"
#include "cuda/sm90/ptx/fence.cuh"
#include "cuda/sm90/ptx/named_barrier.cuh"
#include "cuda/sm90/ptx/wgmma.cuh"
#include "cuda/sm90/roles/role.cuh"
#include "cuda/sm90/tile/zero_tail.cuh"

namespace mla::cuda::sm90 {

template <DecodeConfig kCfg>
struct Outputs {
  const DecodeParams& p;
  const RoleContext& ctx;
  int half;  // of the output columns
  Cursor<kCfg.ring_slots()> ring;
  PCursor<kCfg> p_at;

  static constexpr int kQuarterGroups = kQuarterColumns / layout::kGroupColumns;

  // The slot of quarter i of this half's columns, and the place in it.
  __device__ __forceinline__ Cursor<kCfg.ring_slots()> slot_of(int i) const {
    return kCfg.is_wide() ? ring.ahead(2 * half + i) : ring;
  }
  __device__ __forceinline__ uint32_t values(int i) const {
    return ctx.shared + smem_plan<kCfg>().slot(slot_of(i).stage()) +
           (kCfg.is_wide() ? 0 : (2 * half + i) * kQuarterGroups * kCfg.group_bytes());
  }

  __device__ __forceinline__ void sync_warpgroup() const {
    if (half == 0) {
      ptx::bar_sync<NamedBarrier::kOutputLow>(kMathThreads);
    } else {
      ptx::bar_sync<NamedBarrier::kOutputHigh>(kMathThreads);
    }
  }

  __device__ __forceinline__ void rescale(OutputFragment& o) const {
    const float* factor = ctx.control->rescale[p_at.stage()].factor;
    const float f0 = factor[layout::fragment_row(ctx.thread, 0)], f1 = factor[layout::fragment_row(ctx.thread, 1)];
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      o[0][i] *= layout::which_row(i) == 0 ? f0 : f1;
      o[1][i] *= layout::which_row(i) == 0 ? f0 : f1;
    }
  }

  // valid_keys: of the block on; under a block's only at the end of a request.
  __device__ __forceinline__ void zero_hidden(int32_t valid_keys) const {
    if constexpr (kCfg.is_wide()) {
#pragma unroll 1
      for (int i = 0; i < 2; ++i) zero_tail<kCfg.block_tokens, kQuarterGroups>(values(i), valid_keys, ctx.thread);
    } else {
      zero_tail<kCfg.block_tokens, 2 * kQuarterGroups>(values(0), valid_keys, ctx.thread);
    }
    sync_warpgroup();
  }

  // One quarter += P V for 16 keys, the step-th.
  __device__ __forceinline__ static void add_keys(float (&o)[64], uint32_t s_p, uint32_t v, int step, bool is_first) {
    constexpr uint32_t kPStep = ptx::descriptor_step(32);
    constexpr uint32_t kVStep = ptx::descriptor_step(16 * layout::kSwizzleRowBytes);
    ptx::wgmma_m64n128k16_ss_t<kCfg.dtype>(o, ptx::descriptor(s_p + step * kPStep), ptx::descriptor(v + step * kVStep),
                                           !is_first || step > 0);
  }

  // A wide block: one slot after the other, so that the first makes room earlier; and for the same reason one output warpgroup after the other, the
  // second beginning when the first has half of its products left.
  __device__ __forceinline__ void add_wide(OutputFragment& o, uint32_t s_p, const uint32_t (&v)[2], bool is_first) {
    constexpr int kSteps = kCfg.block_tokens / 16;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) add_keys(o[i], s_p, v[i], step, is_first);
      ptx::wgmma_commit_group();
    }
    ptx::wgmma_wait_group<1>();
    if (arrives(ctx.lane)) {
      if (half == 0) arrive<Barrier::kTurn>(ctx.barriers, p_at.stage());
      release_slot<kCfg.shares_pages>(ctx.barriers, slot_of(0).stage());
    }
  }

  __device__ __forceinline__ void add_narrow(OutputFragment& o, uint32_t s_p, const uint32_t (&v)[2], bool is_first) {
#pragma unroll
    for (int step = 0; step < kCfg.block_tokens / 16; ++step) {
#pragma unroll
      for (int i = 0; i < 2; ++i) add_keys(o[i], s_p, v[i], step, is_first);
    }
    ptx::wgmma_commit_group();
  }

  // The load that brings the first slots of the block at `ring`.
  __device__ __forceinline__ Cursor<kCfg.loads()> first_load(WorkCursor at) const {
    if constexpr (kCfg.is_wide()) {
      return {p_at.value * kCfg.loads_of_block() + at.value + 1};  // Q was one of each work
    } else {
      return ring;
    }
  }

  __device__ __forceinline__ void add_block(OutputFragment& o, bool is_first, int32_t valid_keys, WorkCursor at) {
    const uint32_t s_p = ptx::low_half_now(ptx::k_major_descriptor(p_tile<kCfg>(ctx, p_at)) +
                                           ptx::descriptor_step(2 * first_key_in_tile<kCfg>(p_at)));
    const uint32_t first = ptx::low_half_now(ptx::n_major_descriptor(values(0), kCfg.group_bytes()));
    const uint32_t second =
        kCfg.is_wide() ? ptx::low_half_now(ptx::n_major_descriptor(values(1), kCfg.group_bytes()))
                       : first + static_cast<uint32_t>(ptx::descriptor_step(kQuarterGroups * kCfg.group_bytes()));
    wait_full<Barrier::kSlotFull>(ctx.barriers, first_load(at));
    wait_full<Barrier::kPFull>(ctx.barriers, p_at);
    ptx::fence_proxy_async();  // P was written by stmatrix
    if constexpr (kCfg.is_wide()) {
      if (half == 1) {
        wait_full<Barrier::kSlotFull>(ctx.barriers, first_load(at).ahead(1));
        wait_full<Barrier::kTurn>(ctx.barriers, p_at);
      }
    }
    if (!is_first && ctx.control->rescale[p_at.stage()].is_needed[ctx.warp]) rescale(o);
    if (valid_keys < kCfg.block_tokens) zero_hidden(valid_keys);
    ptx::wgmma_fence();
    if constexpr (kCfg.is_wide()) {
      add_wide(o, s_p, {first, second}, is_first);
    } else {
      add_narrow(o, s_p, {first, second}, is_first);
    }
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_pin(o[0]);
    ptx::wgmma_pin(o[1]);
    if (arrives(ctx.lane)) {
      release_slot<kCfg.shares_pages>(ctx.barriers, slot_of(1).stage());
      arrive<Barrier::kPEmpty>(ctx.barriers, p_at.stage());
    }
    ring = ring.ahead(kCfg.slots_of_block());
    p_at.advance();
  }

  // Where this warp will store the rows of a whole item, worked out while its first loads are under way.
  __device__ __forceinline__ void locate_rows(const Work& work) const {
    const int row = ctx.warp * 16 + ctx.lane;
    if (work.slot == kWholeItem && ctx.lane < 16 && row < tile_rows(p.config, work)) {
      ctx.control->out_row[half][row] = row_offset(p.result.out, p.result, work, work.first_row + row);
    }
    __syncwarp();
  }

  __device__ __forceinline__ void run_all(int tile) {
    for (WorkCursor at;; at.advance()) {
      wait_full<Barrier::kWorkFull>(ctx.barriers, at);
      const Work& work = ctx.control->work[at.stage()];
      if (work.request < 0) return;
      locate_rows(work);
      OutputFragment o;
      ring = ring.ahead(q_slots<kCfg>(tile_rows(p.config, work)));
      // Read again for each block: registers are few.
      for (int32_t block = work.begin_block; block < work.end_block; ++block)
        add_block(o, block == work.begin_block, work.len_tokens - block * kCfg.block_tokens, at);
      wait_full<Barrier::kScaleFull>(ctx.barriers, once_a_work(at));
      if (work.slot != kDropped)
        store_output<kCfg.dtype>(o, p.result, work, tile_rows(p.config, work), ctx.control->scale,
                                 ctx.control->out_row[half], tile, half, ctx.thread);
      __syncwarp();
      if (arrives(ctx.lane)) {
        arrive<Barrier::kScaleEmpty>(ctx.barriers, 0);
        const WorkCursor again{ptx::low_half_now(at.value)};  // else its address is kept, and spilled, from the wait on
        arrive<Barrier::kWorkEmpty>(ctx.barriers, again.stage());
      }
    }
  }
};

}  // namespace mla::cuda::sm90
