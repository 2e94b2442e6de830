// One warp keeps the ring of slots full: rows of Q, then keys, of one piece after the other.
//
// Between two kernels of a stream there are some microseconds in which nothing may be computed. In them the loader guesses the first piece
// from the schedule, and its pages from the block table, as they are then. Behind the wait for the kernels before it fills as many slots as
// it may have under way by its guess, and only then compares it with what the planner read and with the table. A wrong guess costs these
// loads: nobody is told of a piece before that.
#pragma once

#include "cuda/sm90/ptx/common.cuh"
#include "cuda/sm90/ptx/mbarrier.cuh"
#include "cuda/sm90/ptx/pdl.cuh"
#include "cuda/sm90/roles/guess.cuh"
#include "cuda/sm90/roles/role.cuh"
#include "cuda/sm90/tile/load_rows.cuh"

namespace mla::cuda::sm90 {

template <DecodeConfig kCfg>
struct Loader {
  const DecodeParams& p;
  const RoleContext& ctx;
  Cursor<kCfg.ring_slots()> ring;
  Cursor<kCfg.ring_slots()> landing;  // the oldest slot whose bytes were not seen to be there
  int32_t in_flight = 0;
  bool is_guess = false;  // the piece at hand was not compared with the planner's yet

  __device__ __forceinline__ uint32_t slot_address() const { return ctx.shared + smem_plan<kCfg>().slot(ring.stage()); }
  __device__ __forceinline__ uint32_t slot_barrier() const {
    return barrier_address<Barrier::kSlotFull>(ctx.barriers, ring.stage());
  }

  // Claims the next slot: when this returns, it is empty and its barrier expects the bytes.
  __device__ __forceinline__ void begin_slot(uint32_t bytes) {
    // All slots at once would share the way to memory, and the first would land when the last does.
    if (in_flight == p.most_in_flight) {
      wait_full<Barrier::kSlotFull>(ctx.barriers, landing);
      landing.advance();
      --in_flight;
    }
    ++in_flight;
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
        const int32_t at = work.first_row + row;
        const int32_t token = p.heads_per_kv_head.quotient(at), head = p.heads_per_kv_head.remainder(at, token);
        load_query_rows<kCfg>(slot_address(), slot_barrier(), &p.q_latent, &p.q_rope, p.q_run, ctx.lane,
                              {work.kv_head * heads + head, p.result.is_ragged ? work.q_begin + token : token,
                               p.result.is_ragged ? 0 : work.request});
      }
      end_slot();
    }
  }

  // The page that holds a token; -1 (reads as zeros) past the request's end and past the table.
  __device__ __forceinline__ int32_t page_of(const Work& work, int32_t token) const {
    const int32_t index = p.page_size.quotient(token);
    return token < work.len_tokens && index < p.block_table.width
               ? __ldcg(p.block_table.data + work.request * p.block_table.row_stride + index)
               : -1;
  }
  // The one of this lane in the first window of the piece.
  __device__ __forceinline__ int32_t first_page_of(const Work& work) const {
    return page_of(work, work.begin_block * kBlockTokens + ctx.lane * p.kv_run);
  }

  // Ends the time of the guess: whether it was the first piece, read from this page on. If not, the ring is as if nothing had been loaded.
  __device__ __forceinline__ bool confirm(int32_t page) {
    const Work &guess = ctx.control->guess, &work = ctx.control->work[0];
    bool is_right = is_guess && first_page_of(guess) == page;
    wait<Barrier::kFirstWork>(ctx.barriers, 0, 0);
    if (ctx.lane < kLoaderWords)
      is_right &= reinterpret_cast<const int32_t*>(&guess)[ctx.lane] == reinterpret_cast<const int32_t*>(&work)[ctx.lane];
    is_right = __all_sync(ptx::kWholeWarp, is_right);
    if (!is_right) {
      for (; in_flight > 0; --in_flight, landing.advance()) {
        wait_full<Barrier::kSlotFull>(ctx.barriers, landing);
        __syncwarp();
        if (ctx.lane == 0) arrive<Barrier::kSlotFull>(ctx.barriers, landing.stage());  // another phase: as at the start
      }
      ring = landing = {};
    }
    is_guess = false;
    if (ctx.lane == 0) arrive<Barrier::kWorkFull>(ctx.barriers, 0);
    return is_right;
  }

  // A window of the table is 32 runs of tokens, one a lane, looked up one window ahead. False: the piece was a wrong guess.
  __device__ __forceinline__ bool load_keys(const Work& work, const int32_t first_page) {
    const int32_t run = p.kv_run;
    int32_t next_page = first_page;
    int32_t token = work.begin_block * kBlockTokens + ctx.lane * run;  // of this lane's run in the next slot
    while (token - ctx.lane * run < work.end_block * kBlockTokens) {
      const int32_t page = next_page;
      next_page = page_of(work, token + 32 * run);
#pragma unroll 1
      for (int32_t first_run = 0; first_run < 32 && token - ctx.lane * run < work.end_block * kBlockTokens;
           first_run += layout::kSlotRows / run) {
        if (is_guess && in_flight == p.most_in_flight && !confirm(first_page)) return false;
        const int32_t slot_page = __shfl_sync(ptx::kWholeWarp, page, first_run + ctx.lane);
        begin_slot(kCfg.slot_bytes());
        load_key_rows<kCfg>(slot_address(), slot_barrier(), &p.kv_latent, &p.kv_rope, run, ctx.lane,
                            {p.page_size.remainder(token, p.page_size.quotient(token)), work.kv_head, slot_page});
        end_slot();
        token += layout::kSlotRows;
      }
    }
    return !is_guess || confirm(first_page);
  }

  __device__ __forceinline__ void run_all(int tile, int part) {
    Work& guess = ctx.control->guess;
    if (ctx.lane == 0) guess_work(p, tile, part, guess);
    __syncwarp();
    is_guess = guess.request >= 0;
    int32_t page = is_guess ? first_page_of(guess) : -1;
    ptx::griddepcontrol_wait();
    if (!is_guess) confirm(page);
    for (WorkCursor at;;) {
      if (!is_guess) wait_full<Barrier::kWorkFull>(ctx.barriers, at);
      const Work& work = is_guess ? guess : ctx.control->work[at.stage()];
      if (work.request < 0) return;
      if (!is_guess) page = first_page_of(work);  // in flight while Q is issued
      load_q(work);
      if (!load_keys(work, page)) continue;  // and once more
      __syncwarp();
      if (ctx.lane == 0) arrive<Barrier::kWorkEmpty>(ctx.barriers, at.stage());
      at.advance();
    }
  }
};

}  // namespace mla::cuda::sm90
