// Fills a schedule buffer on the host, in O(batch + parts). The CUDA schedule kernel gives the same bytes.
#pragma once

#include "schedule/view.h"

namespace mla::schedule {

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

  int32_t request = 0;  // positions only grow, so the search never goes back
  for (int32_t p = 0; p < c.parts; ++p) {
    const int64_t position = part_position(p, c.parts, cost);
    while (request < batch && view.cost_prefix()[request + 1] <= position) ++request;
    view.boundary()[p] = request >= batch ? Boundary{batch, 0, 0, 0}
                                          : boundary_in_request(c, request, position - view.cost_prefix()[request],
                                                                view.len()[request], c.items(view.q_tokens(request)));
  }
  view.boundary()[c.parts] = {batch, 0, 0, 0};
  header->batch = batch;
  header->parts = c.parts;
  header->plan_key = c.plan_key;
  header->total_cost = cost;
  header->q_tokens = view.q_begin()[batch];
  header->magic = kMagic;
}

}  // namespace mla::schedule
