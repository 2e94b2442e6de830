// What distinguishes the compiled variants of the dense decode kernel, and what follows from it.
#pragma once

#include "layout/tma_box.h"
#include "problem.h"

namespace mla::cuda::sm90 {

inline constexpr int kBlockTokens = layout::kSlotRows;  // unit of the schedule
inline constexpr int kTileRows = 64;                    // rows of a CTA
inline constexpr int kMaxTiles = 4;                     // row tiles (CTAs) that walk the same keys at the same time
inline constexpr int kValueDim = 512;
inline constexpr int kHalfColumns = 256;  // output columns of one output warpgroup
inline constexpr int kQuarterColumns =
    128;  // of one accumulator: m64n256 needs 154 registers at launch, and 512 threads have 128 (C7602)
inline constexpr int kLatentGroups = 8;  // column groups of the value part
inline constexpr int kThreads = 512;     // four warpgroups
inline constexpr int kMathThreads = 128;
inline constexpr int kLoaderWarp = 12;

inline constexpr int kScheduleThreads = 256;
inline constexpr int kCombineWarps = 8;
inline constexpr int kCombineThreads = 32 * kCombineWarps;
inline constexpr int kCombineTiles = 4;    // of a warp, where items are cut into few pieces
inline constexpr int kMergeThreads = 128;  // of the kernel behind mla_merge

struct DecodeConfig {
  DType dtype;
  int head_dim;
  bool shares_pages;  // the two CTAs of a cluster walk the same slots of keys: each loads half of a slot for both

  // Column groups of keys that come in one box.
  MLA_HD constexpr int box_groups() const { return shares_pages ? kLatentGroups / 2 : kLatentGroups; }
  MLA_HD constexpr int groups() const { return head_dim / layout::kGroupColumns; }
  MLA_HD constexpr bool has_rope() const { return groups() > kLatentGroups; }
  MLA_HD constexpr int slot_bytes() const { return groups() * layout::kGroupBytes; }
  // All shared memory that is left after Q and P: five slots of 36,864 bytes or six of 32,768.
  MLA_HD constexpr int ring_slots() const { return has_rope() ? 5 : 6; }
  // Of the 16-column steps of Q the score warpgroup keeps the first in registers (4 each), and from the first column group on that is not
  // there whole all groups in shared memory.
  MLA_HD constexpr int q_steps() const { return head_dim / 16; }
  MLA_HD constexpr int q_register_steps() const { return 28; }
  // So many steps of a slot's Q K^T are issued before the last slot's P is handed over. Measured, see README.md.
  MLA_HD constexpr int hand_over_step() const { return q_steps() / 2; }
  MLA_HD constexpr int q_first_shared_group() const { return q_register_steps() / 4; }
  MLA_HD constexpr int q_shared_groups() const { return groups() - q_first_shared_group(); }
};

// setmaxnreg of each role; together 512 x 128. An output warpgroup holds 128 accumulators: under 160 ptxas gives up (C7507).
inline constexpr int kScoreRegisters = 160;
inline constexpr int kOutputRegisters = 160;
inline constexpr int kLoaderRegisters = 32;
static_assert(kScoreRegisters + 2 * kOutputRegisters + kLoaderRegisters == 512);

}  // namespace mla::cuda::sm90
