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

__device__ __forceinline__ int32_t head_of_row(int32_t heads_per_kv_head, const Work& work, int32_t row) {
  return work.kv_head * heads_per_kv_head + row % heads_per_kv_head;
}

// Row `row` of a request (query token, head of the group) in out or lse.
__device__ __forceinline__ int64_t row_offset(const RowView& view, const ResultParams& result,
                                              int32_t heads_per_kv_head, const Work& work, int32_t row) {
  const int32_t token = row / heads_per_kv_head;
  const int32_t head = head_of_row(heads_per_kv_head, work, row);
  return view.offset(result.is_ragged, work.request, work.q_begin, token, head);
}

// Writes the lse of a final row, and returns what the attention sink multiplies its out with.
__device__ __forceinline__ float finish_whole_row(const ResultParams& result, const schedule::Config& config,
                                                  const Work& work, int32_t row, float lse_log2, bool writes_lse) {
  if (writes_lse && result.lse.data != nullptr) {
    static_cast<float*>(result.lse.data)[row_offset(result.lse, result, config.heads_per_kv_head, work, row)] =
        lse_log2 * result.lse_unit;
  }
  if (result.sink == nullptr) return 1.0f;
  return math::sink_factor(lse_log2, result.sink[head_of_row(config.heads_per_kv_head, work, row)] * math::kLog2e);
}

// Writes what a row of the tile leaves beside its O, and returns the factor that finishes its O: 0 where the row saw nothing, and for a
// partial result any other number.
__device__ __forceinline__ float finish_row(const ResultParams& result, const schedule::Config& config,
                                            const Work& work, int32_t item_row, int32_t row, float maximum, float sum) {
  if (work.slot >= 0) {
    result.partial_state[result.partial.row_offset(work.slot, item_row)] = {sum == 0.0f ? -INFINITY : maximum, sum};
    return sum;
  }
  const float lse_log2 = sum == 0.0f ? -INFINITY : maximum + log2f(sum);
  const float factor = math::safe_reciprocal(sum);
  return work.slot == kWholeItem ? factor * finish_whole_row(result, config, work, row, lse_log2, true) : factor;
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

// How rows of out can be written: the fast way takes two-byte elements and rows aligned to 8 bytes.
enum class StorePath { kFast, kAny };

template <StorePath kPath, DType kDType>
__device__ __forceinline__ void store_four(void* out, int64_t offset, bool is_fp32, float c0, float c1, float c2,
                                           float c3) {
  if constexpr (kPath == StorePath::kFast) {
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(out) + offset) =
        make_uint2(ptx::cvt_pack<kDType>(c0, c1), ptx::cvt_pack<kDType>(c2, c3));
  } else {
    store_pair<kDType>(out, offset, is_fp32, c0, c1);
    store_pair<kDType>(out, offset + 2, is_fp32, c2, c3);
  }
}

// One row of two neighbouring accumulator tiles of 8 columns, a and b, two columns of each a lane. Lanes trade, so that an even lane
// writes four columns of a and an odd one four of b, and the four lanes of a row fill 32 bytes. The whole warp calls this.
template <StorePath kPath, DType kDType>
__device__ __forceinline__ void store_tile_pair(void* out, int64_t row_offset, bool is_row, bool is_fp32, int lane,
                                                float2 a, float2 b) {
  const bool is_odd = lane % 2 != 0;
  const float2 given = is_odd ? a : b;
  const float2 taken =
      make_float2(__shfl_xor_sync(ptx::kWholeWarp, given.x, 1), __shfl_xor_sync(ptx::kWholeWarp, given.y, 1));
  if (!is_row) return;
  const float2 first = is_odd ? taken : a, second = is_odd ? b : taken;
  store_four<kPath, kDType>(out, row_offset + (is_odd ? 8 : 0) + lane % 4 / 2 * 4, is_fp32, first.x, first.y, second.x,
                            second.y);
}

