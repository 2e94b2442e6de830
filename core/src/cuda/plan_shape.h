// What a plan on the device looks like: pure numbers from the problem and the number of multiprocessors.
#pragma once

#include <algorithm>

#include "cuda/sm90/config.h"
#include "layout/partial.h"
#include "problem.h"
#include "schedule/partition.h"
#include "schedule/slots.h"

namespace mla::cuda {

struct PlanShape {
  schedule::Config config;
  int32_t tiles;      // CTAs of 64 rows that walk an item's keys together
  int32_t cluster;    // of them, so many form a cluster
  bool shares_pages;  // see DecodeConfig
  layout::PartialLayout partial;
  int32_t items_per_request;  // the most

  size_t partial_out_bytes() const { return sizeof(float) * static_cast<size_t>(config.slots * partial.out_floats()); }
  size_t partial_state_bytes() const {
    return sizeof(layout::PartialState) * static_cast<size_t>(config.slots * partial.rows());
  }
};

// Measured, see sm90/README.md.
inline constexpr int32_t kOverheadTokens = 128, kCutTokens = 896;

// Whether blocks of 64 keys are the faster ones. They take less power, but a piece begins later: so where there is a request for each part, and
// requests are long in a full cache, the less so the more rows there are to a key. Not where results must not depend on the batch (I7).
inline bool is_wide(const Problem& p, const schedule::Config& c, int32_t tiles) {
  const int64_t least_mean_len = 8192 / tiles;
  return p.page_size % sm90::kWideBlock == 0 && p.heads_per_kv_head() % layout::kSlotRows == 0 &&
         p.split_policy != SplitPolicy::kFixedChunk && p.max_tokens / p.max_batch >= least_mean_len &&
         p.max_batch * c.items(p.q_len) >= c.parts;
}

inline PlanShape plan_shape(const Problem& p, int multiprocessors) {
  PlanShape shape{};
  const int64_t max_rows = p.rows(p.q_len);
  // Rather fewer tiles than a last item that is not full: only full ones share pages.
  const int64_t most_tiles =
      max_rows % (sm90::kMaxTiles * sm90::kTileRows) == 0 ? sm90::kMaxTiles : sm90::kMaxTiles / 2;
  shape.tiles = static_cast<int32_t>(std::min(ceil_div(max_rows, int64_t{sm90::kTileRows}), most_tiles));
  shape.cluster = shape.tiles % 2 == 0 ? 2 : 1;  // pairs read the same pages at the same time
  schedule::Config& c = shape.config;
  c.item_rows = shape.tiles * sm90::kTileRows;
  c.heads_per_kv_head = p.heads_per_kv_head();
  c.kv_heads = p.kv_heads;
  c.parts = std::clamp(multiprocessors / shape.tiles, 1, sm90::kCombineThreads);  // combine has a thread for each
  c.splits_evenly = true;
  // Both CTAs of a pair have to walk the same slots: no tile may be without rows, or have so few that Q takes one slot.
  shape.shares_pages = shape.cluster == 2 && !p.is_ragged && max_rows % c.item_rows == 0;
  c.block_tokens = shape.shares_pages && is_wide(p, c, shape.tiles) ? sm90::kWideBlock : sm90::kNarrowBlock;
  c.overhead_blocks = kOverheadTokens / c.block_tokens;
  c.cut_blocks = kCutTokens / c.block_tokens;
  c.chunk_blocks = p.split_policy == SplitPolicy::kFixedChunk ? p.chunk_tokens / c.block_tokens : 0;
  shape.partial.strips =
      static_cast<int32_t>(ceil_div(std::min<int64_t>(c.item_rows, max_rows), layout::PartialLayout::kStripRows));
  shape.items_per_request = static_cast<int32_t>(c.items(p.q_len));
  c.slots = schedule::slots_needed(c, p);
  return shape;
}

}  // namespace mla::cuda
