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

// Rows of this tile that exist.
__device__ __forceinline__ int32_t tile_rows(const schedule::Config& config, const Work& work) {
  return min(work.q_tokens * config.heads_per_kv_head - work.first_row, kTileRows);
}

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

  __device__ __forceinline__ uint32_t slot_address() const { return ctx.shared + smem_plan<kCfg>().slot(ring.stage()); }
  __device__ __forceinline__ uint32_t slot_barrier() const { return barrier_address<Barrier::kSlotFull>(ctx.barriers, ring.stage()); }

  // Claims the next slot: when this returns, it is empty and its barrier expects the bytes.
  __device__ __forceinline__ void begin_slot(uint32_t bytes) {
    wait_empty<Barrier::kSlotEmpty>(ctx.barriers, ring);
    if (ctx.lane == 0) ptx::mbarrier_arrive_expect_tx(slot_barrier(), bytes);
    __syncwarp();
  }

  __device__ __forceinline__ void end_slot() {
    __syncwarp();
    ring.advance();
  }

  __device__ __forceinline__ void load_q(const Work& work) {
    const int32_t heads = p.config.heads_per_kv_head;
    const int32_t rows = tile_rows(p.config, work);
#pragma unroll 1
    for (int half = 0; half < q_slots(rows); ++half) {
      const int32_t first = half * layout::kSlotRows;
      const int32_t row = first + ctx.lane * p.q_run;  // of this lane's run, in the tile
      begin_slot(min(rows - first, layout::kSlotRows) * kCfg.groups() * layout::kSwizzleRowBytes);
      if (row < rows && ctx.lane * p.q_run < layout::kSlotRows) {
        const int32_t token = (work.first_row + row) / heads, head = (work.first_row + row) % heads;
        load_query_rows<kCfg>(slot_address(), slot_barrier(), &p.q_latent, &p.q_rope, p.q_run, ctx.lane,
                              {work.kv_head * heads + head, p.result.is_ragged ? work.q_begin + token : token,
                               p.result.is_ragged ? 0 : work.request});
      }
      end_slot();
    }
  }

  // The page that holds a token; -1 (reads as zeros) past the request's end and past the table.
  __device__ __forceinline__ int32_t page_of(const Work& work, int32_t token) const {
    const int32_t index = token / p.page_size;
    return token < work.len_tokens && index < p.block_table.width ? p.block_table.data[work.request * p.block_table.row_stride + index] : -1;
  }

  // A window of the table is 32 runs of tokens, one a lane, looked up one window ahead.
  __device__ __forceinline__ void load_keys(const Work& work, int32_t next_page) {
    const int32_t run = p.kv_run;
    int32_t token = work.begin_block * kBlockTokens + ctx.lane * run;  // of this lane's run in the next slot
    while (token - ctx.lane * run < work.end_block * kBlockTokens) {
      const int32_t page = next_page;
      next_page = page_of(work, token + 32 * run);
#pragma unroll 1
      for (int32_t first_run = 0; first_run < 32 && token - ctx.lane * run < work.end_block * kBlockTokens;
           first_run += layout::kSlotRows / run) {
        const int32_t slot_page = __shfl_sync(kWholeWarp, page, first_run + ctx.lane);
        begin_slot(kCfg.slot_bytes());
        load_key_rows<kCfg>(slot_address(), slot_barrier(), &p.kv_latent, &p.kv_rope, run, ctx.lane,
                            {token % p.page_size, work.kv_head, slot_page});
        end_slot();
        token += layout::kSlotRows;
      }
    }
  }

  __device__ __forceinline__ void run_all() {
    for (WorkCursor at;; at.advance()) {
      wait_full<Barrier::kWorkFull>(ctx.barriers, at);
      const Work& work = ctx.control->work[at.stage()];
      if (work.request < 0) return;
      const int32_t first_page = page_of(work, work.begin_block * kBlockTokens + ctx.lane * p.kv_run);  // in flight while Q is issued
      load_q(work);
      load_keys(work, first_page);
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
  uint32_t r_q[kCfg.q_register_steps()][4];
  SoftmaxState state;

  __device__ __forceinline__ uint32_t slot_address() const { return ctx.shared + smem_plan<kCfg>().slot(ring.stage()); }

  // s [64 rows, 32 keys] = Q K^T for the ring's next slot, which is full: issued, not waited for. The warps are held while they issue
  // all but the last few products, so when this returns the tensor cores are nearly done with it.
  __device__ __forceinline__ void issue_scores(float (&s)[16]) {
    constexpr uint64_t kGroupStep = ptx::descriptor_step(layout::kGroupBytes);
    constexpr uint64_t kQGroupStep = ptx::descriptor_step(kTileRows * layout::kSwizzleRowBytes);
    constexpr uint64_t kStep = ptx::descriptor_step(32);  // 16 columns
    const uint64_t k = ptx::k_major_descriptor(slot_address());
    const uint64_t q = ptx::k_major_descriptor(ctx.shared + smem_plan<kCfg>().q());
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kCfg.q_register_steps(); ++step) {
      ptx::wgmma_m64n32k16_rs<kCfg.dtype>(s, r_q[step], k + step / 4 * kGroupStep + step % 4 * kStep, step > 0);
    }
#pragma unroll
    for (int step = kCfg.q_register_steps(); step < kCfg.q_steps(); ++step) {
      ptx::wgmma_m64n32k16_ss<kCfg.dtype>(s, q + (step / 4 - kCfg.q_first_shared_group()) * kQGroupStep + step % 4 * kStep,
                                          k + step / 4 * kGroupStep + step % 4 * kStep, 1);
    }
    ptx::wgmma_commit_group();
  }

  __device__ __forceinline__ void take_q_slots(int32_t rows) {
    Cursor<kCfg.ring_slots()> mine = ring;  // of a warp without rows: any full slot will do
    if (ctx.warp >= 2 && q_slots(rows) == 2) mine.advance();
    wait_full<Barrier::kSlotFull>(ctx.barriers, mine);
    ptx::bar_sync<NamedBarrier::kScores>(kMathThreads);  // no warp reads the previous Q any more
    take_q<kCfg>(ctx.shared + smem_plan<kCfg>().slot(mine.stage()), ctx.shared + smem_plan<kCfg>().q(), p.q_run, rows, ctx.warp, ctx.lane, r_q);
    ptx::bar_sync<NamedBarrier::kScores>(kMathThreads);
    for (int half = 0; half < q_slots(rows); ++half) {
      if (ctx.lane == 0) {
        arrive<Barrier::kSlotEmpty>(ctx.barriers, ring.stage());
        arrive<Barrier::kSlotEmpty>(ctx.barriers, ring.stage());
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
    wait_empty<Barrier::kPEmpty>(ctx.barriers, p_at);
    store_p(ctx.shared + smem_plan<kCfg>().p(p_at.stage() / 2), p_at.stage() % 2, ctx.warp, ctx.lane, packed);
    if (is_rescaled && ctx.lane % 4 == 0) {
      ctx.control->rescale[p_at.stage()][layout::fragment_row(ctx.thread, 0)] = rescale[0];
      ctx.control->rescale[p_at.stage()][layout::fragment_row(ctx.thread, 1)] = rescale[1];
    }
    if (ctx.lane == 0) ctx.control->is_rescaled[p_at.stage()][ctx.warp] = is_rescaled;
    ptx::fence_proxy_async();
    __syncwarp();
  }

  // I2: P and the rescale factors of the slot are in shared memory before this arrive.
  __device__ __forceinline__ void hand_over_p() {
    if (ctx.lane == 0) arrive<Barrier::kPFull>(ctx.barriers, p_at.stage());
    p_at.advance();
  }

  // Keys that row `row` of the tile sees, at most len.
  __device__ __forceinline__ int32_t visible_keys(const Work& work, int32_t row) const {
    if (!p.is_causal) return work.len_tokens;
    const int32_t token = (work.first_row + row) / p.config.heads_per_kv_head;
    return min(work.len_tokens, work.len_tokens - work.q_tokens + 1 + token);
  }

  // P is handed over only when the next slot's products are issued, so that P V runs under the next exponentials and not beside the next
  // Q K^T; where the next slot is not there yet, at once.
  __device__ __forceinline__ void run_slots(const Work& work) {
    const int32_t begin = work.begin_block * kBlockTokens;
    const int32_t slots = (work.end_block - work.begin_block) * 2;
    int visible[2] = {visible_keys(work, layout::fragment_row(ctx.thread, 0)) - begin, visible_keys(work, layout::fragment_row(ctx.thread, 1)) - begin};
    const int32_t first_masked = (max(visible_keys(work, 0), 0) - begin) / layout::kSlotRows;  // row 0 sees least
    bool has_p = false;  // a P that was not handed over
#pragma unroll 1
    for (int32_t slot = 0; slot < slots; ++slot) {
      if (has_p && !is_full<Barrier::kSlotFull>(ctx.barriers, ring)) {
        hand_over_p();
        has_p = false;
      }
      wait_full<Barrier::kSlotFull>(ctx.barriers, ring);
      float s[16];
      issue_scores(s);
      if (has_p) hand_over_p();
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_pin(s);
      weigh(s, slot >= first_masked, visible);
        ring.advance();
      has_p = true;
      visible[0] -= layout::kSlotRows;
      visible[1] -= layout::kSlotRows;
    }
    hand_over_p();
  }

  __device__ __forceinline__ void finish(const Work& work, WorkCursor at, int tile) {
    wait_empty<Barrier::kScaleEmpty>(ctx.barriers, scale_at(at));
    const int32_t rows = tile_rows(p.config, work);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = sum_of_quad(state.sum[r]);
      const int row = layout::fragment_row(ctx.thread, r);
      if (ctx.lane % 4 == 0 && row < rows) {
        const float lse_log2 = sum == 0.0f ? -INFINITY : state.maximum[r] + log2f(sum);
        ctx.control->scale[row] = finish_row(p.result, p.config, work, tile * kTileRows + row, work.first_row + row, lse_log2, sum);
      }
    }
    if (ctx.lane % 4 == 0) arrive<Barrier::kScaleFull>(ctx.barriers, 0);
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

  // valid_keys: of the slot on; under 32 only at the end of a request.
  __device__ __forceinline__ void add_slot(OutputFragment& o, bool is_first, int32_t valid_keys) {
    wait_full<Barrier::kSlotFull>(ctx.barriers, ring);
    wait_full<Barrier::kPFull>(ctx.barriers, p_at);
    if (!is_first && ctx.control->is_rescaled[p_at.stage()][ctx.warp]) rescale(o);
    if (valid_keys < layout::kSlotRows) {
      zero_tail(values(ring.stage()), valid_keys, ctx.thread);
      sync_warpgroup();
    }
    constexpr uint64_t kHalfStep = ptx::descriptor_step(64);                          // 32 keys of P
    constexpr uint64_t kPStep = ptx::descriptor_step(32);                             // 16 keys of P
    constexpr uint64_t kVStep = ptx::descriptor_step(16 * layout::kSwizzleRowBytes);  // 16 keys of V
    const uint64_t s_p = ptx::k_major_descriptor(ctx.shared + smem_plan<kCfg>().p(p_at.stage() / 2)) + p_at.stage() % 2 * kHalfStep;
    const uint64_t v = ptx::n_major_descriptor(values(ring.stage()), layout::kGroupBytes);
    ptx::wgmma_fence();
    add_keys(o, s_p, v, !is_first);
    add_keys(o, s_p + kPStep, v + kVStep, true);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_pin(o[0]);
    ptx::wgmma_pin(o[1]);
    if (ctx.lane == 0) {
      arrive<Barrier::kSlotEmpty>(ctx.barriers, ring.stage());
      arrive<Barrier::kPEmpty>(ctx.barriers, p_at.stage());
    }
    ring.advance();
    p_at.advance();
  }

  __device__ __forceinline__ void run_all(int tile) {
    for (WorkCursor at;; at.advance()) {
      wait_full<Barrier::kWorkFull>(ctx.barriers, at);
      const Work& work = ctx.control->work[at.stage()];
      if (work.request < 0) return;
      OutputFragment o;
      ring.advance();  // over the slots of Q
      if (q_slots(tile_rows(p.config, work)) == 2) ring.advance();
      const int32_t begin = work.begin_block * kBlockTokens, end = work.end_block * kBlockTokens;
      for (int32_t token = begin; token < end; token += layout::kSlotRows) add_slot(o, token == begin, work.len_tokens - token);
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
  if (threadIdx.x == kThreads - 1) {
    ptx::prefetch_tensor_map(&p.q_latent);
    ptx::prefetch_tensor_map(&p.kv_latent);
    if constexpr (kCfg.has_rope()) {
      ptx::prefetch_tensor_map(&p.q_rope);
      ptx::prefetch_tensor_map(&p.kv_rope);
    }
  }
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
