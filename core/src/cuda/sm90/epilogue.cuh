// Where a finished row goes, and how.
#pragma once

#include "cuda/sm90/config.h"
#include "cuda/sm90/params.h"
#include "cuda/sm90/ptx/common.cuh"
#include "cuda/sm90/ptx/math.cuh"
#include "cuda/sm90/shared.h"
#include "layout/fragment.h"
#include "math/online_softmax.h"

namespace mla::cuda::sm90 {

// Row `row` of a request in out or lse.
__device__ __forceinline__ int64_t row_offset(const RowView& view, const ResultParams& result, const Work& work,
                                              int32_t row) {
  const int32_t token = result.heads.quotient(row);
  return view.offset(result.is_ragged, work.request, work.q_begin, token, head_of_row(result.heads, work, row, token));
}

// The attention sink of the row's head, in base 2.
__device__ __forceinline__ float sink_of_row(const ResultParams& result, const Work& work, int32_t row) {
  return result.sink[head_of_row(result.heads, work, row, result.heads.quotient(row))] * math::kLog2e;
}

// What finishes O of a row: 1 / sum, and what the attention sink takes. 0: the row saw nothing. Of a partial result any other number.
__device__ __forceinline__ float row_scale(const ResultParams& result, const Work& work, int32_t row, float maximum,
                                           float sum) {
  if (work.slot != kWholeItem || sum == 0.0f) return sum;
  const float factor = __fdividef(1.0f, sum);  // a sum is at least the 1 of its largest score, or NaN
  if (result.sink == nullptr) return factor;
  return factor * math::sink_factor(maximum + log2f(sum), sink_of_row(result, work, row));
}

// What a row leaves beside its O: its lse, or the state of its partial result. item_row: among the rows of the item.
__device__ __forceinline__ void store_row_state(const ResultParams& result, const Work& work, int32_t item_row,
                                                int32_t row, float maximum, float sum) {
  if (work.slot >= 0) {
    result.partial_state[result.partial.row_offset(work.slot, item_row)] = {sum == 0.0f ? -INFINITY : maximum, sum};
  } else if (work.slot == kWholeItem && result.lse.data != nullptr) {
    const float lse_log2 = sum == 0.0f ? -INFINITY : maximum + log2f(sum);
    static_cast<float*>(result.lse.data)[row_offset(result.lse, result, work, row)] = lse_log2 * result.lse_unit;
  }
}

// Two neighbouring columns of out.
template <DType kDType>
__device__ __forceinline__ void store_pair(void* out, int64_t offset, bool is_fp32, float low, float high) {
  if (is_fp32) {
    float* target = static_cast<float*>(out) + offset;
    target[0] = low;
    target[1] = high;
  } else {
    uint16_t* target = static_cast<uint16_t*>(out) + offset;
    const uint32_t packed = ptx::cvt_pack<kDType>(low, high);
    if (reinterpret_cast<uintptr_t>(target) % sizeof(packed) == 0) {
      *reinterpret_cast<uint32_t*>(target) = packed;
    } else {
      target[0] = static_cast<uint16_t>(packed);
      target[1] = static_cast<uint16_t>(packed >> 16);
    }
  }
}

// O of one output warpgroup: [64 rows, 256 columns] as two fragments of 128 columns.
using OutputFragment = float[2][64];

inline constexpr int kHalfTiles = kHalfColumns / layout::PartialLayout::kTileColumns;  // of 8 columns

// The two columns that a lane holds of a tile, in its row r.
__device__ __forceinline__ const float* pair_of(const OutputFragment& o, int tile, int r) {
  return &o[tile / 16][tile % 16 * 4 + 2 * r];
}

// O into the partial's slot, as accumulated. has_zero: a row of the warp saw nothing, whatever its O holds.
__device__ __forceinline__ void store_partial(const OutputFragment& o, float* target, const bool (&is_zero)[2],
                                              bool has_zero) {
  const auto float4_of = [&](int tile) {
    return reinterpret_cast<float4*>(target + tile * layout::PartialLayout::kTileFloats);
  };
#pragma unroll
  for (int tile = 0; tile < kHalfTiles; ++tile) {
    const float *v = pair_of(o, tile, 0), *w = pair_of(o, tile, 1);
    *float4_of(tile) = make_float4(v[0], v[1], w[0], w[1]);
  }
  if (!has_zero) return;
#pragma unroll 1
  for (int tile = 0; tile < kHalfTiles; ++tile) {
    float4& stored = *float4_of(tile);
    if (is_zero[0]) stored.x = stored.y = 0.0f;
    if (is_zero[1]) stored.z = stored.w = 0.0f;
  }
}

// One row, of two-byte elements and aligned to 8 bytes, which begins at target. Of two neighbouring tiles a lane holds two columns of each;
// lanes trade, so that an even lane writes four columns of the first and an odd one four of the second, and the four lanes of a row fill 32
// bytes. The whole warp calls this; target = nullptr: this lane has no row.
template <DType kDType>
__device__ __forceinline__ void store_row_fast(const OutputFragment& o, int r, float factor, uint16_t* target,
                                               int lane) {
  const bool is_odd = lane % 2 != 0, is_row = target != nullptr;
  target += (is_odd ? layout::PartialLayout::kTileColumns : 0) + lane % 4 / 2 * 4;
#pragma unroll
  for (int tile = 0; tile < kHalfTiles; tile += 2) {
    const float *v = pair_of(o, tile, r), *w = pair_of(o, tile + 1, r);
    const uint32_t a = ptx::cvt_pack<kDType>(v[0] * factor, v[1] * factor),
                   b = ptx::cvt_pack<kDType>(w[0] * factor, w[1] * factor);
    const uint32_t taken = __shfl_xor_sync(ptx::kWholeWarp, is_odd ? a : b, 1);
    if (is_row)
      *reinterpret_cast<uint2*>(target + tile * layout::PartialLayout::kTileColumns) =
          make_uint2(is_odd ? taken : a, is_odd ? b : taken);
  }
}

// O times its factor into out. offset: where this lane's two rows begin in this half of the columns, < 0: there is no such row.
template <DType kDType>
__device__ __forceinline__ void store_rows(const OutputFragment& o, const ResultParams& result,
                                           const int64_t (&offset)[2], const float (&factor)[2], int lane) {
  uint16_t* const out = static_cast<uint16_t*>(result.out.data);
  const auto is_slow = [&](int r) {
    return offset[r] >= 0 && (result.is_out_fp32 || factor[r] == 0.0f ||
                              reinterpret_cast<uintptr_t>(out + offset[r]) % sizeof(uint2) != 0);
  };
  if (!__any_sync(ptx::kWholeWarp, is_slow(0) || is_slow(1))) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (__any_sync(ptx::kWholeWarp, offset[r] >= 0))
        store_row_fast<kDType>(o, r, factor[r], offset[r] < 0 ? nullptr : out + offset[r], lane);
    }
    return;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (offset[r] < 0) continue;
#pragma unroll
    for (int tile = 0; tile < kHalfTiles; ++tile) {
      const float* v = pair_of(o, tile, r);
      // A denominator of 0 gives 0, whatever O holds.
      store_pair<kDType>(result.out.data, offset[r] + tile * layout::PartialLayout::kTileColumns + lane % 4 * 2,
                         result.is_out_fp32, factor[r] == 0.0f ? 0.0f : v[0] * factor[r],
                         factor[r] == 0.0f ? 0.0f : v[1] * factor[r]);
    }
  }
}

