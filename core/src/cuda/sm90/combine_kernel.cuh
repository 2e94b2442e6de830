// Joins the partial results of every item that was cut into pieces, in the order of the cuts, and finishes its rows.
//
// The unit of work is a few tiles of one strip (16 rows), see layout/partial.h. Where there are many items, each is cut into few pieces,
// and a warp takes kCombineTiles tiles. Where there are few items (small batches), up to a whole CTA shares the pieces of one tile, so
// that enough loads are in flight. Small batches wait for this kernel, so it is short: divisors come from the host, and there are two rounds of
// loads.
#pragma once

#include "cuda/sm90/epilogue.cuh"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/ptx/pdl.cuh"

namespace mla::cuda::sm90 {

using layout::PartialLayout;
using layout::PartialState;

// Two neighbours of the schedule's boundaries, each read by one instruction.
struct PartRange {
  schedule::Boundary begin, end;

  __device__ __forceinline__ PartRange(const schedule::ConstView& view, int32_t part)
      : begin(read(view.boundary() + part)), end(read(view.boundary() + part + 1)) {}

 private:
  __device__ __forceinline__ static schedule::Boundary read(const schedule::Boundary* at) {
    const int4 v = *reinterpret_cast<const int4*>(at);
    return {v.x, v.y, v.z, v.w};
  }
};

__device__ __forceinline__ bool is_same_item(const schedule::Boundary& a, const schedule::Boundary& b) {
  return a.request == b.request && a.item == b.item;
}

// Cell 0 of the item that blockIdx.x stands for, see CombineParams; request = batch: none.
__device__ __forceinline__ schedule::Boundary item_of_block(const CombineParams& p, const schedule::ConstView& view) {
  if (p.is_by_item) {
    const int32_t item = static_cast<int32_t>(blockIdx.x), request = p.items_per_request.quotient(item);
    return {request, p.items_per_request.remainder(item, request), 0, 0};
  }
  const PartRange part(view, static_cast<int32_t>(blockIdx.x));
  const bool is_first_cut = part.end.block > 0 && !(is_same_item(part.begin, part.end) && part.begin.block > 0);
  return is_first_cut && part.end.request < p.batch ? schedule::Boundary{part.end.request, part.end.item, 0, 0}
                                                    : schedule::Boundary{p.batch, 0, 0, 0};
}

// What one round of a list of slots shares between the warps.
struct SlotList {
  int32_t slots[kCombineThreads];
  int32_t before[kCombineWarps];  // balanced: pieces that each warp found
};

// fixed_chunk: the slots of the item's pieces in order, from number `round` on, as many as the CTA has threads; returns how many. Every thread
// calls this, and the next one.
__device__ __forceinline__ int list_chunks(const CombineParams& p, const schedule::ConstView& view,
                                           const schedule::Boundary& item, int64_t round, SlotList& list) {
  const int32_t thread = threadIdx.x;
  if (item.request >= view.header()->batch) return 0;
  const int32_t chunks = p.config.chunks(view.len()[item.request]);
  const int64_t slot = view.slot_prefix()[item.request] + int64_t{item.item} * chunks + round + thread;
  list.slots[thread] = slot < p.config.slots ? static_cast<int32_t>(slot) : kDropped;
  return __syncthreads_count(round + thread < chunks);
}

// balanced: all of them; part is this thread's (a plan has no more parts). Parts that came out empty are left out.
__device__ __forceinline__ int list_parts(const CombineParams& p, const PartRange& part, const schedule::Boundary& item,
                                          SlotList& list) {
  const int32_t thread = threadIdx.x;
  const bool begins_in_item = is_same_item(part.begin, item), is_inside = begins_in_item && part.begin.block > 0;
  const bool is_empty = is_inside && is_same_item(part.end, item) && part.end.block == part.begin.block;
  // Past the item's first cell, and not behind the item.
  const bool reaches = thread < p.config.parts && schedule::is_before(item, part.end);
  const bool is_piece = reaches && !is_empty && (begins_in_item || schedule::is_before(part.begin, item));
  const unsigned of_warp = __ballot_sync(ptx::kWholeWarp, is_piece);
  const int warp = thread / 32, lane = thread % 32;
  if (lane == 0) list.before[warp] = __popc(of_warp);
  __syncthreads();
  int at = __popc(of_warp & ((1u << lane) - 1)), count = 0;
#pragma unroll
  for (int w = 0; w < kCombineWarps; ++w) {
    if (w < warp) at += list.before[w];
    count += list.before[w];
  }
  if (is_piece) list.slots[at] = 2 * thread + (is_inside ? 0 : 1);
  __syncthreads();
  return count;
}

// 2^(of_partial - maximum), and 0 for one of -inf, whatever the maximum.
__device__ __forceinline__ float weight_of(float of_partial, float maximum) {
  return ptx::ex2_approx(of_partial - (maximum == -INFINITY ? 0.0f : maximum));
}

// A merge in progress, of this lane's four floats in kTiles tiles: sums and O relative to the maximum of each of its two rows. The four
// lanes of a row all do its sums: nothing is passed between lanes, because nvcc cannot see that a warp is together in the loop, and spends
// 150 instructions on each synchronisation there.
template <int kTiles>
struct Merge {
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};
  float4 o[kTiles] = {};

