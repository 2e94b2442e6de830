// Joins the partial results of every item that was cut into pieces, in the order of the cuts, and finishes its rows.
//
// An item cut into few pieces: a warp a row. Cut into many (long requests in small batches): a CTA for a quarter of a row, each warp a
// share of the pieces, so that enough loads are in flight.
#pragma once

#include "cuda/sm90/epilogue.cuh"
#include "cuda/sm90/ptx/pdl.cuh"
#include "cuda/sm90/softmax.cuh"

namespace mla::cuda::sm90 {

inline constexpr int kQuarter = kValueDim / kRowQuarters;  // columns: four a lane

struct CutItem {
  Work work;          // request, q_tokens, q_begin, first_row, kv_head
  int32_t blocks;     // n of its request
  int32_t item;
  int64_t item_begin;
  int64_t slot_prefix;
  schedule::Cuts cuts;
  bool is_cut;
};

// Which item blockIdx.x stands for, see CombineParams.
__device__ inline schedule::Boundary item_of_block(const CombineParams& p, const schedule::ConstView& view) {
  const schedule::Boundary none{p.batch, 0, 0, 0};
  if (p.items_per_request > 0) return {static_cast<int32_t>(blockIdx.x) / p.items_per_request, static_cast<int32_t>(blockIdx.x) % p.items_per_request, 0, 0};
  const schedule::Boundary before = view.boundary()[blockIdx.x], at = view.boundary()[blockIdx.x + 1];
  const bool is_first_cut = at.block > 0 && !(before.request == at.request && before.item == at.item && before.block > 0);
  return is_first_cut ? at : none;
}

__device__ inline CutItem find_item(const CombineParams& p, const schedule::ConstView& view) {
  CutItem it{};
  const schedule::Boundary at = item_of_block(p, view);
  if (at.request >= min(p.batch, view.header()->batch)) return it;
  const int32_t q_tokens = view.q_tokens(at.request);
  const int32_t len = view.len()[at.request];
  it.blocks = p.config.blocks(len);
  if (it.blocks == 0 || at.item >= p.config.items(q_tokens)) return it;
  it.item = at.item;
  it.item_begin = view.cost_prefix()[at.request] + at.item * p.config.item_cost(len);
  it.slot_prefix = view.slot_prefix()[at.request];
  it.cuts = schedule::cuts_of_item(p.config, it.item_begin, view.header()->total_cost, it.blocks);
  it.is_cut = it.cuts.last > it.cuts.first;
  it.work = {at.request, 0, 0, len, q_tokens, view.q_begin()[at.request], at.item / p.config.kv_heads * p.config.item_rows,
             at.item % p.config.kv_heads, kWholeItem};
  return it;
}

// A merge in progress: sum of weights and weighted sum of O, relative to maximum.
template <int kVectors>
struct Merge {
  float maximum = -INFINITY;
  float sum = 0.0f;
  float4 o[kVectors] = {};
};

__device__ inline float maximum_of_warp(float x) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, d));
  return x;
}
__device__ inline float sum_of_warp(float x) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(kWholeWarp, x, d);
  return x;
}

// Adds the cuts first, first + stride, ... of one row to m, by one warp; column: of this lane's first vector, the next 128 on.
template <int kVectors>
__device__ inline void merge_cuts(const CombineParams& p, const CutItem& it, int64_t total_cost, int32_t item_row, int column, int64_t first,
                                  int stride, Merge<kVectors>& m) {
  const int lane = threadIdx.x % 32;
  for (int64_t round = first; round <= it.cuts.last; round += 32 * stride) {
    const int64_t cut = round + lane * stride;
    int64_t slot = -1;
    float lse = -INFINITY;
    if (cut <= it.cuts.last) {
      const schedule::Piece piece =
          schedule::piece_of_cut(p.config, cut, it.work.request, it.item, it.item_begin, total_cost, it.blocks, it.slot_prefix);
      if (piece.begin_block < piece.end_block) {
        slot = piece.slot < p.config.slots ? piece.slot : -1;
        lse = slot < 0 ? NAN : p.result.partial_lse[slot * p.result.slot_rows + item_row];
      }
    }
    const float maximum = fmaxf(m.maximum, maximum_of_warp(lse));
    const float weight = math::merge_weight(lse, maximum);
    const float rescale = math::merge_weight(m.maximum, maximum);
    m.maximum = maximum;
    m.sum = m.sum * rescale + sum_of_warp(weight);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) m.o[v] = {m.o[v].x * rescale, m.o[v].y * rescale, m.o[v].z * rescale, m.o[v].w * rescale};
    const int count = static_cast<int>(min(static_cast<int64_t>(32), (it.cuts.last - round) / stride + 1));
    constexpr int kUnroll = kVectors == 1 ? 8 : 2;
#pragma unroll 1
    for (int j = 0; j < count; j += kUnroll) {
      float4 o[kUnroll][kVectors];
      float w[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t s = __shfl_sync(kWholeWarp, slot, (j + u) % 32);
        w[u] = __shfl_sync(kWholeWarp, weight, (j + u) % 32);
        const bool is_read = j + u < count && s >= 0;
        const float* source = p.result.partial_out + (s * p.result.slot_rows + item_row) * kValueDim + column;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) o[u][v] = is_read ? *reinterpret_cast<const float4*>(source + v * kQuarter) : float4{};
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (j + u >= count) continue;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          m.o[v] = {fmaf(w[u], o[u][v].x, m.o[v].x), fmaf(w[u], o[u][v].y, m.o[v].y), fmaf(w[u], o[u][v].z, m.o[v].z),
                    fmaf(w[u], o[u][v].w, m.o[v].w)};
        }
      }
    }
  }
}

