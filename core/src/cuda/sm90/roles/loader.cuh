// One warp keeps the ring of slots full: rows of Q, then keys, of one piece after the other. Of narrow blocks; wide_loader.cuh has the other.
//
// Between two kernels of a stream there are some microseconds in which nothing may be computed. In them the loader guesses the first piece
// from the schedule, and its pages from the block table, as they are then. Behind the wait for the kernels before it asks for Q and the first keys
// by its guess, and only then looks whether schedule and table are still the same. A wrong guess costs these loads: nobody is told of a
// piece before that.
#pragma once

#include "cuda/sm90/ptx/common.cuh"
#include "cuda/sm90/ptx/mbarrier.cuh"
#include "cuda/sm90/ptx/pdl.cuh"
#include "cuda/sm90/roles/guess.cuh"
#include "cuda/sm90/roles/pages.cuh"
#include "cuda/sm90/roles/role.cuh"
#include "cuda/sm90/tile/load_rows.cuh"

namespace mla::cuda::sm90 {

template <DecodeConfig kCfg>
struct Loader {
  const DecodeParams& p;
  const RoleContext& ctx;
  Guess& guess;  // begun
  Cursor<kCfg.ring_slots()> ring;
  Cursor<kCfg.ring_slots()> landing;  // the oldest slot whose bytes were not seen to be there
  int32_t in_flight = 0;

  __device__ __forceinline__ uint32_t slot_address() const { return ctx.shared + smem_plan<kCfg>().slot(ring.stage()); }
  __device__ __forceinline__ uint32_t slot_barrier() const {
    return barrier_address<Barrier::kSlotFull>(ctx.barriers, ring.stage());
  }

  // All slots at once would share the way to memory, and the first would land when the last does.
  __device__ __forceinline__ void limit_flight() {
    for (; in_flight >= p.most_in_flight; --in_flight, landing.advance())
      wait_full<Barrier::kSlotFull>(ctx.barriers, landing);
  }

  // Claims the next slot: when this returns, it is empty and its barrier expects the bytes. kIsNew: it never held anything.
  template <bool kIsNew>
  __device__ __forceinline__ void begin_slot(uint32_t bytes) {
    ++in_flight;
    if constexpr (!kIsNew) wait_empty<Barrier::kSlotEmpty>(ctx.barriers, ring);
    if (ctx.lane == 0) ptx::mbarrier_arrive_expect_tx(slot_barrier(), bytes);
    __syncwarp();
  }

  __device__ __forceinline__ void end_slot() {
    __syncwarp();
    ring.advance();
  }

  // kIsGuess: waits for the kernels before, which wrote Q, as late as can be.
  template <bool kIsGuess>
  __device__ __forceinline__ void load_q(const Work& work) {
    const layout::Divider& heads = p.result.heads;
    const int32_t rows = tile_rows(p.config, work);
    if constexpr (!kIsGuess) limit_flight();  // where Q takes two slots it is one more: the keys wait for that
#pragma unroll 1
    for (int half = 0; half < q_slots<kCfg>(rows); ++half) {
      const int32_t first = half * layout::kSlotRows;
      const int32_t row = first + ctx.lane * p.q_run;  // of this lane's run, in the tile
      const int32_t at_row = work.first_row + row;
      const int32_t token = heads.quotient(at_row);
      const RunOrigin at{head_of_row(heads, work, at_row, token), p.result.is_ragged ? work.q_begin + token : token,
                         p.result.is_ragged ? 0 : work.request};
      begin_slot<kIsGuess>(min(rows - first, layout::kSlotRows) * kCfg.groups() * layout::kSwizzleRowBytes);
      if constexpr (kIsGuess) ptx::griddepcontrol_wait();
      if (row < rows && ctx.lane * p.q_run < layout::kSlotRows)
        load_query_rows<kCfg>(slot_address(), slot_barrier(), &p.q_latent, &p.q_rope, p.q_run, ctx.lane, at);
      end_slot();
    }
  }

  // token: of this lane's run. kIsShared: with the other CTA of the pair, which does the same.
  template <bool kIsShared, bool kIsGuess = false>
  __device__ __forceinline__ void load_slot(const Work& work, int32_t token, int32_t page) {
    begin_slot<kIsGuess>(kCfg.slot_bytes());
    load_key_rows<kCfg, kIsShared>(slot_address(), slot_barrier(), &p.kv_latent, &p.kv_rope, p.kv_run, ctx.lane,
                                   {p.page_size.remainder(token, p.page_size.quotient(token)), work.kv_head, page});
    end_slot();
  }

