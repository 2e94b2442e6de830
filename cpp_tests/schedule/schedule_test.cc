// The schedule as pure functions: random batches, walked part by part, against what partition.h promises.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <random>
#include <set>
#include <vector>

#include "schedule/build.h"
#include "schedule/slots.h"
#include "schedule/walk.h"

using namespace mla;
using namespace mla::schedule;

namespace {

struct Batch {
  Config config{};
  Problem problem{};
  std::vector<int32_t> lengths;
  std::vector<int32_t> q_begin;  // batch + 1

  int32_t size() const { return static_cast<int32_t>(lengths.size()); }
  Layout layout() const { return {problem.max_batch, config.parts}; }
};

// A plan's maxima, and a call anywhere below them: short and long requests, empty ones, ragged q.
Batch random_batch(std::mt19937& rng, int32_t chunk_blocks, bool splits_evenly) {
  const auto pick = [&](int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng); };
  Batch b;
  Problem& p = b.problem;
  p.max_batch = pick(1, 40);
  p.q_len = pick(1, 5);
  p.max_len = pick(1, 3000);
  p.kv_heads = static_cast<int32_t>(pick(1, 3));
  p.q_heads = p.kv_heads * static_cast<int32_t>(pick(1, 20));
  p.max_q_tokens = pick(1, p.max_batch * p.q_len);
  p.max_tokens = pick(1, p.max_batch * p.max_len);

  Config& c = b.config;
  c.block_tokens = 64;
  c.item_rows = static_cast<int32_t>(pick(1, 64));
  c.heads_per_kv_head = p.heads_per_kv_head();
  c.kv_heads = p.kv_heads;
  c.parts = static_cast<int32_t>(pick(1, 30));
  c.overhead_blocks = static_cast<int32_t>(pick(1, 5));
  c.chunk_blocks = chunk_blocks;
  c.cut_blocks = static_cast<int32_t>(pick(0, 2) * pick(0, 20));
  c.splits_evenly = splits_evenly;
  c.plan_key = 77;
  c.slots = slots_needed(c, p);

  int64_t tokens_left = p.max_tokens;
  int64_t q_left = p.max_q_tokens;
  b.q_begin = {0};
  for (int64_t r = pick(0, p.max_batch); r > 0; --r) {
    const int64_t most = std::min(p.max_len, tokens_left);
    const int64_t len = pick(0, 3) == 0 ? 0 : pick(0, 1) == 0 ? most : pick(0, most);
    const int64_t q_tokens = pick(0, std::min(p.q_len, q_left));
    tokens_left -= len;
    q_left -= q_tokens;
    b.lengths.push_back(static_cast<int32_t>(len));
    b.q_begin.push_back(b.q_begin.back() + static_cast<int32_t>(q_tokens));
  }
  return b;
}

std::vector<std::byte> build_bytes(const Batch& b) {
  std::vector<std::byte> bytes(b.layout().bytes(), std::byte{0xA5});
  const auto at = [](const std::vector<int32_t>& v) { return [&v](int32_t i) { return v[static_cast<size_t>(i)]; }; };
  build(b.config, View(bytes.data(), b.layout()), b.size(), at(b.lengths), at(b.q_begin));
  return bytes;
}

using ItemKey = std::pair<int32_t, int32_t>;  // request, item

std::vector<std::vector<Piece>> walk(const Batch& b, const std::byte* bytes) {
  std::vector<std::vector<Piece>> parts(static_cast<size_t>(b.config.parts));
  for (int32_t p = 0; p < b.config.parts; ++p) {
    for_each_piece(b.config, ConstView(bytes, b.layout()), p,
                   [&](const Piece& piece, int32_t) { parts[static_cast<size_t>(p)].push_back(piece); });
  }
  return parts;
}

