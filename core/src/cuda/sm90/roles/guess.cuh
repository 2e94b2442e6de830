// The first piece of a part, before the kernel that the schedule comes from is known to have ended.
//
// A piece follows from a few words of the schedule. A warp reads one a lane, and once the wait for the kernels before is over again: if none of
// them is another, so is the piece, and that was one load from the second-level cache instead of two that depend on each other. In between
// the words may be old or half written, so a guess has to be harmless: what the loads rely on is checked. Nothing is read through the
// first-level cache, where what is old would stay.
//
// Where a call follows closely on another, all of this stands between the two, and every instruction is fetched for the first time. So it is
// done in the order in which it is needed, and what the first loads do not need after these.
#pragma once

#include "cuda/sm90/ptx/common.cuh"
#include "cuda/sm90/roles/pages.cuh"
#include "cuda/sm90/roles/role.cuh"
#include "schedule/walk.h"

namespace mla::cuda::sm90 {

inline constexpr int32_t kMostBlocks = 1 << 25;  // so that their tokens can be counted

struct Guess {
  const DecodeParams& p;
  const RoleContext& ctx;
  // This lane's word of the schedule: of the boundaries the first two that are the part's, then the magic number; then of a request its length,
  // its query tokens' begin and end, and its first slot.
  const int32_t* word_at = nullptr;
  int32_t word = 0;
  // This lane's page of the first window.
  const int32_t* page_at = nullptr;
  int32_t page = -1;

  // Asks for the words that name the request; needs nothing of the CTA.
  __device__ __forceinline__ void begin() {
    if (ctx.lane > kMagicWord) return;
    word_at = at(ctx.lane < kMagicWord ? p.layout.boundary + sizeof(schedule::Boundary) * blockIdx.y + 4 * ctx.lane
                                       : offsetof(schedule::Header, magic));
    word = __ldcg(word_at);
  }

  // Finds where Q and the first keys are, into work[0]; false: there is no piece that could be it. The whole warp calls this.
  __device__ __forceinline__ bool find() {
    const int lane = ctx.lane;
    const schedule::Boundary& from = boundary(0);
    if (lane <= kMagicWord) words()[lane] = word;
    __syncwarp();
    if (words()[kMagicWord] != static_cast<int32_t>(schedule::kMagic) || from.request < 0 || from.request >= p.batch ||
        from.item < 0 || from.block < 0 || from.block > kMostBlocks || !schedule::is_before(from, boundary(1)))
      return false;
    const uint32_t request = static_cast<uint32_t>(from.request);
    if (lane > kMagicWord && lane < kGuessWords) {
      word_at = at(lane == kLenWord   ? p.layout.len + 4 * request
                   : lane < kSlotWord ? p.layout.q_begin + 4 * (request + lane - kQBeginWord)
                                      : p.layout.slot_prefix + 8 * request + 4 * (lane - kSlotWord));
      word = __ldcg(word_at);
    }
    const int32_t token = first_token(p, from.block, lane);
    page_at = place_of_page(p, from.request, token);
    if (page_at != nullptr) page = __ldcg(page_at);  // under way together with the words
    if (lane > kMagicWord && lane < kGuessWords) words()[lane] = word;
    __syncwarp();
    const int32_t len = words()[kLenWord], q_begin = words()[kQBeginWord],
                  q_tokens = words()[kQBeginWord + 1] - q_begin;
    if (token >= len) {
      page_at = nullptr;
      page = -1;
    }
    Work& work = ctx.control->work[0];
    if (lane == 0) {
      write_rows(p, from.request, from.item, blockIdx.x, q_begin, q_tokens, work);
      work.begin_block = from.block;
    }
    __syncwarp();
    return from.block * kNarrowBlock < len && q_tokens >= 0 && work.first_row >= 0 && tile_rows(p.config, work) > 0;
  }

  // Whether the piece seems to be all of its item.
  __device__ __forceinline__ bool is_whole() const {
    const schedule::Boundary &from = boundary(0), &to = boundary(1);
    return from.block == 0 && (from.request != to.request || from.item != to.item);
  }

  // Reads again what the guess was made from. The answer is asked for later, so that it can be waited for beside other things.
  struct Again {
    int32_t word, page;
  };
  __device__ __forceinline__ Again read_again() const {
    return {word_at != nullptr ? __ldcg(word_at) : 0, page_at != nullptr ? __ldcg(page_at) : -1};
  }

  // Completes work[0]. Whether that is the piece.
  __device__ __forceinline__ bool complete(const Again& now) const {
    const schedule::Boundary& from = boundary(0);
    const int32_t len = words()[kLenWord];
    const int32_t n = (len - 1) / kNarrowBlock + 1;  // len > 0, see find
    const int64_t slot_prefix = static_cast<uint32_t>(words()[kSlotWord]) | int64_t{words()[kSlotWord + 1]} << 32;
    const schedule::Piece piece = schedule::piece_at(p.config, blockIdx.y, from, boundary(1), n, slot_prefix);
    if (ctx.lane == 0) write_keys(p, piece, len, ctx.control->work[0]);
    return __all_sync(ptx::kWholeWarp, now.page == page && now.word == word && piece.begin_block < piece.end_block &&
                                           piece.end_block <= n);
  }

 private:
  __device__ __forceinline__ const int32_t* at(size_t offset) const {
    return reinterpret_cast<const int32_t*>(p.schedule + offset);
  }
  __device__ __forceinline__ int32_t (&words() const)[kGuessWords] { return ctx.control->guess; }
  __device__ __forceinline__ const schedule::Boundary& boundary(int i) const {
    return reinterpret_cast<const schedule::Boundary*>(words())[i];
  }
};

}  // namespace mla::cuda::sm90
