// Four fp32 lanes in plain C++ (the compiler's own vector type): what every machine can run, SSE2 on x86-64, NEON on AArch64.
//
// Each header of this folder defines one struct with the same members. The structs live in an unnamed namespace, so what is compiled
// with one file's flags cannot be linked into another's.
#pragma once

#include <cstdint>
#include <cstring>

namespace mla::cpu {
namespace {

struct Scalar {
  static constexpr int kLanes = 4;
  static constexpr int kTileA = 4;  // broadcast words of a tile of the products, each multiplied by two vectors
  static constexpr bool kHasBf16Pairs = false;
  static constexpr float kZeroExponent = -127.0f;  // scale_by_pow2 with it gives 0
  typedef float V __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  typedef uint32_t U __attribute__((vector_size(16)));

  static V zero() { return V{}; }
  static V set1(float x) { return V{x, x, x, x}; }
  static V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(void* p, V v) { std::memcpy(p, &v, sizeof v); }
  static V broadcast(const void* word) {
    float x;
    std::memcpy(&x, word, sizeof x);
    return set1(x);
  }
  static V add(V a, V b) { return a + b; }
  static V sub(V a, V b) { return a - b; }
  static V mul(V a, V b) { return a * b; }
  static V fma(V a, V b, V c) { return a * b + c; }
  static V max(V a, V b) { return a > b ? a : b; }  // b if either is NaN
  static V where_greater(V a, V b, V yes, V no) { return a > b ? yes : no; }
  static bool any_greater(V a, V b) {
    const I m = a > b;
    return (m[0] | m[1] | m[2] | m[3]) != 0;
  }
  // x in lanes with t < limit, -inf in the others.
  static V keep_below(V x, int32_t t, const int32_t* limit) {
    I l;
    std::memcpy(&l, limit, sizeof l);
    return (I{t, t, t, t} < l) ? x : set1(-__builtin_inff());
  }
  static V round(V x) {  // |x| < 2^22
    const V magic = set1(12582912.0f);
    return (x + magic) - magic;
  }
  // x * 2^n for integral n in [kZeroExponent, 127].
  static V scale_by_pow2(V x, V n) {
    const V magic = set1(12582912.0f);
    U bits;
    const V shifted = n + magic;  // the low bits now hold n
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127u) << 23;
    V scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return x * scale;
  }

  static V load_bf16(const void* p) {
    uint16_t h[4];
    std::memcpy(h, p, sizeof h);
    U u = {h[0], h[1], h[2], h[3]};
    u <<= 16;
    V v;
    std::memcpy(&v, &u, sizeof v);
    return v;
  }
  static void store_bf16(void* p, V v) {
    uint16_t h[4];
    for (int i = 0; i < 4; ++i) {
      const float x = v[i];
      uint32_t u;
      std::memcpy(&u, &x, sizeof u);
      h[i] = x != x ? static_cast<uint16_t>((u >> 16) | 0x40)
                    : static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
    }
    std::memcpy(p, h, sizeof h);
  }
  static V load_fp16(const void* p) {
    uint16_t h[4];
    std::memcpy(h, p, sizeof h);
    V v{};
    for (int i = 0; i < 4; ++i) v[i] = half_to_float(h[i]);
    return v;
  }
  static void store_fp16(void* p, V v) {
    uint16_t h[4];
    for (int i = 0; i < 4; ++i) h[i] = float_to_half(v[i]);
    std::memcpy(p, h, sizeof h);
  }

 private:
  static float bits_to_float(uint32_t u) {
    float x;
    std::memcpy(&x, &u, sizeof x);
    return x;
  }
  static uint32_t float_to_bits(float x) {
    uint32_t u;
    std::memcpy(&u, &x, sizeof u);
    return u;
  }
  static float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
    const uint32_t magnitude = h & 0x7fff;
    if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    // Exponent and mantissa move as one number; the multiplication by 2^112 sets the bias right, denormals included.
    const float x = bits_to_float(magnitude << 13) * bits_to_float(0x77800000);
    return bits_to_float(sign | float_to_bits(x));
  }
  static uint16_t float_to_half(float x) {
    const uint32_t u = float_to_bits(x);
    const uint16_t sign = static_cast<uint16_t>(u >> 16 & 0x8000);
    const uint32_t magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000) return sign | 0x7e00;
    if (magnitude >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
    if (magnitude < 0x38800000) {                       // below 2^-14: adding 0.5 rounds to a multiple of 2^-24
      const float rounded = bits_to_float(magnitude) + 0.5f;
      return static_cast<uint16_t>(sign | (float_to_bits(rounded) - 0x3f000000));
    }
    const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
  }
};

}  // namespace
}  // namespace mla::cpu
