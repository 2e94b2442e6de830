// Balanced schedules that cut every item into equal pieces (schedule/even_split.h).
#include <doctest/doctest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "problem.h"
#include "schedule/build.h"
#include "schedule/walk.h"

using namespace mla;
using namespace mla::schedule;

namespace {

constexpr int32_t kBlock = 32, kOverhead = 8;

Config config_of(int32_t parts, int32_t kv_heads) {
  return {.block_tokens = kBlock,
          .item_rows = 16,
          .heads_per_kv_head = 16,
          .kv_heads = kv_heads,
          .parts = parts,
          .overhead_blocks = kOverhead,
          .chunk_blocks = 0,
          .plan_key = 1,
          .slots = 2 * int64_t{parts},
          .cut_blocks = 24,
          .splits_evenly = true};
}

struct Built {
  Config config;
  std::vector<std::byte> bytes;
  Layout layout;

  // One query token a request.
  Built(int32_t parts, int32_t kv_heads, const std::vector<int32_t>& lengths)
      : config(config_of(parts, kv_heads)), layout{static_cast<int64_t>(lengths.size()), parts} {
    bytes.resize(layout.bytes());
    build(
        config, View(bytes.data(), layout), static_cast<int32_t>(lengths.size()),
        [&](int32_t r) { return lengths[static_cast<size_t>(r)]; }, [](int32_t r) { return r; });
  }
  std::vector<Piece> pieces_of(int32_t part) const {
    std::vector<Piece> pieces;
    for_each_piece(config, ConstView(bytes.data(), layout), part,
                   [&](const Piece& piece, int32_t) { pieces.push_back(piece); });
    return pieces;
  }
};

}  // namespace

TEST_CASE("equal requests get equal pieces, and the parts that are left over come last") {
  const Built b(132, 1, std::vector<int32_t>(16, 8192));
  for (int32_t p = 0; p < 128; ++p) {
    const std::vector<Piece> pieces = b.pieces_of(p);
    REQUIRE(pieces.size() == 1);
    CHECK(pieces[0].request == p / 8);
    CHECK(pieces[0].begin_block == p % 8 * 32);
    CHECK(pieces[0].end_block == p % 8 * 32 + 32);
  }
  for (int32_t p = 128; p < 132; ++p) CHECK(b.pieces_of(p).empty());
}

TEST_CASE("a request is never cut into more pieces than it has blocks") {
  const Built b(132, 1, {1024});
  for (int32_t p = 0; p < 132; ++p) CHECK(b.pieces_of(p).size() == (p < 32 ? 1 : 0));
}

TEST_CASE("items are split evenly exactly if no piece above the share needs more parts than there are") {
  std::mt19937 random(1);
  int split = 0, cut_ones = 0;
  for (int i = 0; i < 5000; ++i) {
    const int32_t parts = 2 + static_cast<int32_t>(random() % 140), kv_heads = 1 + static_cast<int32_t>(random() % 3);
    std::vector<int32_t> lengths(1 + random() % 20);
    const auto most = 1 + random() % 20'000;
    for (int32_t& n : lengths) n = random() % 8 == 0 ? 0 : static_cast<int32_t>(random() % most);
    const Built b(parts, kv_heads, lengths);
    const int32_t batch = static_cast<int32_t>(lengths.size());
    const ConstView view(b.bytes.data(), b.layout);
    const int64_t share = ceil_div(view.header()->total_cost, parts);
    int64_t needed = 0;
    for (const int32_t n : lengths) needed += kv_heads * std::max<int64_t>(1, ceil_div(ceil_div(n, kBlock), share));
    bool is_whole = true;
    for (int32_t p = 0; p < parts; ++p) is_whole = is_whole && view.boundary()[p].block == 0;
    if (is_whole) continue;
    CAPTURE(i);
    if (needed > parts || batch > parts) {
      Built line(parts, kv_heads, lengths);
      cut(line.config, View(line.bytes.data(), line.layout), batch);
      CHECK(line.bytes == b.bytes);
      ++cut_ones;
      continue;
    }
    std::vector<std::vector<int32_t>> sizes(lengths.size() * static_cast<size_t>(kv_heads));
    for (int32_t p = 0; p < parts; ++p) {
      const std::vector<Piece> pieces = b.pieces_of(p);
      REQUIRE(pieces.size() == (p < needed ? 1 : 0));
      for (const Piece& piece : pieces)
        sizes[static_cast<size_t>(piece.request * kv_heads + piece.item)].push_back(piece.end_block -
                                                                                    piece.begin_block);
    }
    for (const std::vector<int32_t>& of_item : sizes) {
      const auto [least, largest] = std::minmax_element(of_item.begin(), of_item.end());
      CHECK(*largest <= share);
      CHECK(*largest - *least <= 1);
    }
    ++split;
  }
  MESSAGE(split, " split evenly, ", cut_ones, " cut where shares end");
  CHECK(split > 300);
  CHECK(cut_ones > 300);
}
