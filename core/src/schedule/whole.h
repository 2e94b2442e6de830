// Balanced schedules that cut no request: every part begins at the edge of a request, where that keeps the parts even enough.
//
// A cut costs what the line of partition.h does not show: another piece to start, partial results, and joining them. So requests stay
// whole if no part costs more than whole_limit then. Two ways are tried, the first that fits is taken:
//   even    No more requests than parts: one each for the first parts (on a device the last ones start last). Else part p begins at the edge nearest to its position on the line: as even
//           as edges allow, where a part has many requests.
//   packed  Each part takes requests in order while they fit under the limit: finds a way if there is one. Only up to kMostPacked
//           requests, so that a kernel holds them in shared memory; of more, a part has several, and most are whole in any case.
#pragma once

#include "schedule/partition.h"

namespace mla::schedule {

inline constexpr int32_t kMostPacked = 512;

// What a part may cost where no request is cut: its even share, the overhead that bounds parts in any case, and what the cuts would cost
// it. They cost short parts less. T: a type that holds total + parts.
template <class T>
MLA_HD constexpr T even_share(const Config& c, T total) {
  return (total + static_cast<T>(c.parts) - 1) / static_cast<T>(c.parts);
}
template <class T>
MLA_HD constexpr T whole_limit(const Config& c, T total) {
  const T share = even_share(c, total);
  const T cuts = share / 6;
  return share + static_cast<T>(c.overhead_blocks) +
         (cuts < static_cast<T>(c.cut_blocks) ? cuts : static_cast<T>(c.cut_blocks));
}

// even: where part p begins, with more requests than parts. The position lies in request r, on [begin, end).
MLA_HD constexpr int32_t nearest_edge(int32_t r, int64_t begin, int64_t end, int64_t position) {
  return end - position < position - begin ? r + 1 : r;
}

}  // namespace mla::schedule