__device__ __forceinline__ StorePath store_path(const ResultParams& result, int64_t row_offset) {
  const bool is_aligned =
      reinterpret_cast<uintptr_t>(static_cast<uint16_t*>(result.out.data) + row_offset) % sizeof(uint2) == 0;
  return !result.is_out_fp32 && is_aligned ? StorePath::kFast : StorePath::kAny;
}

// O of one output warpgroup: [64 rows, 256 columns] as two fragments of 128 columns.
using OutputFragment = float[2][64];

// One row of O times its factor; r: which of the thread's two rows. A denominator of 0 gives 0, whatever O holds.
template <StorePath kPath, DType kDType>
__device__ __forceinline__ void store_row(const OutputFragment& o, int r, float factor, const ResultParams& result,
                                          int64_t row_offset, bool is_row, int lane) {
  const auto pair = [&](int tile) {
    const float* v = &o[tile / 16][tile % 16 * 4 + 2 * r];
    return factor == 0.0f ? make_float2(0.0f, 0.0f) : make_float2(v[0] * factor, v[1] * factor);
  };
#pragma unroll
  for (int tile = 0; tile < kHalfColumns / layout::PartialLayout::kTileColumns; tile += 2) {
    store_tile_pair<kPath, kDType>(result.out.data, row_offset + tile * layout::PartialLayout::kTileColumns, is_row,
                                   result.is_out_fp32, lane, pair(tile), pair(tile + 1));
  }
}

// O times scale into out, or O into the partial's slot.
template <DType kDType>
__device__ __forceinline__ void store_output(const OutputFragment& o, const ResultParams& result,
                                             const schedule::Config& config, const Work& work, const float* scale,
                                             int tile, int half, int thread) {
  const int32_t rows = work.q_tokens * config.heads_per_kv_head - work.first_row;
  const int32_t row[2] = {layout::fragment_row(thread, 0), layout::fragment_row(thread, 1)};
  const float factor[2] = {scale[row[0]], scale[row[1]]};
  const int lane = thread % 32;
  if (work.slot >= 0) {
    constexpr int kTiles = kHalfColumns / layout::PartialLayout::kTileColumns;
    const int strip = tile * (kTileRows / layout::PartialLayout::kStripRows) + thread / 32;
    if (strip >= result.partial.strips) return;
    float* target = result.partial_out + result.partial.out_offset(work.slot, strip, half * kTiles, lane);
    const bool is_zero[2] = {factor[0] == 0.0f && row[0] < rows, factor[1] == 0.0f && row[1] < rows};
    const bool has_zero = __any_sync(ptx::kWholeWarp, is_zero[0] || is_zero[1]);
    const auto store = [&](auto&& value) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const float* v = &o[j / 16][j % 16 * 4];
        *reinterpret_cast<float4*>(target + j * layout::PartialLayout::kTileFloats) =
            make_float4(value(v[0], 0), value(v[1], 0), value(v[2], 1), value(v[3], 1));
      }
    };
    // Small batches wait for this, and each instruction is fetched for the first time.
    if (!has_zero) {
      store([](float x, int) { return x; });
    } else {
      store([&](float x, int r) { return is_zero[r] ? 0.0f : x; });
    }
    return;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool is_row = row[r] < rows;
    const int64_t offset =
        is_row ? row_offset(result.out, result, config.heads_per_kv_head, work, work.first_row + row[r]) +
                     half * kHalfColumns
               : 0;
    if (!__any_sync(ptx::kWholeWarp, is_row)) return;
    if (__all_sync(ptx::kWholeWarp, !is_row || store_path(result, offset) == StorePath::kFast)) {
      store_row<StorePath::kFast, kDType>(o, r, factor[r], result, offset, is_row, lane);
    } else {
      store_row<StorePath::kAny, kDType>(o, r, factor[r], result, offset, is_row, lane);
    }
  }
}

}  // namespace mla::cuda::sm90
