// bf16 and fp16 as 16-bit patterns, to and from fp32 on the host; narrowing rounds to the nearest, ties to even, and keeps NaN a NaN.
//
// Everything has internal linkage: files built for different instruction sets include this, and none may lend its copy to another.
#pragma once

#include <bit>
#include <cstdint>

namespace mla::math {
namespace {

constexpr float bf16_to_float(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

constexpr uint16_t float_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);  // a quiet NaN
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

constexpr float fp16_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1fu;
  const uint32_t mantissa = bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24, exact in fp32
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  const uint32_t wide_exponent = exponent == 0x1fu ? 0xffu : exponent + (127u - 15u);
  return std::bit_cast<float>(sign | (wide_exponent << 23) | (mantissa << 13));
}

constexpr uint16_t float_to_fp16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // from 65520 on: infinity
  if (magnitude < 0x38800000u) {                                               // below 2^-14: a multiple of 2^-24
    if (magnitude < 0x33000000u) return static_cast<uint16_t>(sign);           // below half of the smallest
    const uint32_t shift = 126u - (magnitude >> 23);                           // 14 .. 24
    const uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
    const uint32_t half = 1u << (shift - 1);
    const uint32_t rounded = (mantissa + half - 1 + ((mantissa >> shift) & 1u)) >> shift;
    return static_cast<uint16_t>(sign | rounded);  // a carry into the exponent is the smallest normal, as it should be
  }
  const uint32_t rounded = magnitude - ((127u - 15u) << 23) + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | (rounded >> 13));
}

static_assert(float_to_bf16(1.0f) == 0x3f80 && bf16_to_float(0x3f80) == 1.0f);
static_assert(float_to_fp16(1.0f) == 0x3c00 && fp16_to_float(0x3c00) == 1.0f);
static_assert(float_to_fp16(65519.0f) == 0x7bff && float_to_fp16(65520.0f) == 0x7c00);

}  // namespace
}  // namespace mla::math