// Runs check(batch, bytes, pieces of each part) on many batches of both policies.
template <class Fn>
void for_random_batches(uint32_t seed, Fn&& check) {
  for (const int32_t chunk_blocks : {0, 1, 2, 7, 32}) {
    std::mt19937 rng(seed);
    for (int i = 0; i < 600; ++i) {
      const Batch b = random_batch(rng, chunk_blocks, i % 2 == 1);
      const std::vector<std::byte> bytes = build_bytes(b);
      CAPTURE(chunk_blocks);
      CAPTURE(i);
      check(b, bytes, walk(b, bytes.data()));
    }
  }
}

}  // namespace

TEST_CASE("every block of every item is computed once and in order, and an item without keys is visited once") {
  for_random_batches(1, [](const Batch& b, const auto&, const auto& parts) {
    std::map<ItemKey, int32_t> next;  // the block that has to come next
    std::map<ItemKey, int32_t> visits;
    for (const auto& part : parts) {
      for (const Piece& piece : part) {
        REQUIRE(piece.begin_block == next[{piece.request, piece.item}]);
        REQUIRE(piece.end_block >= piece.begin_block);
        next[{piece.request, piece.item}] = piece.end_block;
        ++visits[{piece.request, piece.item}];
      }
    }
    size_t items = 0;
    for (int32_t r = 0; r < b.size(); ++r) {
      const int64_t q_tokens = b.q_begin[r + 1] - b.q_begin[r];
      const int32_t n = b.config.blocks(b.lengths[r]);
      for (int32_t item = 0; item < b.config.items(q_tokens); ++item, ++items) {
        REQUIRE(visits.count({r, item}) == 1);
        REQUIRE(next[{r, item}] == n);
        if (n == 0) REQUIRE(visits[{r, item}] == 1);
      }
    }
    REQUIRE(visits.size() == items);
  });
}

TEST_CASE(
    "a balanced part costs at most its even share and one overhead, and no more than the limit if no request is cut") {
  for_random_batches(2, [](const Batch& b, const std::vector<std::byte>& bytes, const auto& parts) {
    if (b.config.chunk_blocks > 0) return;
    const int64_t total = ConstView(bytes.data(), b.layout()).header()->total_cost;
    bool is_cut = false;
    int64_t most = 0;
    for (const auto& part : parts) {
      int64_t cost = 0;
      for (const Piece& piece : part) {
        cost += piece.end_block - piece.begin_block + (piece.begin_block == 0 ? b.config.overhead_blocks : 0);
        is_cut = is_cut || piece.slot >= 0;
      }
      most = std::max(most, cost);
    }
    const int64_t even = ceil_div(total, b.config.parts) + b.config.overhead_blocks;
    REQUIRE(most <=
            (is_cut ? even : even + std::min<int64_t>(b.config.cut_blocks, ceil_div(total, b.config.parts) / 6)));
  });
}

TEST_CASE("a piece has a slot exactly if its item is cut; slots are unique and within the plan's bound") {
  for_random_batches(3, [](const Batch& b, const auto&, const auto& parts) {
    std::map<ItemKey, std::vector<Piece>> items;
    for (const auto& part : parts) {
      for (const Piece& piece : part) items[{piece.request, piece.item}].push_back(piece);
    }
    std::set<int64_t> slots;
    for (const auto& [key, pieces] : items) {
      for (const Piece& piece : pieces) {
        REQUIRE((piece.slot >= 0) == (pieces.size() > 1));
        if (piece.slot < 0) continue;
        REQUIRE(piece.slot < b.config.slots);
        REQUIRE(slots.insert(piece.slot).second);
      }
    }
  });
}