  // A window of the table is 32 runs of tokens, one a lane, looked up one window ahead. first_run: those before are under way already.
  __device__ __forceinline__ void load_keys(const Work& work, int32_t next_page, int32_t first_run) {
    const int32_t run = p.kv_run;
    // Of this lane's run in the next slot.
    int32_t token = work.begin_block * kNarrowBlock + (first_run + ctx.lane) * run;
    while (token - ctx.lane * run < work.end_block * kNarrowBlock) {
      const int32_t page = next_page;
      next_page = page_of(p, work, token + (32 - first_run) * run);
#pragma unroll 1
      for (; first_run < 32 && token - ctx.lane * run < work.end_block * kNarrowBlock;
           first_run += layout::kSlotRows / run) {
        const int32_t slot_page = __shfl_sync(ptx::kWholeWarp, page, first_run + ctx.lane);
        limit_flight();
        load_slot<kCfg.shares_pages>(work, token, slot_page);
        token += layout::kSlotRows;
      }
      first_run = 0;
    }
  }

  // Brings the first keys of a guessed piece into the second-level cache while the kernels before end: nobody reads them, so it does not matter
  // what those kernels still write. Not of a piece of an item that was cut: then combine holds the multiprocessors and decode starts so late
  // that there is no time for it.
  __device__ __forceinline__ void prefetch_keys(const Work& work) const {
    if (p.kv_run != layout::kSlotRows || ctx.lane >= p.prefetched_slots || guess.page < 0 || !guess.is_whole()) return;
    const int32_t token = first_token(p, work.begin_block, ctx.lane);
    const int32_t row = p.page_size.remainder(token, p.page_size.quotient(token));
    const int32_t group = kCfg.shares_pages ? static_cast<int32_t>(ptx::cta_rank()) * kCfg.box_groups() : 0;
    ptx::tma_prefetch_5d(&p.kv_latent, {{0, row, group, work.kv_head, guess.page}});
    if constexpr (kCfg.has_rope()) ptx::tma_prefetch_5d(&p.kv_rope, {{0, row, 0, work.kv_head, guess.page}});
  }

  // Asks for Q and the first keys of the first piece by a guess. Whether it was right; if not, the ring is as if nothing had been loaded.
  __device__ __forceinline__ bool load_guess() {
    const Work& work = ctx.control->work[0];
    bool is_right = guess.find();
    if (is_right) {
      prefetch_keys(work);
      load_q<true>(work);
      const Guess::Again now = guess.read_again();
      load_slot<false, true>(work, first_token(p, work.begin_block, ctx.lane), guess.page);
      is_right = guess.complete(now);
      for (; !is_right && in_flight > 0; --in_flight, landing.advance()) {
        wait_full<Barrier::kSlotFull>(ctx.barriers, landing);
        __syncwarp();
        if (ctx.lane == 0) arrive<Barrier::kSlotFull>(ctx.barriers, landing.stage());  // another phase: as at the start
      }
      if (!is_right) ring = landing = {};
    } else {
      ptx::griddepcontrol_wait();
    }
    __syncwarp();  // no lane reads work[0] any more, which the planner may write when it is told
    if (ctx.lane == 0) {
      ctx.control->is_guess_right = is_right;
      arrive<Barrier::kGuessJudged>(ctx.barriers, 0);
      if (is_right) arrive<Barrier::kWorkFull>(ctx.barriers, 0);
    }
    return is_right;
  }

  // Until both CTAs of the pair have let go of all slots: then nothing is under way any more from one to the other.
  __device__ __forceinline__ void drain() {
#pragma unroll 1
    for (int i = 0; i < kCfg.ring_slots(); ++i, ring.advance()) wait_empty<Barrier::kSlotEmpty>(ctx.barriers, ring);
  }

  __device__ __forceinline__ void run_all() {
    bool is_begun = load_guess();
    int32_t first_page = guess.page;
    if constexpr (kCfg.shares_pages) ptx::cluster_wait();  // the other CTA's barriers are there
    for (WorkCursor at;; at.advance()) {
      wait_full<Barrier::kWorkFull>(ctx.barriers, at);
      const Work& work = ctx.control->work[at.stage()];
      if (work.request < 0) break;
      if (!is_begun) {
        first_page = first_page_of(p, work, ctx.lane);  // in flight while Q is issued
        load_q<false>(work);
        if constexpr (kCfg.shares_pages) {
          limit_flight();
          if (work.begin_block < work.end_block)
            load_slot<false>(work, first_token(p, work.begin_block, ctx.lane), first_page);
        }
      }
      // Of two CTAs that share pages one may have guessed the first slot: each loads it for itself.
      load_keys(work, first_page, is_begun || kCfg.shares_pages ? layout::kSlotRows / p.kv_run : 0);
      is_begun = false;
      __syncwarp();
      if (arrives(ctx.lane)) arrive<Barrier::kWorkEmpty>(ctx.barriers, at.stage());
    }
    if constexpr (kCfg.shares_pages) drain();
  }
};

}  // namespace mla::cuda::sm90
