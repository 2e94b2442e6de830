// Dense MLA decode on sm_90a: O = softmax(scale Q K^T) V with Q [rows, 576 | 512], K [len, same], V = K[:, :512]; README.md has the design.
//
// A CTA owns up to 64 rows of an item and walks the pieces of its part. Four warpgroups by role:
//   loader   one warp plans (schedule -> Work), one warp feeds the ring of 32-row slots by TMA
//   scores   S = Q K^T (Q in registers), softmax, P to shared memory
//   outputs  two warpgroups, 256 columns of O each: O = O * rescale + P V
#pragma once

#include "cuda/sm90/epilogue.cuh"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/mask.cuh"
#include "cuda/sm90/pipeline.cuh"
#include "cuda/sm90/ptx/common.cuh"
#include "cuda/sm90/ptx/named_barrier.cuh"
#include "cuda/sm90/ptx/pdl.cuh"
#include "cuda/sm90/ptx/reg.cuh"
#include "cuda/sm90/ptx/wgmma.cuh"
#include "cuda/sm90/softmax.cuh"
#include "cuda/sm90/tile/load_rows.cuh"
#include "cuda/sm90/tile/store_p.cuh"
#include "cuda/sm90/tile/take_q.cuh"
#include "cuda/sm90/tile/zero_tail.cuh"
#include "schedule/walk.h"

namespace mla::cuda::sm90 {

using WorkCursor = Cursor<kWorkStages>;
using PCursor = Cursor<kPStages>;

// The row scales are one buffer, passed once for each work.
__device__ __forceinline__ Cursor<1> scale_at(WorkCursor at) { return {at.value}; }

// ---- planner: one thread turns its part of the schedule into Work --------------------------------------------------------

// The fields are written one by one once the buffer is free: the planner has few registers.
__device__ __forceinline__ void run_planner(const DecodeParams& p, const RoleContext& ctx, int tile, int part) {
  const schedule::ConstView view(p.schedule, p.layout);
  WorkCursor at;
  schedule::for_each_piece(p.config, view, part, [&](const schedule::Piece& piece, int32_t) {
    const int32_t first_row = piece.item / p.config.kv_heads * p.config.item_rows + tile * kTileRows;
    if (piece.request >= p.batch || first_row >= view.q_tokens(piece.request) * p.config.heads_per_kv_head) return;  // I1: the tile has a row
    wait_empty<Barrier::kWorkEmpty>(ctx.barriers, at);
    Work& work = ctx.control->work[at.stage()];
    work.request = piece.request;
    work.begin_block = piece.begin_block;
    work.end_block = piece.end_block;
    work.slot = piece.slot < 0 ? kWholeItem : piece.slot < p.config.slots ? static_cast<int32_t>(piece.slot) : kDropped;
    work.first_row = first_row;
    work.kv_head = piece.item % p.config.kv_heads;
    work.len_tokens = view.len()[piece.request];
    work.q_begin = view.q_begin()[piece.request];
    work.q_tokens = view.q_tokens(piece.request);
    arrive<Barrier::kWorkFull>(ctx.barriers, at.stage());
    at.advance();
  });
  wait_empty<Barrier::kWorkEmpty>(ctx.barriers, at);
  ctx.control->work[at.stage()].request = -1;
  arrive<Barrier::kWorkFull>(ctx.barriers, at.stage());
}

// ---- loader: one warp keeps the ring full ---------------------------------------------------------------------------------

template <DecodeConfig kCfg>
struct Loader {
  const DecodeParams& p;
  const RoleContext& ctx;
  Cursor<kCfg.ring_slots()> ring;

  // Claims the next slot: when this returns, it is empty and its barrier expects the bytes.
  __device__ __forceinline__ void begin_slot() {
    wait_empty<Barrier::kSlotEmpty>(ctx.barriers, ring);
    if (ctx.lane == 0) {
      ptx::mbarrier_arrive_expect_tx(barrier_address<Barrier::kSlotFull>(ctx.barriers, ring.stage()), kCfg.slot_bytes());
    }
    __syncwarp();
  }

  __device__ __forceinline__ void fill(const CUtensorMap* latent, const CUtensorMap* rope, int run, const RunOrigin& at) {
    load_rows<kCfg>(ctx.shared + smem_plan<kCfg>().slot(ring.stage()), barrier_address<Barrier::kSlotFull>(ctx.barriers, ring.stage()), latent,
                    rope, run, ctx.lane, at);
    __syncwarp();
    ring.advance();
  }

