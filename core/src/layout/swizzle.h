// The 128-byte swizzle of TMA and wgmma: in every 1024 bytes, the 16-byte chunk of a 128-byte row is xor-ed with the row's number.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace mla::layout {

inline constexpr uint32_t kSwizzleRowBytes = 128;
inline constexpr uint32_t kSwizzleAtomBytes = 1024;  // where the pattern repeats; it follows the address, not the tile
inline constexpr uint32_t kChunkBytes = 16;

MLA_HD constexpr uint32_t swizzle128(uint32_t byte) { return byte ^ ((byte >> 3) & 0x70u); }

// Byte of 16-byte chunk `chunk` of row `row` in a tile of 128-byte rows that begins at a multiple of 1024 bytes.
MLA_HD constexpr uint32_t swizzled_chunk(uint32_t row, uint32_t chunk) {
  return row * kSwizzleRowBytes + ((chunk ^ (row & 7u)) * kChunkBytes);
}

static_assert(swizzled_chunk(9, 3) == swizzle128(9 * 128 + 3 * 16));

}  // namespace mla::layout
