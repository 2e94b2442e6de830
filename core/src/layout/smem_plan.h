// Where everything of the dense decode kernel lies in shared memory. Tiles begin at multiples of 1024 bytes: the swizzle follows addresses.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "layout/swizzle.h"

namespace mla::layout {

inline constexpr uint32_t kMaxSharedBytes = 227 * 1024;  // of one CTA on sm_90

struct SmemPlan {
  uint32_t slots, slot_bytes;  // ring, of keys and of Q on its way
  uint32_t q_bytes;            // the column groups of Q that are not in registers
  uint32_t p_stages, p_bytes;
  uint32_t rope_bytes;     // where the rope has a place of its own
  uint32_t control_bytes;  // barriers, work, row scales

  MLA_HD constexpr uint32_t slot(uint32_t i) const { return i * slot_bytes; }
  MLA_HD constexpr uint32_t q() const { return slots * slot_bytes; }
  MLA_HD constexpr uint32_t p(uint32_t i) const { return q() + q_bytes + i * p_bytes; }
  MLA_HD constexpr uint32_t rope() const { return p(p_stages); }
  MLA_HD constexpr uint32_t control() const { return rope() + rope_bytes; }
  MLA_HD constexpr uint32_t bytes() const { return control() + control_bytes; }
  MLA_HD constexpr bool is_valid() const {
    return slot_bytes % kSwizzleAtomBytes == 0 && q_bytes % kSwizzleAtomBytes == 0 &&
           p_bytes % kSwizzleAtomBytes == 0 && rope_bytes % kSwizzleAtomBytes == 0 && bytes() <= kMaxSharedBytes;
  }
};

}  // namespace mla::layout