  __device__ __forceinline__ void load_q(const Work& work) {
    const int32_t heads = p.config.heads_per_kv_head;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const int32_t row = work.first_row + half * layout::kSlotRows + ctx.lane * p.q_run;
      const int32_t token = row < work.q_tokens * heads ? row / heads : -1;  // -1: outside, reads as zeros
      const int32_t first_token = p.result.is_ragged ? work.q_begin : 0;
      begin_slot();
      fill(&p.q_latent, &p.q_rope, p.q_run,
           {work.kv_head * heads + row % heads, token < 0 ? -1 : first_token + token, p.result.is_ragged ? 0 : work.request});
    }
  }

  // The page that holds a token; -1 (reads as zeros) past the request's end and past the table.
  __device__ __forceinline__ int32_t page_of(const Work& work, int32_t token) const {
    const int32_t index = token / p.page_size;
    return token < work.len_tokens && index < p.block_table.width ? p.block_table.data[work.request * p.block_table.row_stride + index] : -1;
  }

  // A window of the table is 32 runs of tokens, one a lane, looked up one window ahead.
  __device__ __forceinline__ void load_keys(const Work& work) {
    const int32_t run = p.kv_run;
    const int32_t runs_of_slot = layout::kSlotRows / run;
    int32_t window_token = work.begin_block * kBlockTokens + ctx.lane * run;  // of this lane's run
    int32_t next_page = page_of(work, window_token);
    int32_t page = -1;
    int32_t run_in_window = 32;
    for (int32_t token = work.begin_block * kBlockTokens; token < work.end_block * kBlockTokens; token += layout::kSlotRows) {
      if (run_in_window == 32) {
        run_in_window = 0;
        page = next_page;
        window_token += 32 * run;
        next_page = page_of(work, window_token);
      }
      const int32_t slot_page = __shfl_sync(kWholeWarp, page, run_in_window + ctx.lane);
      run_in_window += runs_of_slot;
      begin_slot();
      fill(&p.kv_latent, &p.kv_rope, run, {(token + ctx.lane * run) % p.page_size, work.kv_head, slot_page});
    }
  }

  __device__ __forceinline__ void run_all() {
    for (WorkCursor at;; at.advance()) {
      wait_full<Barrier::kWorkFull>(ctx.barriers, at);
      const Work& work = ctx.control->work[at.stage()];
      if (work.request < 0) return;
      load_q(work);
      load_keys(work);
      __syncwarp();
      if (ctx.lane == 0) arrive<Barrier::kWorkEmpty>(ctx.barriers, at.stage());
    }
  }
};

// ---- scores: S = Q K^T, softmax, P ----------------------------------------------------------------------------------------

template <DecodeConfig kCfg>
struct Scores {
  const DecodeParams& p;
  const RoleContext& ctx;
  Cursor<kCfg.ring_slots()> ring;
  PCursor p_at;
  uint32_t r_q[4 * kCfg.q_register_groups()][4];
  SoftmaxState state;

  __device__ __forceinline__ uint32_t slot_address() const { return ctx.shared + smem_plan<kCfg>().slot(ring.stage()); }