// O into out or the partial's slot. scales, out_rows: of the tile's rows, see Control.
template <DType kDType>
__device__ __forceinline__ void store_output(const OutputFragment& o, const ResultParams& result, const Work& work,
                                             int32_t rows, const float* scales, const int64_t* out_rows, int tile,
                                             int half, int thread) {
  const int32_t row[2] = {layout::fragment_row(thread, 0), layout::fragment_row(thread, 1)};
  const float factor[2] = {scales[row[0]], scales[row[1]]};
  const int lane = thread % 32;
  if (work.slot >= 0) {
    const int strip = tile * (kTileRows / layout::PartialLayout::kStripRows) + thread / 32;
    if (strip >= result.partial.strips) return;
    const bool is_zero[2] = {factor[0] == 0.0f && row[0] < rows, factor[1] == 0.0f && row[1] < rows};
    store_partial(o, result.partial_out + result.partial.out_offset(work.slot, strip, half * kHalfTiles, lane), is_zero,
                  __any_sync(ptx::kWholeWarp, is_zero[0] || is_zero[1]));
    return;
  }
  const int64_t offset[2] = {row[0] < rows ? out_rows[row[0]] + half * kHalfColumns : -1,
                             row[1] < rows ? out_rows[row[1]] + half * kHalfColumns : -1};
  store_rows<kDType>(o, result, offset, factor, lane);
}

}  // namespace mla::cuda::sm90