  // Makes room for partials of at most these maxima.
  __device__ __forceinline__ void raise(const float (&largest)[2]) {
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float raised = fmaxf(maximum[r], largest[r]);
      factor[r] = weight_of(maximum[r], raised);
      maximum[r] = raised;
      sum[r] *= factor[r];
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
      o[t] = {o[t].x * factor[0], o[t].y * factor[0], o[t].z * factor[1], o[t].w * factor[1]};
  }
  __device__ __forceinline__ void add(const PartialState (&state)[2], const float4 (&partial)[kTiles]) {
    const float weight[2] = {weight_of(state[0].maximum, maximum[0]), weight_of(state[1].maximum, maximum[1])};
    sum[0] = fmaf(weight[0], state[0].sum, sum[0]);
    sum[1] = fmaf(weight[1], state[1].sum, sum[1]);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      o[t] = {fmaf(weight[0], partial[t].x, o[t].x), fmaf(weight[0], partial[t].y, o[t].y),
              fmaf(weight[1], partial[t].z, o[t].z), fmaf(weight[1], partial[t].w, o[t].w)};
    }
  }
};

// Adds the partials slots[first], slots[first + stride], ... below count; kAtOnce of them are loaded together. Waits for decode when it knows
// where the first ones are.
template <int kTiles, int kAtOnce>
__device__ __forceinline__ void merge_slots(const ResultParams& result, const int32_t* slots, int first, int stride,
                                            int count, int strip, int tile, int lane, Merge<kTiles>& m) {
  constexpr int32_t kNoPiece = -1;
  const PartialState* const state_of_row =
      result.partial_state + result.partial.row_offset(0, strip * PartialLayout::kStripRows + lane / 4);
  const float* const out_of_lane = result.partial_out + result.partial.out_offset(0, strip, tile, lane);
  const uint32_t rows_of_slot = static_cast<uint32_t>(result.partial.rows()),
                 out_floats = static_cast<uint32_t>(result.partial.out_floats());
#pragma unroll 1
  for (int i = first; i < count; i += stride * kAtOnce) {
    int32_t slot[kAtOnce];
    const PartialState* row[kAtOnce];
    const float* source[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      slot[u] = i + u * stride < count ? slots[i + u * stride] : kNoPiece;
      row[u] = state_of_row + uint64_t{static_cast<uint32_t>(slot[u])} * rows_of_slot;
      source[u] = out_of_lane + uint64_t{static_cast<uint32_t>(slot[u])} * out_floats;
    }
    ptx::griddepcontrol_wait();
    PartialState state[kAtOnce][2];
    float4 o[kAtOnce][kTiles];
    float largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      state[u][0] = state[u][1] = {-INFINITY, slot[u] == kDropped ? NAN : 0.0f};
#pragma unroll
      for (int t = 0; t < kTiles; ++t) o[u][t] = {};
      if (slot[u] >= 0) {
        state[u][0] = row[u][0];
        state[u][1] = row[u][8];
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
          o[u][t] = *reinterpret_cast<const float4*>(source[u] + t * PartialLayout::kTileFloats);
      }
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      largest[0] = fmaxf(largest[0], state[u][0].maximum);
      largest[1] = fmaxf(largest[1], state[u][1].maximum);
    }
    m.raise(largest);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) m.add(state[u], o[u]);
  }
}

