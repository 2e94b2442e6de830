// Where a finished row goes, and how.
#pragma once

#include "cuda/sm90/config.h"
#include "cuda/sm90/params.h"
#include "cuda/sm90/ptx/math.cuh"
#include "cuda/sm90/shared.h"
#include "layout/fragment.h"
#include "math/online_softmax.h"

namespace mla::cuda::sm90 {

__device__ __forceinline__ int32_t head_of_row(int32_t heads_per_kv_head, const Work& work, int32_t row) {
  return work.kv_head * heads_per_kv_head + row % heads_per_kv_head;
}

// Row `row` of a request (query token, head of the group) in out or lse.
__device__ __forceinline__ int64_t row_offset(const RowView& view, const ResultParams& result, int32_t heads_per_kv_head, const Work& work,
                                              int32_t row) {
  const int32_t token = row / heads_per_kv_head;
  const int32_t head = head_of_row(heads_per_kv_head, work, row);
  return view.offset(result.is_ragged, work.request, work.q_begin, token, head);
}

// Writes lse (final, or the partial's) of one row and returns the factor that finishes its O. lse_log2 = -inf: the row saw nothing.
__device__ __forceinline__ float finish_row(const ResultParams& result, const schedule::Config& config, const Work& work, int32_t item_row,
                                            int32_t row, float lse_log2, float sum) {
  float factor = math::safe_reciprocal(sum);
  if (work.slot >= 0) {
    result.partial_lse[static_cast<int64_t>(work.slot) * result.slot_rows + item_row] = lse_log2;
  } else if (work.slot == kWholeItem) {
    if (result.lse.data != nullptr) {
      static_cast<float*>(result.lse.data)[row_offset(result.lse, result, config.heads_per_kv_head, work, row)] = lse_log2 * result.lse_unit;
    }
    if (result.sink != nullptr) {
      factor *= math::sink_factor(lse_log2, result.sink[head_of_row(config.heads_per_kv_head, work, row)] * math::kLog2e);
    }
  }
  return factor;
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

// O times scale, into out or the partial's slot.
template <DType kDType>
__device__ __forceinline__ void store_output(const OutputFragment& o, const ResultParams& result, const schedule::Config& config,
                                             const Work& work, const float* scale, int tile, int half, int thread) {
  const int32_t rows = work.q_tokens * config.heads_per_kv_head - work.first_row;
  const int32_t column = half * kHalfColumns + layout::fragment_column(thread, 0);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int32_t row = layout::fragment_row(thread, r);
    if (row >= rows) continue;
    const float factor = scale[row];
    // A denominator of 0 gives 0, whatever O holds.
    const auto value = [&](int j, int i) { return factor == 0.0f ? 0.0f : o[j / 16][j % 16 * 4 + 2 * r + i] * factor; };
    if (work.slot >= 0) {
      float* target = result.partial_out + (static_cast<int64_t>(work.slot) * result.slot_rows + tile * kTileRows + row) * kValueDim + column;
#pragma unroll
      for (int j = 0; j < 32; ++j) *reinterpret_cast<float2*>(target + 8 * j) = make_float2(value(j, 0), value(j, 1));
    } else {
      const int64_t offset = row_offset(result.out, result, config.heads_per_kv_head, work, work.first_row + row) + column;
#pragma unroll
      for (int j = 0; j < 32; ++j) {
        store_pair<kDType>(result.out.data, offset + 8 * j, result.is_out_fp32, value(j, 0), value(j, 1));
      }
    }
  }
}

}  // namespace mla::cuda::sm90
