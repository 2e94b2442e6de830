// The one definition of partial attention results and how they join; used by every backend and by mla_merge.
//
// A partial result over a set of keys is (o, lse): o normalised, lse = log_b(sum of b^score), -inf with o = 0 where the denominator is
// 0. Scores and lse are in base 2 inside the library (scale_log2e folds log2(e) into the softmax scale), so the functions here take T
// values of one base and an exp/log of the same base.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace mla::math {

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;
inline constexpr double kLn2Double = 0.693147180559945309417;

// NaN-keeping maximum: fmax would drop a NaN, and a NaN lse has to reach the result.
template <class T>
MLA_HD inline T max_keep_nan(T a, T b) {
  return a > b || a != a ? a : b;
}

// What one partial weighs against the largest lse of its row. max_lse = -inf (all empty): every weight is 0.
template <class T>
MLA_HD inline T merge_weight(T lse2, T max_lse2) {
  using std::exp2;  // the one of T's precision
  if (lse2 == -INFINITY) return T(0);
  return exp2(lse2 - max_lse2);
}

// The lse of the whole from the sum of the weights.
template <class T>
MLA_HD inline T merged_lse(T max_lse2, T weight_sum) {
  using std::log2;
  return weight_sum == T(0) ? T(-INFINITY) : max_lse2 + log2(weight_sum);
}

// 1 / sum, and 0 for an empty row: out = 0, not NaN.
template <class T>
MLA_HD inline T safe_reciprocal(T weight_sum) {
  return weight_sum == T(0) ? T(0) : T(1) / weight_sum;
}

// The attention sink joins the denominator of out: out * sum / (sum + b^sink) = out * sink_factor. lse is not changed by it.
template <class T>
MLA_HD inline T sink_factor(T lse2, T sink2) {
  using std::exp2;
  if (lse2 == -INFINITY) return T(1);  // out is 0 already
  return T(1) / (T(1) + exp2(sink2 - lse2));
}

}  // namespace mla::math
