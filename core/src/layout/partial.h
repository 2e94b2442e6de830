// Partial results in scratch, stored as the fragments that a warp holds, so that every access is 512 contiguous bytes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "host_device.h"

namespace mla::layout {

// Of a row of a partial result: its O and its sum of exponentials are relative to 2^maximum. A row that saw nothing has maximum -inf, sum 0
// and O 0; a normalised O with its lse in base 2 and sum 1 is a partial result too.
struct alignas(8) PartialState {  // read by one instruction
  float maximum, sum;
};

// A slot holds up to 16 * strips rows. A strip is the 16 rows of one warp; of these a tile is 8 columns, as four floats a lane:
// columns 2 * (lane % 4) and the next of row lane / 4, then of row lane / 4 + 8.
struct PartialLayout {
  int32_t strips;

  static constexpr int kStripRows = 16;
  static constexpr int kTileColumns = 8;
  static constexpr int kTiles = 512 / kTileColumns;  // of a strip
  static constexpr int kTileFloats = kStripRows * kTileColumns;

  MLA_HD constexpr int64_t out_floats() const { return int64_t{strips} * kTiles * kTileFloats; }  // of a slot
  MLA_HD constexpr int64_t rows() const { return int64_t{strips} * kStripRows; }
  MLA_HD constexpr int64_t out_offset(int64_t slot, int strip, int tile, int lane) const {
    return slot * out_floats() + (int64_t{strip} * kTiles + tile) * kTileFloats + lane * 4;
  }
  MLA_HD constexpr int64_t row_offset(int64_t slot, int row) const { return slot * rows() + row; }
};

}  // namespace mla::layout
