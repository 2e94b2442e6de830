// The layouts that the kernels rely on: swizzle, fragments, boxes, shared memory, partial results.
#include <doctest/doctest.h>

#include <set>
#include <vector>

#include "layout/divider.h"
#include "layout/fragment.h"
#include "layout/partial.h"
#include "layout/smem_plan.h"
#include "layout/swizzle.h"
#include "layout/tma_box.h"

namespace layout = mla::layout;

TEST_CASE("the swizzle hits each byte of an atom once") {
  std::set<uint32_t> seen;
  for (uint32_t byte = 0; byte < layout::kSwizzleAtomBytes; ++byte) seen.insert(layout::swizzle128(byte));
  CHECK(seen.size() == layout::kSwizzleAtomBytes);
  CHECK(*seen.rbegin() == layout::kSwizzleAtomBytes - 1);
}

TEST_CASE("the same chunk of eight neighbouring rows lies in eight different groups of banks") {
  for (uint32_t chunk = 0; chunk < 8; ++chunk) {
    std::set<uint32_t> groups;
    for (uint32_t row = 0; row < 8; ++row) groups.insert(layout::swizzled_chunk(row, chunk) / layout::kChunkBytes % 8);
    CHECK(groups.size() == 8);
  }
}

TEST_CASE("the fragments of 128 threads cover a tile of 64 rows once") {
  for (const int registers : {16, 64}) {
    const int columns = registers / 4 * 8;
    std::vector<int> hits(static_cast<size_t>(layout::kTileRows * columns));
    for (int thread = 0; thread < 128; ++thread) {
      for (int i = 0; i < registers; ++i) {
        const int row = layout::fragment_row(thread, layout::which_row(i));
        ++hits[static_cast<size_t>(row * columns + layout::fragment_column(thread, i))];
      }
    }
    for (const int h : hits) CHECK(h == 1);
  }
}

TEST_CASE("a run never leaves its page, whatever the row it starts at") {
  for (int rows = 1; rows <= 300; ++rows) {
    const int run = layout::run_rows(rows);
    CHECK(layout::kSlotRows % run == 0);
    for (int first = 0; first < 8 * layout::kSlotRows; first += run) CHECK(first / rows == (first + run - 1) / rows);
  }
}

TEST_CASE("a box has legal strides where a dimension has one element") {
  const layout::TmaBox box = layout::make_box({nullptr, 64, 576, 8, 1, 3, 1, 5, 32, 8});
  CHECK(box.size[0] == 64);
  CHECK(box.size[1] == 64);
  CHECK(box.stride_bytes[0] == 1152);
  CHECK(box.stride_bytes[1] == 128);
  CHECK(box.stride_bytes[2] % 16 == 0);
  CHECK(box.stride_bytes[3] % 16 == 0);
  CHECK(box.box[1] == 32);
  CHECK(box.box[2] == 8);
}

TEST_CASE("tiles of the shared memory plan do not overlap and begin at atoms") {
  constexpr layout::SmemPlan kPlan{5, 36864, 16384, 2, 8192, 8192, 2048};
  static_assert(kPlan.is_valid());
  CHECK(kPlan.slot(4) + kPlan.slot_bytes == kPlan.q());
  CHECK(kPlan.q() + kPlan.q_bytes == kPlan.p(0));
  CHECK(kPlan.p(1) + kPlan.p_bytes == kPlan.rope());
  CHECK(kPlan.rope() + kPlan.rope_bytes == kPlan.control());
  CHECK(kPlan.control() % layout::kSwizzleAtomBytes == 0);
  constexpr layout::SmemPlan kTooLarge{7, 36864, 16384, 2, 8192, 8192, 2048};
  static_assert(!kTooLarge.is_valid());
}

TEST_CASE("partial results fill a slot without holes") {
  const layout::PartialLayout partial{3};
  std::set<int64_t> seen;
  for (int strip = 0; strip < 3; ++strip) {
    for (int tile = 0; tile < layout::PartialLayout::kTiles; ++tile) {
      for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) seen.insert(partial.out_offset(1, strip, tile, lane) + i);
      }
    }
  }
  CHECK(static_cast<int64_t>(seen.size()) == partial.out_floats());
  CHECK(*seen.begin() == partial.out_floats());
  CHECK(*seen.rbegin() == 2 * partial.out_floats() - 1);
  CHECK(partial.row_offset(1, 0) == 48);
}

TEST_CASE("a divider divides as the machine does") {
  const std::vector<int32_t> divisors = {1,
                                         2,
                                         3,
                                         5,
                                         7,
                                         16,
                                         63,
                                         64,
                                         65,
                                         100,
                                         127,
                                         128,
                                         641,
                                         1000,
                                         4096,
                                         65537,
                                         1 << 30,
                                         (1 << 30) + 1,
                                         INT32_MAX - 1,
                                         INT32_MAX};
  for (const int32_t d : divisors) {
    const layout::Divider divider = layout::Divider::by(d);
    CAPTURE(d);
    for (int64_t multiple = 0; multiple <= INT32_MAX; multiple += d * (1 + (INT32_MAX / d) / int64_t{1000})) {
      for (int64_t n = multiple - 1; n <= multiple + 1; ++n) {
        if (n < 0 || n > INT32_MAX) continue;
        const int32_t quotient = divider.quotient(static_cast<int32_t>(n));
        REQUIRE(quotient == n / d);
        REQUIRE(divider.remainder(static_cast<int32_t>(n), quotient) == n % d);
      }
    }
    REQUIRE(divider.quotient(INT32_MAX) == INT32_MAX / d);
  }
}
