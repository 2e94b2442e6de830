// Balanced schedules that cut every item into equal pieces, each a part of its own.
//
// A part that ends one item and begins the next pays twice what a piece costs beside its keys: a start, and a partial result. With few long
// items in a batch most parts lie inside one, so it is cheaper to leave a part idle than to share it. An item gets the fewest pieces that are
// none of them longer than the even share of whole.h; where that takes more parts than there are, the line of partition.h is cut instead.
#pragma once

#include "schedule/partition.h"

namespace mla::schedule {

// Of an item with n blocks. n = 0: a part visits it all the same.
template <class T>
MLA_HD constexpr T split_pieces(T n, T share) {
  return n == 0 ? T(1) : (n + share - 1) / share;
}

// Where piece `index`, counted over a request's items, begins. pieces: of each.
MLA_HD constexpr Boundary split_boundary(int32_t request, int32_t index, int32_t n, int32_t pieces) {
  const int32_t item = index / pieces;
  return {request, item,
          static_cast<int32_t>(static_cast<uint64_t>(index - item * pieces) * static_cast<uint32_t>(n) /
                               static_cast<uint32_t>(pieces)),
          0};
}

}  // namespace mla::schedule
