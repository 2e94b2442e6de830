// The barriers of the dense decode kernel as data: the kernel initialises them from this table, the tests play them on the host.
#pragma once

#include <cstdint>

#include "cuda/sm90/config.h"
#include "host_device.h"

namespace mla::cuda::sm90 {

inline constexpr int kOutputWarps = 8;  // of both output warpgroups
inline constexpr int kScoreWarps = 4;
inline constexpr int kScaleWriters = 8 * kScoreWarps;  // one thread of four holds a row's sum
inline constexpr int kWorkStages = 4;
inline constexpr int kMaxPStages = 4;
inline constexpr int kMaxRingSlots = 12;

enum class Barrier : uint32_t {
  kSlotFull,
  kSlotEmpty,
  kRopeEmpty,
  kQFull,
  kQEmpty,
  kPFull,
  kPEmpty,
  kTurn,
  kScaleFull,
  kScaleEmpty,
  kWorkFull,
  kWorkEmpty,
  kGuessJudged,
  kCount
};

struct BarrierSpec {
  Barrier id;
  const char* name;
  int stages;         // the most, see stages_of
  int arrivals;       // of one phase, see arrivals_of
  bool starts_ready;  // the first wait passes: the buffer is free at the start
  const char* arrives;
  const char* waits;
};

// Slot: 32 keys or 32 rows of Q. Of wide blocks two column groups of 64 keys or 64 rows of Q; their slot_full is of a load: of the first three
// slots of a block, of its rope and its last slot, or of the slots of Q. Rope: of a wide block. Q: what Q K^T of wide blocks reads of it in
// shared memory. P: weights of one block. Turn: of the output warpgroups at a wide block. Scale: what each row of the result is multiplied
// with. Work: one piece; the first may be guessed by the loader (roles/loader.cuh).
inline constexpr BarrierSpec kBarriers[] = {
    {Barrier::kSlotFull, "slot_full", kMaxRingSlots, 1, false, "loader (with the bytes)", "scores, outputs, loader"},
    {Barrier::kSlotEmpty, "slot_empty", kMaxRingSlots, kOutputWarps, true,
     "a key slot: each output warp that reads it; a Q slot: score warps, as often; where pages are shared, of both "
     "CTAs",
     "loader"},
    {Barrier::kRopeEmpty, "rope_empty", 1, kScoreWarps, true, "each score warp of both CTAs", "loader"},
    {Barrier::kQFull, "q_full", 1, 1, false, "loader (with the bytes)", "scores"},
    {Barrier::kQEmpty, "q_empty", 1, kScoreWarps, true, "each score warp", "loader"},
    {Barrier::kPFull, "p_full", kMaxPStages, kScoreWarps, false, "each score warp", "outputs"},
    {Barrier::kPEmpty, "p_empty", kMaxPStages, kOutputWarps, true, "each output warp", "scores"},
    {Barrier::kTurn, "turn", kMaxPStages, kOutputWarps / 2, false, "each warp of the first output warpgroup",
     "the second output warpgroup; prefetcher, not for long"},
    {Barrier::kScaleFull, "scale_full", 1, kScaleWriters, false, "each score thread that wrote scales", "outputs"},
    {Barrier::kScaleEmpty, "scale_empty", 1, kOutputWarps, true, "each output warp", "scores"},
    {Barrier::kWorkFull, "work_full", kWorkStages, 1, false, "planner; of a right guess: loader",
     "loader, scores, outputs, prefetcher"},
    {Barrier::kWorkEmpty, "work_empty", kWorkStages, 1 + kScoreWarps + kOutputWarps, true,
     "loader, each score warp, each output warp; prefetcher, where there is one", "planner"},
    {Barrier::kGuessJudged, "guess_judged", 1, 1, false, "loader", "planner"},
};

// How many a variant has; 0: none.
MLA_HD constexpr int stages_of(const BarrierSpec& spec, const DecodeConfig& config) {
  switch (spec.id) {
    case Barrier::kSlotFull:
      return config.loads();
    case Barrier::kSlotEmpty:
      return config.ring_slots();
    case Barrier::kRopeEmpty:
      return config.rope_places();
    case Barrier::kPFull:
    case Barrier::kPEmpty:
      return config.p_stages();
    case Barrier::kTurn:
      return config.is_wide() ? config.p_stages() : 0;
    case Barrier::kQFull:
    case Barrier::kQEmpty:
      return config.is_wide() ? 1 : 0;
    default:
      return spec.stages;
  }
}

// Where two CTAs share pages both load parts of them into both, so a loader waits until both have let go of a place. A slot of a wide block is read by
// one of the two output warpgroups.
MLA_HD constexpr int arrivals_of(const BarrierSpec& spec, const DecodeConfig& config) {
  if (spec.id == Barrier::kWorkEmpty && config.has_prefetcher()) return spec.arrivals + 1;
  const bool is_of_keys = spec.id == Barrier::kSlotEmpty || spec.id == Barrier::kRopeEmpty;
  const int readers = spec.id == Barrier::kSlotEmpty && config.is_wide() ? spec.arrivals / 2 : spec.arrivals;
  return is_of_keys && config.shares_pages ? 2 * readers : readers;
}

consteval int first_barrier(Barrier id) {
  int index = 0;
  for (uint32_t i = 0; i < static_cast<uint32_t>(id); ++i) index += kBarriers[i].stages;
  return index;
}
inline constexpr int kBarrierCount = first_barrier(Barrier::kCount);

constexpr bool barriers_are_in_order() {
  for (uint32_t i = 0; i < static_cast<uint32_t>(Barrier::kCount); ++i) {
    if (static_cast<uint32_t>(kBarriers[i].id) != i) return false;
  }
  return true;
}
static_assert(barriers_are_in_order());

// Named barriers: bar.sync ids; 0 is __syncthreads.
enum class NamedBarrier : uint32_t { kScores = 1, kOutputLow = 2, kOutputHigh = 3 };

}  // namespace mla::cuda::sm90
