// The merge of partial results, against softmax over all keys at once in double.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "math/online_softmax.h"

using namespace mla::math;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// One value column over some keys: out and base-2 lse.
template <class T>
struct Partial {
  T out, lse2;
};

Partial<double> attend(const std::vector<double>& scores2, const std::vector<double>& values, size_t begin,
                       size_t end) {
  double max = -kInf;
  for (size_t j = begin; j < end; ++j) max = std::max(max, scores2[j]);
  double sum = 0, out = 0;
  for (size_t j = begin; j < end; ++j) {
    const double w = max == -kInf ? 0 : std::exp2(scores2[j] - max);
    sum += w;
    out += w * values[j];
  }
  return {sum == 0 ? 0 : out / sum, sum == 0 ? -kInf : max + std::log2(sum)};
}

template <class T>
Partial<T> merge(const std::vector<Partial<T>>& parts) {
  T max = -std::numeric_limits<T>::infinity();
  for (const auto& p : parts) max = max_keep_nan(max, p.lse2);
  T sum = 0, out = 0;
  for (const auto& p : parts) {
    const T w = merge_weight(p.lse2, max);
    sum += w;
    out += w * p.out;
  }
  return {out * safe_reciprocal(sum), merged_lse(max, sum)};
}

}  // namespace

TEST_CASE_TEMPLATE("merged parts equal the whole", T, float, double) {
  std::mt19937 rng(3);
  std::normal_distribution<double> normal;
  const double tolerance = 8 * static_cast<double>(std::numeric_limits<T>::epsilon());
  for (int round = 0; round < 2000; ++round) {
    const size_t keys = 1 + rng() % 50;
    std::vector<double> scores(keys), values(keys);
    for (size_t j = 0; j < keys; ++j) {
      scores[j] = rng() % 10 == 0 ? -kInf : 20 * normal(rng);
      values[j] = normal(rng);
    }
    std::vector<Partial<T>> parts;
    for (size_t begin = 0; begin < keys;) {
      const size_t end = std::min(keys, begin + rng() % 12);  // empty parts too
      const Partial<double> p = attend(scores, values, begin, end);
      parts.push_back({static_cast<T>(p.out), static_cast<T>(p.lse2)});
      begin = end;
    }
    const Partial<double> whole = attend(scores, values, 0, keys);
    const Partial<T> merged = merge(parts);
    CAPTURE(round);
    // out: a weighted mean of values of size up to 4, weights off by the rounding of lse (|lse| up to 80)
    REQUIRE(std::fabs(static_cast<double>(merged.out) - whole.out) <= 4 * 80 * tolerance);
    if (whole.lse2 == -kInf) {
      REQUIRE(merged.lse2 == -std::numeric_limits<T>::infinity());
      REQUIRE(merged.out == 0);
    } else {
      REQUIRE(std::fabs(static_cast<double>(merged.lse2) - whole.lse2) <= 80 * tolerance);
    }
  }
}

TEST_CASE("a NaN reaches the result wherever it comes from") {
  const double nan = std::nan("");
  CHECK(std::isnan(max_keep_nan(nan, 1.0)));
  CHECK(std::isnan(max_keep_nan(1.0, nan)));
  CHECK(max_keep_nan(1.0, 2.0) == 2.0);
  CHECK(std::isnan(merge<double>({{1.0, 0.0}, {2.0, nan}}).out));
  CHECK(std::isnan(merge<double>({{1.0, nan}, {2.0, 0.0}}).lse2));
}

TEST_CASE("the sink joins the denominator of out") {
  std::mt19937 rng(4);
  std::normal_distribution<double> normal;
  for (int round = 0; round < 200; ++round) {
    const double lse2 = 10 * normal(rng), sink2 = 10 * normal(rng);
    CHECK(sink_factor(lse2, sink2) ==
          doctest::Approx(std::exp2(lse2) / (std::exp2(lse2) + std::exp2(sink2))).epsilon(1e-12));
  }
  CHECK(sink_factor(-kInf, 1.0) == 1.0);
  CHECK(sink_factor(1.0, -kInf) == 1.0);
  CHECK(sink_factor(1.0, kInf) == 0.0);
}