// Writes kVectors x 4 columns of a finished row, and its lse.
template <DType kDType, int kVectors>
__device__ inline void write_row(const CombineParams& p, const CutItem& it, int32_t item_row, int column, bool writes_lse, const Merge<kVectors>& m) {
  const int32_t row = it.work.first_row + item_row;
  const float lse_log2 = math::merged_lse(m.maximum, m.sum);
  float factor = math::safe_reciprocal(m.sum);
  if (p.result.sink != nullptr) factor *= math::sink_factor(lse_log2, p.result.sink[head_of_row(p.config.heads_per_kv_head, it.work, row)] * math::kLog2e);
  if (writes_lse && p.result.lse.data != nullptr) {
    static_cast<float*>(p.result.lse.data)[row_offset(p.result.lse, p.result, p.config.heads_per_kv_head, it.work, row)] = lse_log2 * p.result.lse_unit;
  }
  const int64_t offset = row_offset(p.result.out, p.result, p.config.heads_per_kv_head, it.work, row) + column;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const float4 o = factor == 0.0f ? float4{} : float4{m.o[v].x * factor, m.o[v].y * factor, m.o[v].z * factor, m.o[v].w * factor};
    store_pair<kDType>(p.result.out.data, offset + v * kQuarter, p.result.is_out_fp32, o.x, o.y);
    store_pair<kDType>(p.result.out.data, offset + v * kQuarter + 2, p.result.is_out_fp32, o.z, o.w);
  }
}

// One quarter of a row by the whole CTA.
template <DType kDType>
__device__ inline void combine_quarter(const CombineParams& p, const CutItem& it, int64_t total_cost, int32_t item_row, int quarter) {
  __shared__ float s_maximum[kCombineWarps], s_sum[kCombineWarps];
  __shared__ float4 s_o[kCombineWarps][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int column = quarter * kQuarter + 4 * lane;
  Merge<1> m;
  merge_cuts(p, it, total_cost, item_row, column, it.cuts.first + warp, kCombineWarps, m);
  if (lane == 0) {
    s_maximum[warp] = m.maximum;
    s_sum[warp] = m.sum;
  }
  s_o[warp][lane] = m.o[0];
  __syncthreads();
  if (warp == 0) {
    Merge<1> all;
    for (int w = 0; w < kCombineWarps; ++w) all.maximum = fmaxf(all.maximum, s_maximum[w]);
    for (int w = 0; w < kCombineWarps; ++w) {
      // The sum of a warp without cuts is 0, and so is its O; one with a NaN carries it in the sum.
      const float weight = s_sum[w] == 0.0f ? 0.0f : s_maximum[w] == all.maximum ? 1.0f : exp2f(s_maximum[w] - all.maximum);
      all.sum += weight * s_sum[w];
      const float4 o = s_o[w][lane];
      all.o[0] = {fmaf(weight, o.x, all.o[0].x), fmaf(weight, o.y, all.o[0].y), fmaf(weight, o.z, all.o[0].z), fmaf(weight, o.w, all.o[0].w)};
    }
    write_row<kDType, 1>(p, it, item_row, column, quarter == 0 && lane == 0, all);
  }
  __syncthreads();
}

// Grid (items or parts, CTAs for each).
template <DType kDType>
__global__ void __launch_bounds__(kCombineThreads) combine_kernel(const __grid_constant__ CombineParams p) {
  // I4: decode waited for the schedule before it let this kernel start, so the schedule may be read before the wait.
  const schedule::ConstView view(p.schedule, p.layout);
  const CutItem it = find_item(p, view);
  const int64_t total_cost = view.header()->total_cost;
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  if (!it.is_cut) return;
  const int32_t rows = min(p.config.item_rows, it.work.q_tokens * p.config.heads_per_kv_head - it.work.first_row);
  if (it.cuts.last - it.cuts.first >= kFewCuts) {
    for (int32_t unit = blockIdx.y; unit < rows * kRowQuarters; unit += gridDim.y) {
      combine_quarter<kDType>(p, it, total_cost, unit / kRowQuarters, unit % kRowQuarters);
    }
  } else {
    const int lane = threadIdx.x % 32;
    for (int32_t row = blockIdx.y * kCombineWarps + threadIdx.x / 32; row < rows; row += gridDim.y * kCombineWarps) {
      Merge<kRowQuarters> m;
      merge_cuts(p, it, total_cost, row, 4 * lane, it.cuts.first, 1, m);
      write_row<kDType, kRowQuarters>(p, it, row, 4 * lane, lane == 0, m);
    }
  }
}

}  // namespace mla::cuda::sm90
