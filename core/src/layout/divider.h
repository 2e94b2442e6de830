// Division by a number that the host knows: a multiplication and a shift, where the device would run 30 instructions.
#pragma once

#include <bit>
#include <cstdint>

#include "host_device.h"

namespace mla::layout {

// For numerators and divisors below 2^31. With s = bits of divisor - 1, the factor is 2^(31 + s) / divisor rounded up: it fits 32 bits and is
// less than 1 too large, so a quotient is less than 2^-s <= 1 / divisor too large before it is cut, and comes out exact.
struct Divider {
  uint32_t divisor;
  uint32_t factor;
  uint32_t shift;

  static constexpr Divider by(int32_t divisor) {
    const uint32_t d = static_cast<uint32_t>(divisor);
    const uint32_t shift = 31 + static_cast<uint32_t>(std::bit_width(d - 1));
    return {d, static_cast<uint32_t>(((uint64_t{1} << shift) + d - 1) / d), shift};
  }
  MLA_HD constexpr int32_t quotient(int32_t n) const {
    return static_cast<int32_t>(uint64_t{static_cast<uint32_t>(n)} * factor >> shift);
  }
  MLA_HD constexpr int32_t remainder(int32_t n, int32_t quotient) const {
    return n - quotient * static_cast<int32_t>(divisor);
  }
};

}  // namespace mla::layout
