// Joins the partial results of every item that was cut into pieces, in the order of the cuts, and finishes its rows.
//
// The unit of work is a few tiles of one strip (16 rows), see layout/partial.h. Where there are many items, each is cut into few pieces,
// and a warp takes kCombineTiles tiles. Where there are few items (small batches), up to a whole CTA shares the pieces of one tile, so
// that enough loads are in flight. Small batches wait for this kernel, so it is short: no division in 64 bits, and two rounds of loads.
#pragma once

#include "cuda/sm90/epilogue.cuh"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/ptx/pdl.cuh"

namespace mla::cuda::sm90 {

using layout::PartialLayout;

inline constexpr int32_t kNoPiece = -1;  // in a list of slots: this cut holds no block

// Cell 0 of the item that blockIdx.x stands for, see CombineParams; request = batch: none.
__device__ __forceinline__ schedule::Boundary item_of_block(const CombineParams& p, const schedule::ConstView& view) {
  const schedule::Boundary none{p.batch, 0, 0, 0};
  if (p.items_per_request > 0) {
    const int32_t request = static_cast<int32_t>(blockIdx.x) / p.items_per_request;
    return {request, static_cast<int32_t>(blockIdx.x) % p.items_per_request, 0, 0};
  }
  const schedule::Boundary before = view.boundary()[blockIdx.x], at = view.boundary()[blockIdx.x + 1];
  const bool is_first_cut =
      at.block > 0 && !(before.request == at.request && before.item == at.item && before.block > 0);
  return is_first_cut && at.request < p.batch ? schedule::Boundary{at.request, at.item, 0, 0} : none;
}

// Lists the slots of the item's pieces in order, from number `round` on, as many as the CTA has threads; returns how many. Every thread
// calls this. balanced: a thread for each part (a plan has no more), so there is one round.
__device__ __forceinline__ int list_slots(const CombineParams& p, const schedule::ConstView& view,
                                          const schedule::Boundary& item, int64_t round, int32_t* s_slots) {
  const int32_t thread = threadIdx.x;
  if (p.config.chunk_blocks > 0) {
    if (item.request >= view.header()->batch) return 0;
    const int32_t chunks = p.config.chunks(view.len()[item.request]);
    const int64_t slot = view.slot_prefix()[item.request] + int64_t{item.item} * chunks + round + thread;
    s_slots[thread] = slot < p.config.slots ? static_cast<int32_t>(slot) : kDropped;
    return __syncthreads_count(round + thread < chunks);
  }
  const bool is_part = thread < p.config.parts;
  const schedule::Boundary begin = view.boundary()[is_part ? thread : 0],
                           end = view.boundary()[is_part ? thread + 1 : 0];
  const bool begins_in_time =
      begin.request < item.request || (begin.request == item.request && begin.item <= item.item);
  const bool reaches = is_part && schedule::is_before(item, end);  // past the item's first cell
  const bool is_inside = begin.request == item.request && begin.item == item.item && begin.block > 0;
  const bool is_empty = is_inside && end.request == item.request && end.item == item.item && end.block == begin.block;
  const int first = __syncthreads_count(is_part && !reaches);
  if (reaches && begins_in_time) s_slots[thread - first] = is_empty ? kNoPiece : 2 * thread + (is_inside ? 0 : 1);
  return __syncthreads_count(reaches && begins_in_time);
}

// A merge in progress, of this lane's four floats in kTiles tiles: weights and O relative to the maximum of each of its two rows.
template <int kTiles>
struct Merge {
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};
  float4 o[kTiles] = {};

  // Makes room for partials of at most these lse; weights of what is there shrink.
  __device__ __forceinline__ void raise(const float (&lse)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float raised = fmaxf(maximum[r], lse[r]);
      const float factor = raised == maximum[r] ? 1.0f : math::merge_weight(maximum[r], raised);
      maximum[r] = raised;
      sum[r] *= factor;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        if (r == 0)
          o[t] = {o[t].x * factor, o[t].y * factor, o[t].z, o[t].w};
        else
          o[t] = {o[t].x, o[t].y, o[t].z * factor, o[t].w * factor};
      }
    }
  }
  __device__ __forceinline__ void add(const float (&weight)[2], const float4 (&partial)[kTiles]) {
    sum[0] += weight[0];
    sum[1] += weight[1];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      o[t] = {fmaf(weight[0], partial[t].x, o[t].x), fmaf(weight[0], partial[t].y, o[t].y),
              fmaf(weight[1], partial[t].z, o[t].z), fmaf(weight[1], partial[t].w, o[t].w)};
    }
  }
};

// Adds the partials slots[first], slots[first + stride], ... below count; kAtOnce of them are loaded together.
template <int kTiles, int kAtOnce>
__device__ __forceinline__ void merge_slots(const ResultParams& result, const int32_t* slots, int first, int stride,
                                            int count, int strip, int tile, int lane, Merge<kTiles>& m) {
#pragma unroll 1
  for (int i = first; i < count; i += stride * kAtOnce) {
    float lse[kAtOnce][2];
    float4 o[kAtOnce][kTiles];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int32_t slot = i + u * stride < count ? slots[i + u * stride] : kNoPiece;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = strip * PartialLayout::kStripRows + lane / 4 + 8 * r;
        lse[u][r] = slot >= 0          ? result.partial_lse[result.partial.lse_offset(slot, row)]
                    : slot == kDropped ? NAN
                                       : -INFINITY;
      }
      const float* source = result.partial_out + result.partial.out_offset(slot, strip, tile, lane);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        o[u][t] = slot >= 0 ? *reinterpret_cast<const float4*>(source + t * PartialLayout::kTileFloats) : float4{};
      }
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      m.raise(lse[u]);
      const float weight[2] = {math::merge_weight(lse[u][0], m.maximum[0]),
                               math::merge_weight(lse[u][1], m.maximum[1])};
      m.add(weight, o[u]);
    }
  }
}