TEST_CASE("the cuts that the joining step finds are the pieces that the parts computed") {
  for_random_batches(4, [](const Batch& b, const std::vector<std::byte>& bytes, const auto& parts) {
    if (b.config.splits_evenly) return;  // does not follow the line
    const ConstView view(bytes.data(), b.layout());
    std::map<ItemKey, std::vector<Piece>> items;
    for (const auto& part : parts) {
      for (const Piece& piece : part) items[{piece.request, piece.item}].push_back(piece);
    }
    for (const auto& [key, pieces] : items) {
      const auto [r, item] = key;
      const int32_t n = b.config.blocks(b.lengths[r]);
      if (pieces.size() == 1) continue;  // nothing to join
      const int64_t item_begin = view.cost_prefix()[r] + item * b.config.item_cost(b.lengths[r]);
      const int64_t total = view.header()->total_cost;
      const Cuts cuts = cuts_of_item(b.config, item_begin, total, n);
      size_t found = 0;
      for (int64_t k = cuts.first; k <= cuts.last; ++k) {
        const Piece cut = piece_of_cut(b.config, k, r, item, item_begin, total, n, view.slot_prefix()[r]);
        if (cut.begin_block >= cut.end_block) continue;
        REQUIRE(found < pieces.size());
        REQUIRE(cut.begin_block == pieces[found].begin_block);
        REQUIRE(cut.end_block == pieces[found].end_block);
        REQUIRE(cut.slot == pieces[found].slot);
        ++found;
      }
      REQUIRE(found == pieces.size());
    }
  });
}

TEST_CASE("fixed chunks of a request depend on its own length only") {
  for_random_batches(5, [](const Batch& b, const auto&, const auto& parts) {
    if (b.config.chunk_blocks == 0) return;
    for (const auto& part : parts) {
      for (const Piece& piece : part) {
        const int32_t n = b.config.blocks(b.lengths[piece.request]);
        REQUIRE(piece.begin_block % b.config.chunk_blocks == 0);
        REQUIRE(piece.end_block == std::min(piece.begin_block + b.config.chunk_blocks, n));
      }
    }
  });
}

TEST_CASE("a schedule works at another address") {
  for_random_batches(6, [](const Batch& b, const std::vector<std::byte>& bytes, const auto& parts) {
    std::vector<std::byte> moved(bytes.size() + 64);
    std::memcpy(moved.data() + 64, bytes.data(), bytes.size());
    const auto again = walk(b, moved.data() + 64);
    for (size_t p = 0; p < parts.size(); ++p) {
      REQUIRE(again[p].size() == parts[p].size());
      for (size_t i = 0; i < parts[p].size(); ++i) REQUIRE(std::memcmp(&again[p][i], &parts[p][i], sizeof(Piece)) == 0);
    }
  });
}

TEST_CASE("the header says what the schedule is") {
  for_random_batches(7, [](const Batch& b, const std::vector<std::byte>& bytes, const auto&) {
    const ConstView view(bytes.data(), b.layout());
    REQUIRE(view.header()->magic == kMagic);
    REQUIRE(view.header()->batch == b.size());
    REQUIRE(view.header()->plan_key == 77);
    REQUIRE(view.header()->q_tokens == b.q_begin.back());
    REQUIRE(std::equal(b.lengths.begin(), b.lengths.end(), view.len()));
    REQUIRE(std::equal(b.q_begin.begin(), b.q_begin.end(), view.q_begin()));
  });
}

TEST_CASE("part_at inverts part_position") {
  for (int64_t total = 1; total < 60; ++total) {
    for (int64_t parts = 1; parts < 20; ++parts) {
      for (int64_t x = 0; x < total; ++x) {
        const int64_t p = part_at(x, parts, total);
        REQUIRE(part_position(p, parts, total) <= x);
        REQUIRE((p + 1 == parts || x < part_position(p + 1, parts, total)));
      }
    }
  }
}

TEST_CASE("the slot bound is met by the worst batch") {
  Problem p{};
  p.max_batch = 8, p.q_len = 1, p.max_q_tokens = 8, p.q_heads = p.kv_heads = 1;
  Config c{.block_tokens = 64,
           .item_rows = 1,
           .heads_per_kv_head = 1,
           .kv_heads = 1,
           .parts = 4,
           .overhead_blocks = 1,
           .chunk_blocks = 2,
           .plan_key = 0,
           .slots = 0};
  p.max_len = 129;  // one token more than a chunk: two slots each
  p.max_tokens = 8 * 129;
  CHECK(slots_needed(c, p) == 16);
  p.max_tokens = 3 * 129;  // room for three such requests
  CHECK(slots_needed(c, p) == 6);
  p.max_len = 128;  // never cut
  p.max_tokens = 8 * 128;
  CHECK(slots_needed(c, p) == 0);
}
