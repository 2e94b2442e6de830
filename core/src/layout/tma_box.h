// A tensor as the copy engine sees it, and the box it moves with one instruction: plain numbers, turned into a CUtensorMap elsewhere.
//
// Every tile in shared memory is made of column groups: 64 two-byte columns, so rows of 128 bytes, 32 or 64 rows. A tensor is seen as
//   (column in its group, row, column group, outer, outermost)
// where row is what lies along a tile's rows: tokens of a page, or heads of a query token.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace mla::layout {

inline constexpr int kGroupColumns = 64;
inline constexpr int kSlotRows = 32;
inline constexpr int kGroupBytes = kSlotRows * 128;  // one column group of 32 rows
inline constexpr int kTmaDims = 5;

struct TmaBox {
  const void* base;
  int64_t size[kTmaDims];              // elements
  int64_t stride_bytes[kTmaDims - 1];  // of dimension 1 .. 4; dimension 0 is dense
  int32_t box[kTmaDims];               // elements moved at once
};

MLA_HD constexpr int gcd(int a, int b) { return b == 0 ? a : gcd(b, a % b); }

// A block of `most` rows is filled by runs: the most rows that one box can always take without leaving a page (or a query token), whatever the
// row it starts at.
MLA_HD constexpr int run_rows(int64_t rows_together, int most = kSlotRows) {
  return gcd(static_cast<int>(rows_together % most), most);
}
static_assert(run_rows(64) == 32 && run_rows(256) == 32 && run_rows(16) == 16 && run_rows(48) == 16 &&
              run_rows(1) == 1 && run_rows(63) == 1);

struct TmaSource {
  const void* base;
  int64_t rows, row_stride;  // strides in elements of two bytes
  int32_t groups;
  int64_t outer, outer_stride;
  int64_t outermost, outermost_stride;
  int32_t run;         // run_rows()
  int32_t box_groups;  // column groups that one box takes
};

MLA_HD constexpr TmaBox make_box(const TmaSource& s) {
  constexpr int64_t kElementBytes = 2;
  constexpr int64_t kGroupStride = kGroupColumns * kElementBytes;
  // The stride of a dimension of one element is never used, but has to be legal.
  return {s.base,
          {kGroupColumns, s.rows, s.groups, s.outer, s.outermost},
          {s.rows > 1 ? s.row_stride * kElementBytes : kGroupStride, kGroupStride,
           s.outer > 1 ? s.outer_stride * kElementBytes : kGroupStride,
           s.outermost > 1 ? s.outermost_stride * kElementBytes : kGroupStride},
          {kGroupColumns, s.run, s.box_groups, 1, 1}};
}

}  // namespace mla::layout
