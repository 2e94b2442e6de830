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
  PCursor p_at;

  __device__ __forceinline__ uint32_t values(uint32_t stage) const {
    return ctx.shared + smem_plan<kCfg>().slot(stage) +
           half * (kHalfColumns / layout::kGroupColumns) * layout::kGroupBytes;
  }

  __device__ __forceinline__ void sync_warpgroup() const {
    if (half == 0) {
      ptx::bar_sync<NamedBarrier::kOutputLow>(kMathThreads);
    } else {
      ptx::bar_sync<NamedBarrier::kOutputHigh>(kMathThreads);
    }
  }

  __device__ __forceinline__ void rescale(OutputFragment& o) const {
    const float* factor = ctx.control->rescale[p_at.stage()];
    const float f0 = factor[layout::fragment_row(ctx.thread, 0)], f1 = factor[layout::fragment_row(ctx.thread, 1)];
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      o[0][i] *= layout::which_row(i) == 0 ? f0 : f1;
      o[1][i] *= layout::which_row(i) == 0 ? f0 : f1;
    }
  }

  // 16 keys.
  __device__ __forceinline__ static void add_keys(OutputFragment& o, uint32_t s_p, uint32_t v, bool accumulate) {
    constexpr uint32_t kQuarterStep =
        ptx::descriptor_step(kQuarterColumns / layout::kGroupColumns * layout::kGroupBytes);
    ptx::wgmma_m64n128k16_ss_t<kCfg.dtype>(o[0], ptx::descriptor(s_p), ptx::descriptor(v), accumulate);
    ptx::wgmma_m64n128k16_ss_t<kCfg.dtype>(o[1], ptx::descriptor(s_p), ptx::descriptor(v + kQuarterStep), accumulate);
  }

  // valid_keys: of the slot on; under 32 only at the end of a request.
  __device__ __forceinline__ void add_slot(OutputFragment& o, bool is_first, int32_t valid_keys) {
    constexpr uint64_t kHalfStep = ptx::descriptor_step(64);                          // 32 keys of P
    constexpr uint32_t kPStep = ptx::descriptor_step(32);                             // 16 keys of P
    constexpr uint32_t kVStep = ptx::descriptor_step(16 * layout::kSwizzleRowBytes);  // 16 keys of V
    const uint32_t s_p = ptx::low_half_now(ptx::k_major_descriptor(ctx.shared + smem_plan<kCfg>().p(p_at.stage() / 2)) +
                                           p_at.stage() % 2 * kHalfStep);
    const uint32_t v = ptx::low_half_now(ptx::n_major_descriptor(values(ring.stage()), layout::kGroupBytes));
    wait_full<Barrier::kSlotFull>(ctx.barriers, ring);
    wait_full<Barrier::kPFull>(ctx.barriers, p_at);
    ptx::fence_proxy_async();  // P was written by stmatrix
    if (!is_first && ctx.control->is_rescaled[p_at.stage()][ctx.warp]) rescale(o);
    if (valid_keys < layout::kSlotRows) {
      zero_tail(values(ring.stage()), valid_keys, ctx.thread);
      sync_warpgroup();
    }
    ptx::wgmma_fence();
    add_keys(o, s_p, v, !is_first);
    add_keys(o, s_p + kPStep, v + kVStep, true);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_pin(o[0]);
    ptx::wgmma_pin(o[1]);
    if (ctx.lane == 0) {
      release_slot<kCfg.shares_pages>(ctx.barriers, ring.stage());
      arrive<Barrier::kPEmpty>(ctx.barriers, p_at.stage());
    }
    ring.advance();
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
      ring.advance();  // over the slots of Q
      if (q_slots(tile_rows(p.config, work)) == 2) ring.advance();
      const int32_t begin = work.begin_block * kBlockTokens, end = work.end_block * kBlockTokens;
      for (int32_t token = begin; token < end; token += layout::kSlotRows)
        add_slot(o, token == begin, work.len_tokens - token);
      wait_full<Barrier::kScaleFull>(ctx.barriers, scale_at(at));
      if (work.slot != kDropped)
        store_output<kCfg.dtype>(o, p.result, work, tile_rows(p.config, work), ctx.control->scale,
                                 ctx.control->out_row[half], tile, half, ctx.thread);
      __syncwarp();
      if (ctx.lane == 0) {
        arrive<Barrier::kScaleEmpty>(ctx.barriers, 0);
        arrive<Barrier::kWorkEmpty>(ctx.barriers, at.stage());
      }
    }
  }
};

}  // namespace mla::cuda::sm90
