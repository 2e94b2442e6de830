// mla_merge on every CPU backend, row by row against the definition in double.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "math/float16.h"
#include "mlakit/mla.hpp"

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// A tensor of one of the float types, poisoned with NaN, with a gap after every row.
struct Rows {
  int32_t dtype;
  int64_t columns;
  std::vector<float> wide;
  std::vector<uint16_t> narrow;

  Rows(int32_t type, int64_t rows, int64_t row_columns) : dtype(type), columns(row_columns) {
    const auto n = static_cast<size_t>(rows * (columns + kGap));
    if (dtype == MLA_DTYPE_FP32)
      wide.assign(n, NAN);
    else
      narrow.assign(n, 0x7fff);
  }
  static constexpr int64_t kGap = 3;
  int64_t stride() const { return columns + kGap; }
  void* data() { return dtype == MLA_DTYPE_FP32 ? static_cast<void*>(wide.data()) : narrow.data(); }
  double get(int64_t row, int64_t column) const {
    const auto i = static_cast<size_t>(row * stride() + column);
    if (dtype == MLA_DTYPE_FP32) return wide[i];
    return dtype == MLA_DTYPE_BF16 ? mla::math::bf16_to_float(narrow[i]) : mla::math::fp16_to_float(narrow[i]);
  }
  void set(int64_t row, int64_t column, float value) {
    const auto i = static_cast<size_t>(row * stride() + column);
    if (dtype == MLA_DTYPE_FP32)
      wide[i] = value;
    else
      narrow[i] = dtype == MLA_DTYPE_BF16 ? mla::math::float_to_bf16(value) : mla::math::float_to_fp16(value);
  }
};

struct Case {
  int32_t in_dtype, out_dtype;
  int64_t parts, tokens, heads, dim;
  bool is_base2;
};

void check_merge(const mla::Context& context, const Case& c, uint32_t seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  const int64_t rows = c.tokens * c.heads;
  Rows in(c.in_dtype, c.parts * rows, c.dim), out(c.out_dtype, rows, c.dim);
  std::vector<float> lse_in(static_cast<size_t>(c.parts * rows)), lse(static_cast<size_t>(rows), NAN);
  for (int64_t p = 0; p < c.parts; ++p) {
    for (int64_t row = 0; row < rows; ++row) {
      // Empty parts hold NaN, which must not get through; row 0 is empty in all of them.
      const bool is_empty = row == 0 || rng() % 4 == 0;
      lse_in[static_cast<size_t>(p * rows + row)] = is_empty ? -INFINITY : 10 * normal(rng);
      for (int64_t column = 0; column < c.dim; ++column) in.set(p * rows + row, column, is_empty ? NAN : normal(rng));
    }
  }
  const int64_t in_stride = in.stride(), out_stride = out.stride();
  context.merge(
      {.out_parts = mla::Tensor(in.data(), c.in_dtype, {c.parts, c.tokens, c.heads, c.dim},
                                {rows * in_stride, c.heads * in_stride, in_stride, 1}),
       .lse_parts = mla::Tensor(lse_in.data(), MLA_DTYPE_FP32, {c.parts, c.tokens, c.heads}),
       // heads outermost in lse: any strides
       .out = mla::Tensor(out.data(), c.out_dtype, {c.tokens, c.heads, c.dim}, {c.heads * out_stride, out_stride, 1}),
       .lse = mla::Tensor(lse.data(), MLA_DTYPE_FP32, {c.tokens, c.heads}, {1, c.tokens}),
       .flags = c.is_base2 ? static_cast<uint32_t>(MLA_PROBLEM_LSE_BASE2) : 0u});

  const double unit = c.is_base2 ? std::log(2.0) : 1.0;
  // One rounding of the result's type, and fp32 arithmetic on weights whose exponents go up to some 50.
  const double rounding = c.out_dtype == MLA_DTYPE_FP32 ? 0x1p-24 : c.out_dtype == MLA_DTYPE_BF16 ? 0x1p-8 : 0x1p-11;
  constexpr double kArithmetic = 64 * 0x1p-24;
  for (int64_t token = 0; token < c.tokens; ++token) {
    for (int64_t head = 0; head < c.heads; ++head) {
      const int64_t row = token * c.heads + head;
      CAPTURE(row);
      double max = -kInf, sum = 0;
      for (int64_t p = 0; p < c.parts; ++p)
        max = std::max(max, unit * static_cast<double>(lse_in[static_cast<size_t>(p * rows + row)]));
      std::vector<double> weights(static_cast<size_t>(c.parts), 0.0);
      for (int64_t p = 0; p < c.parts && max != -kInf; ++p) {
        sum += weights[static_cast<size_t>(p)] =
            std::exp(unit * static_cast<double>(lse_in[static_cast<size_t>(p * rows + row)]) - max);
      }
      const double got_lse = static_cast<double>(lse[static_cast<size_t>(head * c.tokens + token)]);
      if (sum == 0) {
        REQUIRE(got_lse == -kInf);
      } else {
        const double want_lse = (max + std::log(sum)) / unit;
        REQUIRE(std::fabs(got_lse - want_lse) <= kArithmetic * (1 + std::fabs(want_lse)));
      }
      for (int64_t column = 0; column < c.dim; ++column) {
        double want = 0, spread = 0;
        for (int64_t p = 0; p < c.parts; ++p) {
          const double weight = weights[static_cast<size_t>(p)];
          if (weight == 0) continue;
          want += weight / sum * in.get(p * rows + row, column);
          spread += weight / sum * std::fabs(in.get(p * rows + row, column));
        }
        REQUIRE(std::fabs(out.get(row, column) - want) <= rounding * std::fabs(want) + kArithmetic * spread);
      }
      for (int64_t gap = 0; gap < Rows::kGap; ++gap) REQUIRE(std::isnan(out.get(row, c.dim + gap)));
    }
  }
}

}  // namespace