  // s [64 rows, 32 keys] = Q K^T for the ring's next slot: issued, not waited for. Nothing else may be in flight that reads s.
  __device__ __forceinline__ void issue_scores(float (&s)[16]) {
    wait_full<Barrier::kSlotFull>(ctx.barriers, ring);
    constexpr uint64_t kGroupStep = ptx::descriptor_step(layout::kGroupBytes);
    constexpr uint64_t kQGroupStep = ptx::descriptor_step(kTileRows * layout::kSwizzleRowBytes);
    constexpr uint64_t kStep = ptx::descriptor_step(32);  // 16 columns
    constexpr int kRegisterSteps = 4 * kCfg.q_register_groups();
    const uint64_t k = ptx::k_major_descriptor(slot_address());
    const uint64_t q = ptx::k_major_descriptor(ctx.shared + smem_plan<kCfg>().q());
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kRegisterSteps; ++step) {
      ptx::wgmma_m64n32k16_rs<kCfg.dtype>(s, r_q[step], k + step / 4 * kGroupStep + step % 4 * kStep, step > 0);
    }
#pragma unroll
    for (int step = kRegisterSteps; step < 4 * kCfg.groups(); ++step) {
      ptx::wgmma_m64n32k16_ss<kCfg.dtype>(s, q + (step - kRegisterSteps) / 4 * kQGroupStep + step % 4 * kStep,
                                          k + step / 4 * kGroupStep + step % 4 * kStep, 1);
    }
    ptx::wgmma_commit_group();
    ring.advance();
  }

  __device__ __forceinline__ void take_q_slots() {
    Cursor<kCfg.ring_slots()> mine = ring;
    if (ctx.warp >= 2) mine.advance();
    wait_full<Barrier::kSlotFull>(ctx.barriers, mine);
    ptx::bar_sync<NamedBarrier::kScores>(kMathThreads);  // no warp reads the previous Q any more
    take_q<kCfg>(ctx.shared + smem_plan<kCfg>().slot(mine.stage()), ctx.shared + smem_plan<kCfg>().q(), ctx.warp, ctx.lane, r_q);
    ptx::bar_sync<NamedBarrier::kScores>(kMathThreads);
    for (int half = 0; half < 2; ++half) {
      if (ctx.lane == 0) {
        arrive<Barrier::kSlotEmpty>(ctx.barriers, ring.stage());
        arrive<Barrier::kSlotEmpty>(ctx.barriers, ring.stage());
      }
      ring.advance();
    }
  }

  // I2: P and the rescale factors of this block are in shared memory before this arrive.
  __device__ __forceinline__ void hand_over_p(bool is_rescaled, const float (&rescale)[2]) {
    if (is_rescaled && ctx.lane % 4 == 0) {
      ctx.control->rescale[p_at.stage()][layout::fragment_row(ctx.thread, 0)] = rescale[0];
      ctx.control->rescale[p_at.stage()][layout::fragment_row(ctx.thread, 1)] = rescale[1];
    }
    if (ctx.lane == 0) ctx.control->is_rescaled[p_at.stage()][ctx.warp] = is_rescaled;
    ptx::fence_proxy_async();
    __syncwarp();
    if (ctx.lane == 0) arrive<Barrier::kPFull>(ctx.barriers, p_at.stage());
    p_at.advance();
  }

  // One block: its scores are in a and b. With kHasNext the next block's products run under this block's exponentials.
  template <bool kHasNext>
  __device__ __forceinline__ void step(float (&a)[16], float (&b)[16]) {
    float rescale[2];
    uint32_t packed[8];
    const bool is_rescaled = move_maximum(a, b, p.scale_log2e, state, rescale);
    const uint32_t s_p = ctx.shared + smem_plan<kCfg>().p(p_at.stage());
    exponentials<kCfg.dtype>(a, p.scale_log2e, state, packed);
    if constexpr (kHasNext) issue_scores(a);
    wait_empty<Barrier::kPEmpty>(ctx.barriers, p_at);
    store_p(s_p, 0, ctx.warp, ctx.lane, packed);
    exponentials<kCfg.dtype>(b, p.scale_log2e, state, packed);
    if constexpr (kHasNext) issue_scores(b);
    store_p(s_p, 1, ctx.warp, ctx.lane, packed);
    hand_over_p(is_rescaled, rescale);
    if constexpr (kHasNext) {
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_pin(a);
      ptx::wgmma_pin(b);
    }
  }

  __device__ __forceinline__ void mask(float (&a)[16], float (&b)[16], const int (&visible)[2], int32_t block) {
    const int low[2] = {visible[0] - block * kBlockTokens, visible[1] - block * kBlockTokens};
    const int high[2] = {low[0] - layout::kSlotRows, low[1] - layout::kSlotRows};
    mask_scores(a, ctx.lane, low);
    mask_scores(b, ctx.lane, high);
  }

  // Keys that row `row` of the tile sees, at most len.
  __device__ __forceinline__ int32_t visible_keys(const Work& work, int32_t row) const {
    if (!p.is_causal) return work.len_tokens;
    const int32_t token = (work.first_row + row) / p.config.heads_per_kv_head;
    return min(work.len_tokens, work.len_tokens - work.q_tokens + 1 + token);
  }

  __device__ __forceinline__ void run_blocks(const Work& work) {
    const int visible[2] = {visible_keys(work, layout::fragment_row(ctx.thread, 0)), visible_keys(work, layout::fragment_row(ctx.thread, 1))};
    const int32_t first_masked = max(visible_keys(work, 0), 0) / kBlockTokens;  // row 0 sees least
    const int32_t last = work.end_block - 1;
    float a[16], b[16];
    issue_scores(a);
    issue_scores(b);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_pin(a);
    ptx::wgmma_pin(b);
    for (int32_t block = work.begin_block; block < last; ++block) {
      if (block >= first_masked) mask(a, b, visible, block);
      step<true>(a, b);
    }
    if (last >= first_masked) mask(a, b, visible, last);
    step<false>(a, b);
  }

  __device__ __forceinline__ void finish(const Work& work, WorkCursor at, int tile) {
    wait_empty<Barrier::kScaleEmpty>(ctx.barriers, scale_at(at));
    const int32_t rows = work.q_tokens * p.config.heads_per_kv_head - work.first_row;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = sum_of_quad(state.sum[r]);
      const int row = layout::fragment_row(ctx.thread, r);
      if (ctx.lane % 4 == 0 && row < rows) {
        const float lse_log2 = sum == 0.0f ? -INFINITY : state.maximum[r] + log2f(sum);
        ctx.control->scale[row] = finish_row(p.result, p.config, work, tile * kTileRows + row, work.first_row + row, lse_log2, sum);
      }
    }
    __syncwarp();
    if (ctx.lane == 0) arrive<Barrier::kScaleFull>(ctx.barriers, 0);
  }

  __device__ __forceinline__ void run_all(int tile) {
    for (WorkCursor at;; at.advance()) {
      wait_full<Barrier::kWorkFull>(ctx.barriers, at);
      const Work& work = ctx.control->work[at.stage()];
      if (work.request < 0) return;
      take_q_slots();
      state = {};
      if (work.begin_block < work.end_block) run_blocks(work);
      finish(work, at, tile);
      if (ctx.lane == 0) arrive<Barrier::kWorkEmpty>(ctx.barriers, at.stage());
    }
  }
};

