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

inline PlanShape plan_shape(const Problem& p, int multiprocessors) {
  PlanShape shape{};
  const int64_t max_rows = p.rows(p.q_len);
  shape.tiles = static_cast<int32_t>(std::min<int64_t>(ceil_div(max_rows, sm90::kTileRows), sm90::kMaxTiles));
  shape.cluster = shape.tiles % 2 == 0 ? 2 : 1;  // pairs read the same pages at the same time
  schedule::Config& c = shape.config;
  c.block_tokens = sm90::kBlockTokens;
  c.item_rows = shape.tiles * sm90::kTileRows;
  c.heads_per_kv_head = p.heads_per_kv_head();
  c.kv_heads = p.kv_heads;
  c.parts = std::clamp(multiprocessors / shape.tiles, 1, sm90::kCombineThreads);  // combine has a thread for each
  // Measured, see sm90/README.md.
  c.overhead_blocks = 4;
  c.cut_blocks = 28;
  c.splits_evenly = true;
  c.chunk_blocks = p.split_policy == SplitPolicy::kFixedChunk ? p.chunk_tokens / sm90::kBlockTokens : 0;
  // Both CTAs of a pair have to walk the same slots: no tile may be without rows, or have so few that Q takes one slot.
  shape.shares_pages = shape.cluster == 2 && !p.is_ragged && max_rows % c.item_rows == 0;
  shape.partial.strips =
      static_cast<int32_t>(ceil_div(std::min<int64_t>(c.item_rows, max_rows), layout::PartialLayout::kStripRows));
  shape.items_per_request = static_cast<int32_t>(c.items(p.q_len));
  c.slots = schedule::slots_needed(c, p);
  return shape;
}

}  // namespace mla::cuda
