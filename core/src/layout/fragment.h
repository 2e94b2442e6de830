// Which element of a 64-row wgmma accumulator (or of an m64k16 A operand in registers) a thread holds.
#pragma once

#include "host_device.h"

namespace mla::layout {

inline constexpr int kTileRows = 64;

// Thread t of the warpgroup holds rows fragment_row(t, 0) and fragment_row(t, 1).
MLA_HD constexpr int fragment_row(int thread, int which) { return thread / 32 * 16 + thread % 32 / 4 + which * 8; }

// Of its accumulator registers, i belongs to row fragment_row(t, which_row(i)) and column fragment_column(t, i).
MLA_HD constexpr int which_row(int i) { return i / 2 % 2; }
MLA_HD constexpr int fragment_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

}  // namespace mla::layout