// What the warps that share a tile pass to the first of them.
struct SharedMerge {
  float4 o[kCombineWarps][32];
  PartialState state[kCombineWarps][32][2];
};

// m of a group's warps into m of its first warp. A warp without partials has sum 0 and O 0; a NaN comes along in the sum.
__device__ __forceinline__ void join_warps(SharedMerge& s, int warp, int lane, int warps_of_tile, Merge<1>& m) {
  s.o[warp][lane] = m.o[0];
  s.state[warp][lane][0] = {m.maximum[0], m.sum[0]};
  s.state[warp][lane][1] = {m.maximum[1], m.sum[1]};
  __syncthreads();
  if ((warp & (warps_of_tile - 1)) != 0) return;
  float largest[2] = {-INFINITY, -INFINITY};
#pragma unroll 4
  for (int w = warp + 1; w < warp + warps_of_tile; ++w) {
    largest[0] = fmaxf(largest[0], s.state[w][lane][0].maximum);
    largest[1] = fmaxf(largest[1], s.state[w][lane][1].maximum);
  }
  m.raise(largest);
#pragma unroll 4
  for (int w = warp + 1; w < warp + warps_of_tile; ++w) {
    const PartialState state[2] = {s.state[w][lane][0], s.state[w][lane][1]};
    const float4 o[1] = {s.o[w][lane]};
    m.add(state, o);
  }
}

// Where the two rows of a lane go: found before the wait for decode, as it depends on nothing that decode writes.
struct RowTargets {
  int64_t out[2];  // < 0: there is no such row
  float* lse[2];   // nullptr: not this lane's, or not wanted
  float sink[2];   // in base 2

  __device__ __forceinline__ RowTargets(const CombineParams& p, const Work& work, int32_t rows, int strip, int tile,
                                        int lane) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int32_t item_row = strip * PartialLayout::kStripRows + lane / 4 + 8 * r;
      const int32_t row = work.first_row + item_row;
      out[r] = -1;
      lse[r] = nullptr;
      sink[r] = 0.0f;
      if (item_row >= rows) continue;
      out[r] = row_offset(p.result.out, p.result, work, row) + tile * PartialLayout::kTileColumns + lane % 4 * 2;
      if (tile == 0 && lane % 4 == 0 && p.result.lse.data != nullptr)
        lse[r] = static_cast<float*>(p.result.lse.data) + row_offset(p.result.lse, p.result, work, row);
      if (p.result.sink != nullptr) sink[r] = sink_of_row(p.result, work, row);
    }
  }
};

// The rows take turns in one piece of code: what runs once costs more to fetch than to execute.
template <DType kDType, int kTiles>
__device__ __forceinline__ void finish_strip(const ResultParams& result, const RowTargets& to, const Merge<kTiles>& m) {
#pragma unroll 1
  for (int r = 0; r < 2; ++r) {
    const int64_t out = r == 0 ? to.out[0] : to.out[1];
    if (out < 0) return;  // nor is there a row behind it
    const float sum = r == 0 ? m.sum[0] : m.sum[1];
    float* const lse = r == 0 ? to.lse[0] : to.lse[1];
    float factor = sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);  // a sum is at least the 1 of its largest score
    if (lse != nullptr || result.sink != nullptr) {
      const float lse_log2 = math::merged_lse(r == 0 ? m.maximum[0] : m.maximum[1], sum);
      if (lse != nullptr) *lse = lse_log2 * result.lse_unit;
      if (result.sink != nullptr) factor *= math::sink_factor(lse_log2, r == 0 ? to.sink[0] : to.sink[1]);
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const float low = r == 0 ? m.o[t].x : m.o[t].z, high = r == 0 ? m.o[t].y : m.o[t].w;
      store_pair<kDType>(result.out.data, out + t * PartialLayout::kTileColumns, result.is_out_fp32,
                         factor == 0.0f ? 0.0f : low * factor, factor == 0.0f ? 0.0f : high * factor);
    }
  }
}

