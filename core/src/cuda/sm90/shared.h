// Shared memory of the dense decode kernel: the tiles' places, and the small things behind them.
#pragma once

#include "cuda/sm90/config.h"
#include "cuda/sm90/protocol.h"
#include "layout/divider.h"
#include "layout/smem_plan.h"
#include "schedule/partition.h"

namespace mla::cuda::sm90 {

// One piece of the schedule as this CTA's row tile sees it, written by the planner for all roles.
struct Work {
  int32_t request;  // < 0: no more
  int32_t begin_block, end_block;
  int32_t len_tokens;
  int32_t q_tokens, q_begin;
  int32_t first_row;  // of the tile, among the request's rows of this kv head
  int32_t kv_head;
  int32_t slot;  // of the partial result; or one of the two below
};

// The head of a row of a request: rows are query tokens x heads of the kv head.
MLA_HD constexpr int32_t head_of_row(const layout::Divider& heads, const Work& work, int32_t row, int32_t token) {
  return work.kv_head * static_cast<int32_t>(heads.divisor) + heads.remainder(row, token);
}

// Slots of the ring that Q takes. Narrow: the second holds rows 32 to 63. Wide: two column groups each, of those that go to registers.
template <DecodeConfig kCfg>
MLA_HD constexpr int q_slots(int32_t rows_of_tile) {
  if constexpr (kCfg.is_wide()) return kCfg.q_first_shared_group() / kCfg.slot_groups();
  return rows_of_tile > layout::kSlotRows ? 2 : 1;
}

inline constexpr int32_t kWholeItem = -1;  // the result is final
inline constexpr int32_t kDropped = -2;  // no room in scratch (more tokens than the plan's maximum): combine writes NaN

// What a guess of the first piece was made from, see roles/guess.cuh.
enum GuessWord { kMagicWord = 8, kLenWord, kQBeginWord, kSlotWord = kQBeginWord + 2, kGuessWords = kSlotWord + 2 };
static_assert(kMagicWord == 2 * sizeof(schedule::Boundary) / sizeof(int32_t));

// What goes with a block's P.
struct Rescale {
  float factor[kTileRows];          // what O is multiplied with before this block's P V
  uint32_t is_needed[kScoreWarps];  // per 16 rows: whether any of them is
};

struct Control {
  uint64_t barriers[kBarrierCount];
  Work work[kWorkStages];
  alignas(schedule::Boundary) int32_t guess[kGuessWords];
  uint32_t is_guess_right;        // work[0] is the loader's
  schedule::Boundary part_end;    // the planner's
  float scale[kTileRows];         // row_scale: what O is multiplied with at the end
  int64_t out_row[2][kTileRows];  // each output warpgroup's: where the rows of a whole item begin in out
  alignas(layout::kSwizzleRowBytes) uint32_t zeros[layout::kSwizzleRowBytes / sizeof(uint32_t)];
  Rescale rescale[kMaxPStages];  // last: a variant with fewer stages needs less
};

template <DecodeConfig kCfg>
MLA_HD constexpr layout::SmemPlan smem_plan() {
  constexpr layout::SmemPlan kPlan{static_cast<uint32_t>(kCfg.ring_slots()),
                                   static_cast<uint32_t>(kCfg.slot_bytes()),
                                   static_cast<uint32_t>(kCfg.q_shared_groups() * kTileRows) * layout::kSwizzleRowBytes,
                                   static_cast<uint32_t>(kCfg.p_tiles()),
                                   kTileRows * layout::kSwizzleRowBytes,
                                   static_cast<uint32_t>(kCfg.rope_places() * kCfg.group_bytes()),
                                   sizeof(Control) - (kMaxPStages - kCfg.p_stages()) * sizeof(Rescale)};
  static_assert(kPlan.is_valid());
  return kPlan;
}

// What every role knows: places in shared memory as addresses, and who it is.
struct RoleContext {
  uint32_t shared;    // address of the first tile
  uint32_t barriers;  // address of the first barrier
  Control* control;
  int warp;  // within the warpgroup
  int lane;
  int thread;  // within the warpgroup
};

}  // namespace mla::cuda::sm90
