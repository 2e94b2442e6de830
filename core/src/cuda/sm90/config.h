// What distinguishes the compiled variants of the dense decode kernel, and what follows from it.
#pragma once

#include "layout/swizzle.h"
#include "layout/tma_box.h"
#include "problem.h"

namespace mla::cuda::sm90 {

inline constexpr int kTileRows = 64;  // rows of a CTA
inline constexpr int kMaxTiles = 8;   // row tiles (CTAs) that walk the same keys at the same time
inline constexpr int kValueDim = 512;
inline constexpr int kHalfColumns = 256;  // output columns of one output warpgroup
inline constexpr int kQuarterColumns =
    128;  // of one accumulator: m64n256 needs 154 registers at launch, and 512 threads have 128 (C7602)
inline constexpr int kLatentGroups = 8;  // column groups of the value part
inline constexpr int kThreads = 512;     // four warpgroups
inline constexpr int kMathThreads = 128;
inline constexpr int kLoaderWarp = 12, kPlannerWarp = 13, kPrefetcherWarp = 14;

inline constexpr int kNarrowBlock = layout::kSlotRows, kWideBlock = 64;

inline constexpr int kScheduleThreads = 256;
inline constexpr int kCombineWarps = 8;
inline constexpr int kCombineThreads = 32 * kCombineWarps;
inline constexpr int kCombineTiles = 4;    // of a warp, where items are cut into few pieces
inline constexpr int kMergeThreads = 128;  // of the kernel behind mla_merge

struct DecodeConfig {
  DType dtype;
  int head_dim;
  bool shares_pages;  // the two CTAs of a cluster walk the same keys: each loads half of them for both
  int block_tokens;   // keys of one Q K^T, and unit of the schedule: kNarrowBlock, or kWideBlock where pages are shared

  MLA_HD constexpr bool is_wide() const { return block_tokens == kWideBlock; }
  MLA_HD constexpr int groups() const { return head_dim / layout::kGroupColumns; }
  MLA_HD constexpr bool has_rope() const { return groups() > kLatentGroups; }
  // A narrow block takes one slot of the ring. A wide one takes four of two column groups each, so that what P V has read makes room before all of
  // the block has been, and the rope, which only Q K^T reads, has a place of its own.
  MLA_HD constexpr int slot_groups() const { return is_wide() ? 2 : groups(); }
  MLA_HD constexpr int slots_of_block() const { return is_wide() ? kLatentGroups / slot_groups() : 1; }
  MLA_HD constexpr int group_bytes() const { return block_tokens * static_cast<int>(layout::kSwizzleRowBytes); }
  MLA_HD constexpr int slot_bytes() const { return slot_groups() * group_bytes(); }
  // Column groups of keys that come in one box.
  MLA_HD constexpr int box_groups() const { return is_wide() ? 1 : shares_pages ? kLatentGroups / 2 : kLatentGroups; }
  // All shared memory that is left after the rest. Narrow: five slots of 36,864 bytes or six of 32,768; wide: eleven or twelve of 16,384.
  MLA_HD constexpr int ring_slots() const { return is_wide() ? (has_rope() ? 11 : 12) : has_rope() ? 5 : 6; }
  // What is waited for together: narrow, a slot; wide, the first slots of a block, which are there early, and its rope and last slot, which are not. More
  // than blocks have room, so that none is under way again before all have seen it.
  MLA_HD constexpr int loads() const { return is_wide() ? 8 : ring_slots(); }
  MLA_HD constexpr int loads_of_block() const { return is_wide() ? 2 : 1; }
  MLA_HD constexpr int early_slots() const { return slots_of_block() - 1; }
  // Whether a block's last slot waits for room longer than the others: the ring holds less than three blocks.
  MLA_HD constexpr bool has_prefetcher() const { return is_wide() && ring_slots() < 3 * slots_of_block(); }
  MLA_HD constexpr int rope_places() const { return is_wide() && has_rope() ? 1 : 0; }
  // Weights of 64 keys: a wide block's, or those of two narrow ones.
  MLA_HD constexpr int p_tiles() const { return 2; }
  MLA_HD constexpr int p_stages() const { return p_tiles() * kWideBlock / block_tokens; }
  // Column groups of Q that come in one box.
  MLA_HD constexpr int q_box_groups() const { return is_wide() ? 1 : kLatentGroups; }
  // Of the 16-column steps of Q the score warpgroup keeps the first in registers (4 each), and from the first column group on that is not
  // there whole all groups in shared memory.
  MLA_HD constexpr int q_steps() const { return head_dim / 16; }
  MLA_HD constexpr int q_register_steps() const { return is_wide() ? 24 : 28; }
  MLA_HD constexpr int q_first_shared_group() const { return q_register_steps() / 4; }
  MLA_HD constexpr int q_shared_groups() const { return groups() - q_first_shared_group(); }
  // The column group at place i of Q K^T. Of a wide block the rope comes before the last slot, which is loaded last.
  MLA_HD constexpr int group_at(int i) const {
    constexpr int kLastSlot = kLatentGroups - 2;
    return !is_wide() || !has_rope() || i < kLastSlot ? i : i == kLastSlot ? kLatentGroups : i - 1;
  }
  // So many steps of a block's Q K^T are issued before the last block's P is handed over. Measured, see README.md.
  MLA_HD constexpr int hand_over_step() const { return is_wide() ? q_steps() - 9 : q_steps() / 2; }
};

// setmaxnreg of each role; together 512 x 128. An output warpgroup holds 128 accumulators: under 160 ptxas gives up (C7507).
inline constexpr int kScoreRegisters = 160;
inline constexpr int kOutputRegisters = 160;
inline constexpr int kLoaderRegisters = 32;
static_assert(kScoreRegisters + 2 * kOutputRegisters + kLoaderRegisters == 512);

}  // namespace mla::cuda::sm90
