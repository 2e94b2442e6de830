// Lengths -> schedule on the device, by one CTA: the same bytes as schedule/build.h gives, after clamping what the host cannot see.
#pragma once

#include "cuda/sm90/config.h"
#include "cuda/sm90/params.h"
#include "cuda/sm90/ptx/common.cuh"
#include "cuda/sm90/ptx/pdl.cuh"

namespace mla::cuda::sm90 {

inline constexpr int kScheduleWarps = kScheduleThreads / 32;
inline constexpr int kPrefixInShared = 2048;  // requests whose cost prefix is searched in shared memory

struct Add {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

// Inclusive scan over the CTA, in thread order; total gets the last thread's. s_warp: kScheduleWarps values, free again on return.
template <class T, class Op>
__device__ T block_scan(T x, Op op, T* s_warp, T& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const T below = __shfl_up_sync(ptx::kWholeWarp, x, d);
    if (lane >= d) x = op(below, x);
  }
  if (lane == 31) s_warp[warp] = x;
  __syncthreads();
  T before{};
#pragma unroll
  for (int w = 0; w < kScheduleWarps; ++w) {
    const T sum = s_warp[w];
    if (w == 0)
      total = sum;
    else
      total = op(total, sum);
    if (w < warp) before = w == 0 ? sum : op(before, sum);
  }
  __syncthreads();
  return warp == 0 ? x : op(before, x);
}

// The request whose stretch of the line holds the position: the first r with prefix[r + 1] > position, or batch.
__device__ inline int32_t request_at(const int64_t* prefix, int32_t batch, int64_t position) {
  int32_t begin = 0, end = batch;
  while (begin < end) {
    const int32_t middle = (begin + end) / 2;
    if (prefix[middle + 1] <= position)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

__global__ void __launch_bounds__(kScheduleThreads, 1) schedule_kernel(const __grid_constant__ ScheduleParams p) {
  __shared__ int64_t s_warp64[kScheduleWarps];
  __shared__ int32_t s_warp32[kScheduleWarps];
  __shared__ int64_t s_prefix[kPrefixInShared + 1];
  const schedule::View view(p.schedule, p.layout);
  const int32_t thread = threadIdx.x;
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();

  int64_t cost = 0, slots = 0;  // of all requests before this round's
  int32_t q_end_before = 0;
  for (int32_t base = 0; base < p.batch; base += kScheduleThreads) {
    const int32_t r = base + thread;
    const bool is_request = r < p.batch;
    const int64_t given_len = is_request ? p.cache_seqlens.data[r * p.cache_seqlens.stride] : 0;
    const int32_t len =
        given_len < 0 || given_len > p.max_len ? schedule::kInvalidLen : static_cast<int32_t>(given_len);
    int32_t q_begin = r * p.q_len, q_end = q_begin + p.q_len;
    if (p.cu_seqlens_q.data != nullptr) {
      const int64_t given_end = is_request ? p.cu_seqlens_q.data[(r + 1) * p.cu_seqlens_q.stride] : 0;
      const int32_t end = static_cast<int32_t>(given_end < 0                ? 0
                                               : given_end > p.max_q_tokens ? p.max_q_tokens
                                                                            : given_end);
      int32_t total_end;
      q_end = max(block_scan(end, Max{}, s_warp32, total_end), q_end_before);
      __shared__ int32_t s_end[kScheduleThreads];
      s_end[thread] = q_end;
      __syncthreads();
      q_begin = thread == 0 ? q_end_before : s_end[thread - 1];
      __syncthreads();
      q_end_before = max(q_end_before, total_end);
    }
    const int64_t my_cost = is_request ? p.config.request_cost(len, q_end - q_begin) : 0;
    const int64_t my_slots = is_request ? p.config.request_slots(len, q_end - q_begin) : 0;
    int64_t round_cost, round_slots = 0;
    const int64_t cost_end = cost + block_scan(my_cost, Add{}, s_warp64, round_cost);
    const int64_t slots_end =
        slots + (p.config.chunk_blocks > 0 ? block_scan(my_slots, Add{}, s_warp64, round_slots) : 0);
    if (is_request) {
      view.len()[r] = len;
      view.q_begin()[r + 1] = q_end;
      view.cost_prefix()[r + 1] = cost_end;
      view.slot_prefix()[r + 1] = slots_end;
      if (r < kPrefixInShared) s_prefix[r + 1] = cost_end;
    }
    cost += round_cost;
    slots += round_slots;
  }
  if (thread == 0) {
    s_prefix[0] = 0;
    view.q_begin()[0] = 0;
    view.cost_prefix()[0] = 0;
    view.slot_prefix()[0] = 0;
  }
  __syncthreads();

  const int64_t* prefix = p.batch <= kPrefixInShared ? s_prefix : view.cost_prefix();
  for (int32_t part = thread; part <= p.config.parts; part += kScheduleThreads) {
    const int64_t position = schedule::part_position(part, p.config.parts, cost);
    const int32_t request = part == p.config.parts ? p.batch : request_at(prefix, p.batch, position);
    view.boundary()[part] =
        request >= p.batch ? schedule::Boundary{p.batch, 0, 0, 0}
                           : schedule::boundary_in_request(p.config, request, position - prefix[request],
                                                           view.len()[request], p.config.items(view.q_tokens(request)));
  }
  if (thread == 0) {
    schedule::Header* header = view.header();
    header->magic = schedule::kMagic;
    header->batch = p.batch;
    header->parts = p.config.parts;
    header->plan_key = p.config.plan_key;
    header->total_cost = cost;
    header->q_tokens = view.q_begin()[p.batch];
  }
}

}  // namespace mla::cuda::sm90