TEST_CASE("merged parts are attention over all keys, on every CPU backend") {
  for (const mla::BackendInfo& backend : mla::backends()) {
    if (backend.device_type != MLA_DEVICE_CPU || !backend.is_available) continue;
    CAPTURE(backend.name);
    const mla::Context context(backend.name.c_str(), 2);
    uint32_t seed = 0;
    for (const int32_t in_dtype : {MLA_DTYPE_BF16, MLA_DTYPE_FP16, MLA_DTYPE_FP32}) {
      for (const int32_t out_dtype : {MLA_DTYPE_BF16, MLA_DTYPE_FP16, MLA_DTYPE_FP32}) {
        for (const bool is_base2 : {false, true}) {
          for (const int64_t parts : {1, 2, 5}) {
            check_merge(context, {in_dtype, out_dtype, parts, 3, 2, 512, is_base2}, ++seed);
            check_merge(context, {in_dtype, out_dtype, parts, 7, 5, 13, is_base2}, ++seed);
          }
        }
      }
    }
  }
}

TEST_CASE("a NaN in a part or in its lse reaches its row and no other") {
  for (const mla::BackendInfo& backend : mla::backends()) {
    if (backend.device_type != MLA_DEVICE_CPU || !backend.is_available) continue;
    CAPTURE(backend.name);
    const mla::Context context(backend.name.c_str());
    for (const bool is_in_lse : {false, true}) {
      std::vector<float> parts(2 * 2 * 20, 1.0f), lse_parts(2 * 2, 0.0f), out(2 * 20, -1.0f), lse(2, -1.0f);
      (is_in_lse ? lse_parts[2] : parts[2 * 20 + 5]) = NAN;  // part 1, row 0
      context.merge({.out_parts = mla::Tensor(parts.data(), MLA_DTYPE_FP32, {2, 2, 1, 20}),
                     .lse_parts = mla::Tensor(lse_parts.data(), MLA_DTYPE_FP32, {2, 2, 1}),
                     .out = mla::Tensor(out.data(), MLA_DTYPE_FP32, {2, 1, 20}),
                     .lse = mla::Tensor(lse.data(), MLA_DTYPE_FP32, {2, 1})});
      CHECK(std::isnan(out[5]));
      CHECK(std::isnan(out[6]) == is_in_lse);
      CHECK(std::isnan(lse[0]) == is_in_lse);
      for (size_t column = 20; column < 40; ++column) CHECK(out[column] == 1.0f);
      CHECK(lse[1] == doctest::Approx(std::log(2.0)));
    }
  }
}
