// How many partial results a call can leave behind at most: what a plan's scratch has to hold.
#pragma once

#include "problem.h"
#include "schedule/partition.h"

namespace mla::schedule {

// balanced: 2 a part (partition.h).
//
// fixed_chunk: a request of len tokens and I items leaves I * ceil(len / T) slots if len > T = chunk_blocks * block_tokens, else none.
// Three bounds on the sum over a call, of which the least is taken:
//   1. No request has more than I_max = items(q_len) items or ceil(max_len / T) chunks:   max_batch * I_max * ceil(max_len / T).
//   2. ceil(len / T) <= floor(len / T) + 1, and the floors sum to at most W = floor(max_tokens / T). A cut request is longer than T,
//      so its floor is at least 1 and at most W requests are cut:                          I_max * (W + min(max_batch, W)).
//   3. A request has at most (rows + item_rows - 1) / item_rows row groups, so a call has at most
//      (all rows + max_batch * (item_rows - 1)) / item_rows, each with at most ceil(max_len / T) chunks.
constexpr int64_t slots_needed(const Config& c, const Problem& p) {
  if (c.chunk_blocks == 0) return 2 * static_cast<int64_t>(c.parts);
  const int64_t chunk_tokens = static_cast<int64_t>(c.chunk_blocks) * c.block_tokens;
  const int64_t chunks_max = c.chunks(p.max_len);
  const int64_t items_max = c.items(p.q_len);
  const int64_t by_batch = p.max_batch * items_max * chunks_max;
  const int64_t whole_chunks = p.max_tokens / chunk_tokens;
  const int64_t by_tokens = items_max * (whole_chunks + (p.max_batch < whole_chunks ? p.max_batch : whole_chunks));
  const int64_t all_row_groups = (p.rows(p.max_q_tokens) + p.max_batch * (c.item_rows - 1)) / c.item_rows;
  const int64_t by_rows = all_row_groups * c.kv_heads * chunks_max;
  const int64_t least = by_batch < by_tokens ? by_batch : by_tokens;
  return least < by_rows ? least : by_rows;
}

}  // namespace mla::schedule
