// Which batches are dealt out without cutting a request (schedule/whole.h), against a search over all ways to do it.
#include <doctest/doctest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "problem.h"
#include "schedule/build.h"

using namespace mla;
using namespace mla::schedule;

namespace {

constexpr int32_t kBlock = 64, kOverhead = 4;

Config config_of(int32_t parts) {
  return {.block_tokens = kBlock,
          .item_rows = 16,
          .heads_per_kv_head = 16,
          .kv_heads = 1,
          .parts = parts,
          .overhead_blocks = kOverhead,
          .chunk_blocks = 0,
          .plan_key = 1,
          .slots = 2 * int64_t{parts},
          .cut_blocks = 12};
}

// A schedule of requests of one query token each; the last `idle` ones have none.
struct Built {
  Config config;
  std::vector<int32_t> lengths;
  int32_t idle = 0;
  std::vector<std::byte> bytes = {};

  Layout layout() const { return {batch(), config.parts}; }
  int32_t batch() const { return static_cast<int32_t>(lengths.size()); }
  View view() { return View(bytes.data(), layout()); }

  Built& build_now() {
    bytes.assign(layout().bytes(), std::byte{0xA5});
    build(
        config, view(), batch(), [&](int32_t r) { return lengths[static_cast<size_t>(r)]; },
        [&](int32_t r) { return std::min(r, batch() - idle); });
    return *this;
  }
  std::vector<Boundary> boundaries() { return {view().boundary(), view().boundary() + config.parts + 1}; }
  bool is_whole() {
    const auto all = boundaries();
    return std::all_of(all.begin(), all.end(), [](const Boundary& b) { return b.block == 0; });
  }
  // Requests of each part; only where no request is cut.
  std::vector<int32_t> counts() {
    const auto all = boundaries();
    std::vector<int32_t> counts;
    for (size_t p = 0; p + 1 < all.size(); ++p) counts.push_back(all[p + 1].request - all[p].request);
    return counts;
  }
};

Built built(int32_t parts, std::vector<int32_t> lengths) {
  Built b{config_of(parts), std::move(lengths)};
  b.build_now();
  return b;
}

int32_t tokens_of_cost(int64_t cost) { return static_cast<int32_t>((cost - kOverhead) * kBlock); }

std::vector<int32_t> lengths_of_costs(const std::vector<int64_t>& costs) {
  std::vector<int32_t> lengths;
  for (const int64_t cost : costs) lengths.push_back(tokens_of_cost(cost));
  return lengths;
}

// The least that the largest part can cost where no request is cut, over all ways to divide them in order.
int64_t least_largest(const std::vector<int64_t>& costs, int32_t parts) {
  std::vector<int64_t> best(costs.size() + 1, INT64_MAX);  // of the first requests, in the parts so far
  best[0] = 0;
  for (int32_t p = 0; p < parts; ++p) {
    std::vector<int64_t> next = best;
    for (size_t begin = 0; begin < costs.size(); ++begin) {
      if (best[begin] == INT64_MAX) continue;
      int64_t cost = 0;
      for (size_t end = begin + 1; end <= costs.size(); ++end) {
        cost += costs[end - 1];
        next[end] = std::min(next[end], std::max(best[begin], cost));
      }
    }
    best = next;
  }
  return best[costs.size()];
}

}  // namespace

TEST_CASE("128 equal requests are whole on 132, 66 and 33 parts, and spread as evenly as they can be") {
  for (const int32_t tokens : {1, 64, 1000, 4096, 16384}) {
    for (const int32_t parts : {132, 66}) {
      Built b = built(parts, std::vector<int32_t>(128, tokens));
      CAPTURE(tokens);
      CAPTURE(parts);
      REQUIRE(b.is_whole());
      const std::vector<int32_t> counts = b.counts();
      CHECK(*std::max_element(counts.begin(), counts.end()) == ceil_div(128, parts));
      CHECK(*std::min_element(counts.begin(), counts.end()) >= 128 / parts);
    }
  }
  CHECK(built(33, std::vector<int32_t>(128, 4096)).is_whole());
}

TEST_CASE("no part has two requests where there are as many parts") {
  std::mt19937 rng(3);
  for (const int32_t batch : {1, 5, 131, 132}) {
    std::vector<int32_t> lengths(static_cast<size_t>(batch));
    for (int32_t& n : lengths) n = static_cast<int32_t>(rng() % 65);  // two fit under the limit
    Built b = built(132, lengths);
    REQUIRE(b.is_whole());
    const std::vector<int32_t> counts = b.counts();
    CHECK(*std::max_element(counts.begin(), counts.end()) == 1);
  }
}

TEST_CASE("too few equal requests are cut, so that all parts work") {
  CHECK_FALSE(built(132, std::vector<int32_t>(66, 4096)).is_whole());
  CHECK_FALSE(built(132, std::vector<int32_t>(140, 4096)).is_whole());  // eight parts would have two
  CHECK_FALSE(built(132, std::vector<int32_t>(4, 8192)).is_whole());
}