// ---- outputs: O [64 rows, 256 columns] += P V -----------------------------------------------------------------------------

template <DecodeConfig kCfg>
struct Outputs {
  const DecodeParams& p;
  const RoleContext& ctx;
  int half;  // of the output columns
  Cursor<kCfg.ring_slots()> ring;
  PCursor p_at;

  __device__ __forceinline__ uint32_t values(uint32_t stage) const {
    return ctx.shared + smem_plan<kCfg>().slot(stage) + half * (kHalfColumns / layout::kGroupColumns) * layout::kGroupBytes;
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
  __device__ __forceinline__ static void add_keys(OutputFragment& o, uint64_t s_p, uint64_t v, bool accumulate) {
    constexpr uint64_t kQuarterStep = ptx::descriptor_step(kQuarterColumns / layout::kGroupColumns * layout::kGroupBytes);
    ptx::wgmma_m64n128k16_ss_t<kCfg.dtype>(o[0], s_p, v, accumulate);
    ptx::wgmma_m64n128k16_ss_t<kCfg.dtype>(o[1], s_p, v + kQuarterStep, accumulate);
  }

  // valid_keys: of the block; under 64 only in the last block of a request.
  __device__ __forceinline__ void add_block(OutputFragment& o, bool is_first, int32_t valid_keys) {
    const uint32_t low = ring.stage();
    wait_full<Barrier::kSlotFull>(ctx.barriers, ring);
    ring.advance();
    const uint32_t high = ring.stage();
    wait_full<Barrier::kSlotFull>(ctx.barriers, ring);
    ring.advance();
    wait_full<Barrier::kPFull>(ctx.barriers, p_at);
    if (!is_first && ctx.control->is_rescaled[p_at.stage()][ctx.warp]) rescale(o);
    if (valid_keys < kBlockTokens) {
      zero_tail(values(low), valid_keys, ctx.thread);
      zero_tail(values(high), valid_keys - layout::kSlotRows, ctx.thread);
      sync_warpgroup();
    }
    constexpr uint64_t kPStep = ptx::descriptor_step(32);                               // 16 keys
    constexpr uint64_t kVStep = ptx::descriptor_step(16 * layout::kSwizzleRowBytes);    // 16 keys
    const uint64_t s_p = ptx::k_major_descriptor(ctx.shared + smem_plan<kCfg>().p(p_at.stage()));
    const uint64_t v_low = ptx::n_major_descriptor(values(low), layout::kGroupBytes);
    const uint64_t v_high = ptx::n_major_descriptor(values(high), layout::kGroupBytes);
    ptx::wgmma_fence();
    add_keys(o, s_p, v_low, !is_first);
    add_keys(o, s_p + kPStep, v_low + kVStep, true);
    ptx::wgmma_commit_group();
    add_keys(o, s_p + 2 * kPStep, v_high, true);
    add_keys(o, s_p + 3 * kPStep, v_high + kVStep, true);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<1>();
    if (ctx.lane == 0) arrive<Barrier::kSlotEmpty>(ctx.barriers, low);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_pin(o[0]);
    ptx::wgmma_pin(o[1]);
    if (ctx.lane == 0) {
      arrive<Barrier::kSlotEmpty>(ctx.barriers, high);
      arrive<Barrier::kPEmpty>(ctx.barriers, p_at.stage());
    }
    p_at.advance();
  }

  __device__ __forceinline__ void run_all(int tile) {
    for (WorkCursor at;; at.advance()) {
      wait_full<Barrier::kWorkFull>(ctx.barriers, at);
      const Work& work = ctx.control->work[at.stage()];
      if (work.request < 0) return;
      OutputFragment o;
      ring.advance();  // over the slots of Q
      ring.advance();
      for (int32_t block = work.begin_block; block < work.end_block; ++block) {
        add_block(o, block == work.begin_block, work.len_tokens - block * kBlockTokens);
      }
      wait_full<Barrier::kScaleFull>(ctx.barriers, scale_at(at));
      if (work.slot != kDropped) store_output<kCfg.dtype>(o, p.result, p.config, work, ctx.control->scale, tile, half, ctx.thread);
      __syncwarp();
      if (ctx.lane == 0) {
        arrive<Barrier::kScaleEmpty>(ctx.barriers, 0);
        arrive<Barrier::kWorkEmpty>(ctx.barriers, at.stage());
      }
    }
  }
};

// ---- the kernel -----------------------------------------------------------------------------------------------------------

// Grid (row tiles of an item, parts); tiles in pairs form clusters, which read the same pages at the same time.
// Variant::kConfig is the DecodeConfig: nvcc 13.0's host stub cannot spell a struct value as a template argument.
template <class Variant>
__global__ void __launch_bounds__(kThreads, 1) decode_dense_kernel(const __grid_constant__ DecodeParams p) {
  constexpr DecodeConfig kCfg = Variant::kConfig;
  extern __shared__ __align__(1024) std::byte shared[];
  Control* control = reinterpret_cast<Control*>(shared + smem_plan<kCfg>().control());
  const int warpgroup = __shfl_sync(kWholeWarp, static_cast<int>(threadIdx.x) / kMathThreads, 0);
  const int thread = threadIdx.x % kMathThreads;
  const RoleContext ctx{ptx::shared_address(shared), ptx::shared_address(control->barriers), control, thread / 32, thread % 32, thread};
  const int tile = blockIdx.x;
  if (threadIdx.x == 0) init_barriers(ctx.barriers);
  __syncthreads();
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();

  if (warpgroup == 0) {
    ptx::setmaxnreg_inc<kScoreRegisters>();
    Scores<kCfg>{p, ctx}.run_all(tile);
  } else if (warpgroup == 3) {
    ptx::setmaxnreg_dec<kLoaderRegisters>();
    if (ctx.warp == 0) {
      Loader<kCfg>{p, ctx}.run_all();
    } else if (ctx.warp == 1 && ctx.lane == 0) {
      run_planner(p, ctx, tile, blockIdx.y);
    }
  } else {
    ptx::setmaxnreg_inc<kOutputRegisters>();
    Outputs<kCfg>{p, ctx, warpgroup - 1}.run_all(tile);
  }
}

}  // namespace mla::cuda::sm90

// In a file of its own each: compiles the variant and defines its handle.
#define MLA_INSTANTIATE(name)                                                                          \
  namespace mla::cuda::sm90 {                                                                          \
  const void* decode_kernel(Variant_##name) {                                                          \
    return reinterpret_cast<const void*>(&decode_dense_kernel<Variant_##name>);                        \
  }                                                                                                    \
  }