// Grid (items or parts, CTAs for each). kTiles: of a warp; 1: p.warps_of_tile warps share one.
template <DType kDType, int kTiles>
__global__ void __launch_bounds__(kCombineThreads, 2) combine_kernel(const __grid_constant__ CombineParams p) {
  __shared__ SlotList s_list;
  __shared__ SharedMerge s_merge;
  ptx::griddepcontrol_launch_dependents();
  // I4: decode waited for what came before it, so the schedule and the call's inputs may be read before the wait.
  const schedule::ConstView view(p.schedule, p.layout);
  const bool is_chunked = p.config.chunk_blocks > 0;
  const PartRange part(view, min(static_cast<int32_t>(threadIdx.x), p.config.parts - 1));  // under way meanwhile
  const schedule::Boundary item = item_of_block(p, view);
  int count = 0;
  if (item.request < p.batch)
    count = is_chunked ? list_chunks(p, view, item, 0, s_list) : list_parts(p, part, item, s_list);
  count = __shfl_sync(ptx::kWholeWarp, count, 0);
  if (count < 2) {
    // I10: the first CTA waits in any case, so that this kernel does not end before decode. Others with nothing to do make room at once.
    if (blockIdx.x == 0 && blockIdx.y == 0) ptx::griddepcontrol_wait();
    return;
  }
  const int32_t row_group = p.kv_heads.quotient(item.item);
  Work work{};
  work.request = item.request;
  work.q_tokens = p.q_len;
  work.first_row = row_group * p.config.item_rows;
  work.kv_head = p.kv_heads.remainder(item.item, row_group);
  if (p.result.is_ragged) {
    work.q_tokens = view.q_tokens(item.request);
    work.q_begin = view.q_begin()[item.request];
  }
  const int32_t rows = min(p.config.item_rows, work.q_tokens * p.config.heads_per_kv_head - work.first_row);
  const int warp = __shfl_sync(ptx::kWholeWarp, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int warps_of_tile = kTiles == 1 ? 1 << p.log2_warps_of_tile : 1, of_tile = warp & (warps_of_tile - 1);
  const int first_tile =
      kTiles * static_cast<int>(blockIdx.y * kCombineWarps + warp >> (kTiles == 1 ? p.log2_warps_of_tile : 0));
  const int strip = first_tile / PartialLayout::kTiles, tile = first_tile % PartialLayout::kTiles;
  const bool has_rows = strip * PartialLayout::kStripRows < rows;
  const RowTargets targets(p, work, has_rows ? rows : 0, strip, tile, lane);
  Merge<kTiles> m;
  for (int64_t round = 0;;) {
    if (!has_rows) {
      ptx::griddepcontrol_wait();  // I10
    } else {
      merge_slots<kTiles, kTiles == 1 ? 4 : 2>(p.result, s_list.slots, of_tile, warps_of_tile, count, strip, tile, lane,
                                               m);
    }
    if (!is_chunked || count < kCombineThreads) break;
    round += kCombineThreads;
    __syncthreads();
    count = list_chunks(p, view, item, round, s_list);
  }
  if constexpr (kTiles == 1) {
    join_warps(s_merge, warp, lane, warps_of_tile, m);
    if (of_tile != 0) return;
  }
  finish_strip<kDType>(p.result, targets, m);
}

}  // namespace mla::cuda::sm90
