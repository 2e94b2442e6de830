// The first piece of a part, before the kernel that the schedule comes from is known to have ended.
//
// A piece follows from a few words of the schedule. A warp reads one a lane, and once the wait for the kernels before is over again: if none of
// them is another, so is the piece, and that was one load from the second-level cache instead of two that depend on each other. In between
// the words may be old or half written, so a guess has to be harmless: what the loader relies on is checked. Nothing is read through the
// first-level cache, where what is old would stay.
#pragma once

#include "cuda/sm90/roles/pages.cuh"
#include "cuda/sm90/roles/role.cuh"
#include "schedule/walk.h"

namespace mla::cuda::sm90 {

inline constexpr int32_t kMostBlocks = 1 << 25;  // so that their tokens can be counted

struct Guess {
  const DecodeParams& p;
  const RoleContext& ctx;

  // This lane's word: of the boundaries the first two that are the part's, then the magic number; then of a request its length, its query
  // tokens' begin and end, and its first slot.
  __device__ __forceinline__ int32_t read(int32_t request) const {
    const schedule::Layout& at = p.layout;
    const int lane = ctx.lane;
    const size_t offset = lane < kMagicWord ? at.boundary_offset() + sizeof(schedule::Boundary) * blockIdx.y + 4 * lane
                          : lane == kMagicWord ? offsetof(schedule::Header, magic)
                          : lane == kLenWord   ? at.len_offset() + 4 * static_cast<size_t>(request)
                          : lane < kSlotWord
                              ? at.q_begin_offset() + 4 * static_cast<size_t>(request + lane - kQBeginWord)
                              : at.slot_prefix_offset() + 8 * static_cast<size_t>(request) + 4 * (lane - kSlotWord);
    return __ldcg(reinterpret_cast<const int32_t*>(p.schedule + offset));
  }

  // The part's first Work, into work[0], and this lane's page of its first window; false: there is no piece that could be it. The whole warp
  // calls this.
  __device__ __forceinline__ bool make(int32_t& page) const {
    int32_t (&words)[kGuessWords] = ctx.control->guess;
    Work& work = ctx.control->work[0];
    const int lane = ctx.lane;
    if (lane <= kMagicWord) words[lane] = read(0);
    __syncwarp();
    const schedule::Boundary &at = reinterpret_cast<const schedule::Boundary*>(words)[0],
                             &end = reinterpret_cast<const schedule::Boundary*>(words)[1];
    if (words[kMagicWord] != static_cast<int32_t>(schedule::kMagic) || at.request < 0 || at.request >= p.batch ||
        at.item < 0 || at.block < 0 || at.block > kMostBlocks)
      return false;
    const int32_t word = lane > kMagicWord && lane < kGuessWords ? read(at.request) : 0;
    page = page_at(p, at.request, first_token(p, at.block, lane));  // under way together with the words
    if (lane > kMagicWord && lane < kGuessWords) words[lane] = word;
    __syncwarp();
    const int32_t len = words[kLenWord], q_begin = words[kQBeginWord], q_tokens = words[kQBeginWord + 1] - q_begin;
    const int32_t n = p.config.blocks(len);
    const int64_t slot_prefix = static_cast<uint32_t>(words[kSlotWord]) | int64_t{words[kSlotWord + 1]} << 32;
    const schedule::Piece piece = schedule::piece_at(p.config, blockIdx.y, at, end, n, slot_prefix);
    if (len <= 0 || piece.begin_block >= piece.end_block || piece.end_block > n || q_tokens < 0) return false;
    if (lane == 0) write_work(p, piece, blockIdx.x, len, q_begin, q_tokens, work);
    __syncwarp();
    if (first_token(p, at.block, lane) >= len) page = -1;
    const int32_t rows = tile_rows(p.config, work);
    return work.first_row >= 0 && 0 < rows && rows <= kTileRows;
  }

  // Reads again what make read. The answer is asked for later, so that it can be waited for beside other things.
  struct Again {
    int32_t word, page;
  };
  __device__ __forceinline__ Again read_again() const {
    const Work& work = ctx.control->work[0];
    return {ctx.lane < kGuessWords ? read(work.request) : 0, first_page_of(p, work, ctx.lane)};
  }
  __device__ __forceinline__ bool is_right(const Again& now, int32_t page) const {
    return __all_sync(ptx::kWholeWarp,
                      now.page == page && (ctx.lane >= kGuessWords || now.word == ctx.control->guess[ctx.lane]));
  }
};

}  // namespace mla::cuda::sm90
