// bf16 and fp16 on the host: every pattern there and back, and rounding against the two neighbours in double.
#include <doctest/doctest.h>

#include <cmath>
#include <random>

#include "math/float16.h"

using namespace mla::math;

namespace {

struct Format {
  const char* name;
  float (*widen)(uint16_t);
  uint16_t (*narrow)(float);
  uint16_t infinity;
};

const Format kFormats[] = {{"bf16", bf16_to_float, float_to_bf16, 0x7f80},
                           {"fp16", fp16_to_float, float_to_fp16, 0x7c00}};

// What the pattern after the largest finite one would be worth, for rounding to infinity.
double magnitude_of(const Format& f, uint16_t pattern) {
  if (pattern != f.infinity) return f.widen(pattern);
  const double last = f.widen(static_cast<uint16_t>(pattern - 1));
  return last + (last - f.widen(static_cast<uint16_t>(pattern - 2)));
}

}  // namespace

TEST_CASE("widening and narrowing gives every pattern back, NaN as a NaN") {
  for (const Format& f : kFormats) {
    CAPTURE(f.name);
    for (uint32_t bits = 0; bits <= 0xffff; ++bits) {
      const float wide = f.widen(static_cast<uint16_t>(bits));
      if (std::isnan(wide)) {
        REQUIRE((bits & 0x7fff) > f.infinity);
        REQUIRE(std::isnan(f.widen(f.narrow(wide))));
      } else {
        REQUIRE(f.narrow(wide) == bits);
      }
    }
  }
}

TEST_CASE("fp16 has the values of its definition") {
  for (uint32_t bits = 0; bits < 0x7c00; ++bits) {
    const int exponent = static_cast<int>(bits >> 10);
    const double mantissa = bits & 0x3ff;
    const double value = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    REQUIRE(fp16_to_float(static_cast<uint16_t>(bits)) == value);
    REQUIRE(fp16_to_float(static_cast<uint16_t>(bits | 0x8000)) == -value);
  }
}

TEST_CASE("narrowing takes the nearer neighbour, and the even one of two equally near") {
  std::mt19937 rng(5);
  for (const Format& f : kFormats) {
    CAPTURE(f.name);
    const auto check = [&](float value) {
      const uint16_t got = f.narrow(value) & 0x7fff;
      const double magnitude = std::fabs(static_cast<double>(value));
      const double error = std::fabs(magnitude_of(f, got) - magnitude);
      CAPTURE(value);
      REQUIRE(std::signbit(value) == ((f.narrow(value) & 0x8000) != 0));
      for (const int step : {-1, 1}) {
        if ((step < 0 && got == 0) || (step > 0 && got == f.infinity)) continue;
        const double other = std::fabs(magnitude_of(f, static_cast<uint16_t>(got + step)) - magnitude);
        REQUIRE((error < other || (error == other && got % 2 == 0) || (got == f.infinity && step < 0)));
      }
    };
    for (int i = 0; i < 400'000; ++i) {
      const float value = std::bit_cast<float>(static_cast<uint32_t>(rng()));
      if (std::isfinite(value)) check(value);
    }
    // The values between two patterns: exact ties and their float neighbours.
    for (uint16_t bits = 0; bits < f.infinity; ++bits) {
      const auto tie =
          static_cast<float>((magnitude_of(f, bits) + magnitude_of(f, static_cast<uint16_t>(bits + 1))) / 2);
      check(std::nextafter(tie, 0.0f));
      check(tie);
      if (std::isfinite(std::nextafter(tie, INFINITY))) check(std::nextafter(tie, INFINITY));
    }
  }
}

TEST_CASE("what is too large becomes infinity") {
  CHECK(float_to_fp16(65520.0f) == 0x7c00);
  CHECK(float_to_fp16(-1e30f) == 0xfc00);
  CHECK(float_to_bf16(3.4e38f) == 0x7f80);
  CHECK(float_to_fp16(INFINITY) == 0x7c00);
  CHECK(float_to_bf16(-INFINITY) == 0xff80);
}
