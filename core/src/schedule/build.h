// Fills a schedule buffer on the host, in O(batch + parts). The CUDA schedule kernel gives the same bytes.
#pragma once

#include "schedule/even_split.h"
#include "schedule/view.h"
#include "schedule/whole.h"

namespace mla::schedule {

// Four ways to set where parts begin, from the costs. Positions only grow, so no search goes back.

// Cuts requests where equal shares end, at the granularity of cells.
inline void cut(const Config& c, const View& view, int32_t batch) {
  const int64_t* prefix = view.cost_prefix();
  int32_t request = 0;
  for (int32_t p = 0; p < c.parts; ++p) {
    const int64_t position = part_position(p, c.parts, prefix[batch]);
    while (request < batch && prefix[request + 1] <= position) ++request;
    view.boundary()[p] = request >= batch ? Boundary{batch, 0, 0, 0}
                                          : boundary_in_request(c, request, position - prefix[request],
                                                                view.len()[request], c.items(view.q_tokens(request)));
  }
}

// even_split.h. False: it takes too many parts.
inline bool split_evenly(const Config& c, const View& view, int32_t batch, int64_t share) {
  int64_t begin = 0;  // of a request, in parts
  for (int32_t r = 0; r < batch; ++r) {
    const int64_t n = c.blocks(view.len()[r]), pieces = split_pieces(n, share);
    const int64_t end = begin + c.items(view.q_tokens(r)) * pieces;
    if (end > c.parts) return false;
    for (int64_t p = begin; p < end; ++p)
      view.boundary()[p] =
          split_boundary(r, static_cast<int32_t>(p - begin), static_cast<int32_t>(n), static_cast<int32_t>(pieces));
    begin = end;
  }
  for (; begin < c.parts; ++begin) view.boundary()[begin] = {batch, 0, 0, 0};
  return true;
}

// even of whole.h. False: it does not fit.
inline bool keep_whole_even(const Config& c, const View& view, int32_t batch, int64_t limit) {
  const int64_t* prefix = view.cost_prefix();
  int32_t request = 0, before = 0;
  for (int32_t p = 0; p < c.parts; ++p) {
    const int64_t position = part_position(p, c.parts, prefix[batch]);
    while (request < batch && prefix[request + 1] <= position) ++request;
    int32_t begin = request;
    if (batch <= c.parts)
      begin = p < batch ? p : batch;
    else if (request < batch)
      begin = nearest_edge(request, prefix[request], prefix[request + 1], position);
    if (p > 0 && prefix[begin] - prefix[before] > limit) return false;
    view.boundary()[p] = {begin, 0, 0, 0};
    before = begin;
  }
  return prefix[batch] - prefix[before] <= limit;
}

// packed of whole.h. False: it does not fit.
inline bool keep_whole_packed(const Config& c, const View& view, int32_t batch, int64_t limit) {
  const int64_t* prefix = view.cost_prefix();
  if (batch > kMostPacked) return false;
  int32_t request = 0;
  for (int32_t p = 0; p < c.parts; ++p) {
    view.boundary()[p] = {request, 0, 0, 0};
    const int64_t most = prefix[request] + limit;
    while (request < batch && prefix[request + 1] <= most) ++request;
  }
  return request == batch;
}

inline void set_boundaries(const Config& c, const View& view, int32_t batch) {
  const int64_t total = view.cost_prefix()[batch], limit = whole_limit(c, total);
  const bool is_whole =
      c.chunk_blocks == 0 && (keep_whole_even(c, view, batch, limit) || keep_whole_packed(c, view, batch, limit));
  const bool may_split = c.chunk_blocks == 0 && c.splits_evenly && batch <= c.parts;
  if (!is_whole && !(may_split && split_evenly(c, view, batch, even_share(c, total)))) cut(c, view, batch);
  view.boundary()[c.parts] = {batch, 0, 0, 0};
}

// Reads len_tokens(r) and q_begin(r) (both already valid) for r in [0, batch) and q_begin(batch).
template <class LenFn, class QBeginFn>
void build(const Config& c, const View& view, int32_t batch, LenFn&& len_tokens, QBeginFn&& q_begin) {
  Header* header = view.header();
  header->magic = 0;
  int64_t cost = 0;
  int64_t slots = 0;
  view.q_begin()[0] = q_begin(0);
  for (int32_t r = 0; r < batch; ++r) {
    const int32_t len = len_tokens(r);
    view.len()[r] = len;
    view.q_begin()[r + 1] = q_begin(r + 1);
    view.cost_prefix()[r] = cost;
    view.slot_prefix()[r] = slots;
    const int64_t q_tokens = view.q_tokens(r);
    cost += c.request_cost(len, q_tokens);
    slots += c.request_slots(len, q_tokens);
  }
  view.cost_prefix()[batch] = cost;
  view.slot_prefix()[batch] = slots;

  set_boundaries(c, view, batch);
  header->batch = batch;
  header->parts = c.parts;
  header->plan_key = c.plan_key;
  header->total_cost = cost;
  header->q_tokens = view.q_begin()[batch];
  header->magic = kMagic;
}

}  // namespace mla::schedule