// What the warps that share a tile pass to the first of them.
struct SharedMerge {
  float4 o[kCombineWarps][32];
  float4 state[kCombineWarps][32];  // maximum and sum of two rows
};

// m of a group's warps into m of its first warp.
__device__ __forceinline__ void join_warps(SharedMerge& s, int warp, int lane, int warps_of_tile, Merge<1>& m) {
  s.o[warp][lane] = m.o[0];
  s.state[warp][lane] = {m.maximum[0], m.maximum[1], m.sum[0], m.sum[1]};
  __syncthreads();
  if (warp % warps_of_tile != 0) return;
#pragma unroll 1
  for (int w = warp + 1; w < warp + warps_of_tile; ++w) {
    const float4 state = s.state[w][lane], o = s.o[w][lane];
    const float maximum[2] = {state.x, state.y};
    m.raise(maximum);
    // A warp without partials has sum 0 and O 0; a NaN comes along in the sum.
    const float weight[2] = {state.x == m.maximum[0] ? 1.0f : exp2f(state.x - m.maximum[0]),
                             state.y == m.maximum[1] ? 1.0f : exp2f(state.y - m.maximum[1])};
    m.sum[0] += weight[0] * state.z;
    m.sum[1] += weight[1] * state.w;
    m.o[0] = {fmaf(weight[0], o.x, m.o[0].x), fmaf(weight[0], o.y, m.o[0].y), fmaf(weight[1], o.z, m.o[0].z),
              fmaf(weight[1], o.w, m.o[0].w)};
  }
}

template <DType kDType, int kTiles>
__device__ __forceinline__ void finish_strip(const CombineParams& p, const Work& work, int32_t rows, int strip,
                                             int tile, int lane, const Merge<kTiles>& m) {
#pragma unroll 1
  for (int r = 0; r < 2; ++r) {
    const int32_t item_row = strip * PartialLayout::kStripRows + lane / 4 + 8 * r;
    if (item_row >= rows) return;
    const int32_t row = work.first_row + item_row;
    const float sum = r == 0 ? m.sum[0] : m.sum[1];
    const float lse_log2 = math::merged_lse(r == 0 ? m.maximum[0] : m.maximum[1], sum);
    const float factor = math::safe_reciprocal(sum) *
                         finish_whole_row(p.result, p.config, work, row, lse_log2, tile == 0 && lane % 4 == 0);
    const int64_t offset =
        row_offset(p.result.out, p.result, p.config.heads_per_kv_head, work, row) + tile * PartialLayout::kTileColumns;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const float low = r == 0 ? m.o[t].x : m.o[t].z, high = r == 0 ? m.o[t].y : m.o[t].w;
      store_pair<kDType>(p.result.out.data, offset + t * PartialLayout::kTileColumns + lane % 4 * 2,
                         p.result.is_out_fp32, factor == 0.0f ? 0.0f : low * factor,
                         factor == 0.0f ? 0.0f : high * factor);
    }
  }
}

// Grid (items or parts, CTAs for each). kTiles: of a warp; 1: p.warps_of_tile warps share one.
template <DType kDType, int kTiles>
__global__ void __launch_bounds__(kCombineThreads, kTiles == 1 ? 4 : 3)
    combine_kernel(const __grid_constant__ CombineParams p) {
  __shared__ int32_t s_slots[kCombineThreads];
  __shared__ SharedMerge s_merge;
  // I4: decode waited for the schedule before it let this kernel start, so the schedule may be read before the wait.
  const schedule::ConstView view(p.schedule, p.layout);
  const schedule::Boundary item = item_of_block(p, view);
  int count = item.request < p.batch ? list_slots(p, view, item, 0, s_slots) : 0;
  ptx::griddepcontrol_launch_dependents();
  // I10: the first CTA waits in any case, so that this kernel does not end before decode. Others with nothing to do make room at once.
  if (count < 2 && (blockIdx.x > 0 || blockIdx.y > 0)) return;
  ptx::griddepcontrol_wait();
  if (count < 2) return;
  Work work{item.request,
            0,
            0,
            0,
            p.q_len,
            0,
            item.item / p.config.kv_heads * p.config.item_rows,
            item.item % p.config.kv_heads,
            kWholeItem};
  if (p.result.is_ragged) {
    work.q_tokens = view.q_tokens(item.request);
    work.q_begin = view.q_begin()[item.request];
  }
  const int32_t rows = min(p.config.item_rows, work.q_tokens * p.config.heads_per_kv_head - work.first_row);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warps_of_tile = kTiles == 1 ? p.warps_of_tile : 1;
  const int first_tile = (blockIdx.y * kCombineWarps + warp) / warps_of_tile * kTiles;
  const int strip = first_tile / PartialLayout::kTiles, tile = first_tile % PartialLayout::kTiles;
  const bool has_rows = strip * PartialLayout::kStripRows < rows;
  Merge<kTiles> m;
  for (int64_t round = 0;;) {
    if (has_rows)
      merge_slots<kTiles, kTiles == 1 ? 4 : 1>(p.result, s_slots, warp % warps_of_tile, warps_of_tile, count, strip,
                                               tile, lane, m);
    if (count < kCombineThreads) break;
    round += kCombineThreads;
    __syncthreads();
    count = list_slots(p, view, item, round, s_slots);
  }
  if constexpr (kTiles == 1) {
    join_warps(s_merge, warp, lane, warps_of_tile, m);
    if (warp % warps_of_tile != 0) return;
  }
  if (has_rows) finish_strip<kDType>(p, work, rows, strip, tile, lane, m);
}

}  // namespace mla::cuda::sm90