TEST_CASE("one long request among short ones is cut") {
  std::vector<int32_t> lengths(127, 64);
  lengths.insert(lengths.begin() + 50, 100'000);
  Built b = built(132, lengths);
  int cuts = 0;
  for (const Boundary& at : b.boundaries()) cuts += at.request == 50 && at.block > 0;
  CHECK(cuts > 50);
}

TEST_CASE("requests are whole up to the limit, and not beyond") {
  // Two parts. 100 and c: the even share is (100 + c) / 2, the limit 4 + 12 more.
  CHECK(built(2, lengths_of_costs({100, 133})).is_whole());
  CHECK_FALSE(built(2, lengths_of_costs({100, 134})).is_whole());
  CHECK(built(2, lengths_of_costs({133, 100})).is_whole());
  CHECK_FALSE(built(2, lengths_of_costs({134, 100})).is_whole());
  // 20 and c: 4 more, and a sixth of the share, 29 / 6.
  CHECK(built(2, lengths_of_costs({20, 37})).is_whole());
  CHECK_FALSE(built(2, lengths_of_costs({20, 38})).is_whole());
}

TEST_CASE("a batch is whole exactly if there is a way within the limit") {
  std::mt19937 rng(1);
  int whole = 0, cut_ones = 0, packed = 0;
  for (int i = 0; i < 20'000; ++i) {
    const int32_t parts = static_cast<int32_t>(2 + rng() % 5);
    const int64_t base = kOverhead + rng() % 40, spread = 1 + rng() % 60;
    std::vector<int64_t> costs(1 + rng() % 12);
    int64_t total = 0;
    for (int64_t& cost : costs) total += cost = base + static_cast<int64_t>(rng() % static_cast<uint32_t>(spread));
    Built b = built(parts, lengths_of_costs(costs));
    const int64_t share = ceil_div(total, parts), limit = share + kOverhead + std::min<int64_t>(share / 6, 12);
    REQUIRE(whole_limit(b.config, total) == limit);
    const bool can_be_whole = least_largest(costs, parts) <= limit;
    CAPTURE(i);
    if (can_be_whole) {
      REQUIRE(b.is_whole());
      std::vector<int64_t> prefix(costs.size() + 1);
      for (size_t r = 0; r < costs.size(); ++r) prefix[r + 1] = prefix[r] + costs[r];
      const auto all = b.boundaries();
      for (size_t p = 0; p + 1 < all.size(); ++p)
        REQUIRE(prefix[static_cast<size_t>(all[p + 1].request)] - prefix[static_cast<size_t>(all[p].request)] <= limit);
      ++whole;
      packed += !keep_whole_even(b.config, b.view(), b.batch(), limit);
    } else {
      const std::vector<Boundary> got = b.boundaries();
      cut(b.config, b.view(), b.batch());
      const std::vector<Boundary> want = b.boundaries();
      for (size_t p = 0; p < got.size(); ++p) REQUIRE((!is_before(got[p], want[p]) && !is_before(want[p], got[p])));
      ++cut_ones;
    }
  }
  MESSAGE(whole, " whole, ", packed, " of them packed, ", cut_ones, " cut");
  CHECK(packed > 200);
  CHECK(whole - packed > 200);
  CHECK(cut_ones > 200);
}

TEST_CASE("packing is tried up to its bound of requests") {
  // Shares of 40, limit 50: even would give the parts 32, 51 and 37.
  const std::vector<int64_t> costs = {32, 16, 35, 37};
  Built b{config_of(3), lengths_of_costs(costs)};
  b.build_now();
  REQUIRE_FALSE(keep_whole_even(b.config, b.view(), b.batch(), whole_limit(b.config, b.view().header()->total_cost)));
  b.build_now();
  CHECK(b.is_whole());
  for (const int32_t batch : {kMostPacked, kMostPacked + 1}) {  // requests without query tokens cost nothing
    b.idle = batch - static_cast<int32_t>(costs.size());
    b.lengths.resize(static_cast<size_t>(batch), 640);
    b.build_now();
    CHECK(b.is_whole() == (batch == kMostPacked));
  }
}

TEST_CASE("requests without keys, with an invalid length or without query tokens are dealt out like others") {
  for (const int32_t len : {0, kInvalidLen}) {
    Built b = built(132, std::vector<int32_t>(128, len));
    CHECK(b.is_whole());
    const std::vector<int32_t> counts = b.counts();
    CHECK(*std::max_element(counts.begin(), counts.end()) == 1);
  }
  Built none{config_of(132), std::vector<int32_t>(128, 500), 128};
  none.build_now();
  CHECK(none.view().header()->total_cost == 0);
  CHECK(none.is_whole());
  Built empty = built(132, {});
  for (const Boundary& at : empty.boundaries()) CHECK(at.request == 0);
}

TEST_CASE("fixed_chunk does not ask what a cut costs") {
  std::mt19937 rng(2);
  for (int i = 0; i < 100; ++i) {
    Built b{config_of(1 + static_cast<int32_t>(rng() % 140)),
            std::vector<int32_t>(128, 1 + static_cast<int32_t>(rng() % 4096))};
    b.config.chunk_blocks = 8;
    const std::vector<std::byte> with = b.build_now().bytes;
    b.config.cut_blocks = 0;
    CHECK(b.build_now().bytes == with);
  }
}
