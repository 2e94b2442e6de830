// Walks the pieces of one part in order. The only place that steps from request to request.
#pragma once

#include "schedule/view.h"

namespace mla::schedule {

// fn(const Piece&, int32_t n): n is the number of key blocks of the piece's request. end: boundary()[part + 1], wherever the caller has
// room for it.
template <class Fn>
MLA_HD void for_each_piece(const Config& c, const ConstView& view, int32_t part, const Boundary& end, Fn&& fn) {
  Boundary at = view.boundary()[part];
  while (is_before(at, end)) {
    // All loads of a request before the first branch: on the device they are one latency then, not three.
    const int32_t q_tokens = view.q_tokens(at.request);
    const int32_t n = c.blocks(view.len()[at.request]);
    const int64_t slot_prefix = view.slot_prefix()[at.request];
    if (!c.has_item(at.item, q_tokens)) {
      at = {at.request + 1, 0, 0, 0};
      continue;
    }
    const Piece piece = piece_at(c, part, at, end, n, slot_prefix);
    fn(piece, n);
    at = after(piece, n);
  }
}

template <class Fn>
MLA_HD void for_each_piece(const Config& c, const ConstView& view, int32_t part, Fn&& fn) {
  const Boundary end = view.boundary()[part + 1];
  for_each_piece(c, view, part, end, fn);
}

}  // namespace mla::schedule
