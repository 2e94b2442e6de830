// The barriers of the dense decode kernel as data: the kernel initialises them from this table, the tests play them on the host.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace mla::cuda::sm90 {

inline constexpr int kOutputWarps = 8;  // of both output warpgroups
inline constexpr int kScoreWarps = 4;
inline constexpr int kScaleWriters = 8 * kScoreWarps;  // one thread of four holds a row's sum
inline constexpr int kWorkStages = 4;
inline constexpr int kPStages = 4;
inline constexpr int kMaxRingSlots = 6;

enum class Barrier : uint32_t {
  kSlotFull,
  kSlotEmpty,
  kPFull,
  kPEmpty,
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
  int stages;
  int arrivals;       // of one phase
  bool starts_ready;  // the first wait passes: the buffer is free at the start
  const char* arrives;
  const char* waits;
};

// Slot: 32 keys, or 32 rows of Q. P: weights of one 32-key slot. Scale: what each row of the result is multiplied with. Work: one piece; the
// first may be guessed by the loader (roles/loader.cuh).
inline constexpr BarrierSpec kBarriers[] = {
    {Barrier::kSlotFull, "slot_full", kMaxRingSlots, 1, false, "loader (with the slot's bytes)",
     "scores, outputs, loader"},
    {Barrier::kSlotEmpty, "slot_empty", kMaxRingSlots, kOutputWarps, true,
     "a key slot: each output warp; a Q slot: each score warp twice; where pages are shared, of both CTAs", "loader"},
    {Barrier::kPFull, "p_full", kPStages, kScoreWarps, false, "each score warp", "outputs"},
    {Barrier::kPEmpty, "p_empty", kPStages, kOutputWarps, true, "each output warp", "scores"},
    {Barrier::kScaleFull, "scale_full", 1, kScaleWriters, false, "each score thread that wrote scales", "outputs"},
    {Barrier::kScaleEmpty, "scale_empty", 1, kOutputWarps, true, "each output warp", "scores"},
    {Barrier::kWorkFull, "work_full", kWorkStages, 1, false, "planner; of a right guess: loader",
     "loader, scores, outputs"},
    {Barrier::kWorkEmpty, "work_empty", kWorkStages, 1 + kScoreWarps + kOutputWarps, true,
     "loader, each score warp, each output warp", "planner"},
    {Barrier::kGuessJudged, "guess_judged", 1, 1, false, "loader", "planner"},
};

// Where two CTAs share pages both load parts of a slot into both, so a loader waits until both have let go of it.
MLA_HD constexpr int arrivals_of(BarrierSpec spec, bool shares_pages) {
  return spec.id == Barrier::kSlotEmpty && shares_pages ? 2 * spec.arrivals : spec.arrivals;
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
