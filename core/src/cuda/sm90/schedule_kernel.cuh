// Lengths -> schedule on the device, by one CTA: the same bytes as schedule/build.h gives, after clamping what the host cannot see.
//
// One CTA has nothing that hides a latency, so what counts is the longest chain: what follows from the parameters is done before the wait,
// the sums are 32 bits wide where they fit, what is read again is read from shared memory, and a barrier is shared by all that needs one.
#pragma once

#include "cuda/sm90/config.h"
#include "cuda/sm90/params.h"
#include "cuda/sm90/ptx/common.cuh"
#include "cuda/sm90/ptx/pdl.cuh"
#include "schedule/even_split.h"
#include "schedule/whole.h"

namespace mla::cuda::sm90 {

inline constexpr int kScheduleWarps = kScheduleThreads / 32;
inline constexpr int kPrefixInShared = 2048;  // requests whose cost prefix and length are read from shared memory
static_assert(kScheduleThreads >=
              kCombineThreads);  // a thread for each part, of which a plan has at most kCombineThreads
static_assert(kPrefixInShared >= schedule::kMostPacked);

struct ScheduleShared {
  int64_t warp_cost[2][kScheduleWarps];
  int64_t warp_slots[2][kScheduleWarps];
  int32_t warp_q_end[2][kScheduleWarps];
  int64_t prefix[kPrefixInShared + 1];
  int32_t len[kPrefixInShared];
  int32_t begin[kScheduleThreads + 1];         // of each part, a request
  int16_t next[2][schedule::kMostPacked + 1];  // where the part ends that begins at a request
};

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

template <class T>
struct Scanned {
  T inclusive;
  T exclusive;
  T total;
};

// Scan over the CTA in thread order, of values that are not negative; one barrier. s_warp: kScheduleWarps values, not to be written again
// before another barrier has passed.
template <class T, class Op>
__device__ __forceinline__ Scanned<T> block_scan(T x, Op op, T* s_warp) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const T below = __shfl_up_sync(ptx::kWholeWarp, x, d);
    if (lane >= d) x = op(below, x);
  }
  if (lane == 31) s_warp[warp] = x;
  const T left = __shfl_up_sync(ptx::kWholeWarp, x, 1);
  __syncthreads();
  T before = 0, total = 0;
#pragma unroll
  for (int w = 0; w < kScheduleWarps; ++w) {
    if (w == warp) before = total;
    total = op(total, s_warp[w]);
  }
  return {op(before, x), lane == 0 ? before : op(before, left), total};
}

// The request whose stretch of the line holds the position: the first r with prefix[r + 1] > position, or batch. Without a branch.
template <class T>
__device__ __forceinline__ int32_t request_at(const T* prefix, int32_t batch, T position) {
  int32_t request = 0;
#pragma unroll 1
  for (int32_t step = batch == 0 ? 0 : 1 << (31 - __clz(batch)); step > 0; step /= 2) {
    const int32_t next = request + step;
    request = next <= batch && prefix[next] <= position ? next : request;
  }
  return request;
}

// The costs of a batch as the second half of the kernel sees them.
template <class Cost>
struct Costs {
  schedule::Config config;
  const schedule::View& view;
  const Cost* prefix;  // in shared memory; or:
  const int64_t* far_prefix;
  const int32_t* len;
  int32_t batch;
  Cost total;
  int64_t items;  // of every request; -1: queries are ragged

  __device__ __forceinline__ Cost before(int32_t request) const {
    return prefix != nullptr ? prefix[request] : static_cast<Cost>(far_prefix[request]);
  }
  __device__ __forceinline__ int32_t request_at(Cost position) const {
    return prefix != nullptr ? sm90::request_at(prefix, batch, position)
                             : sm90::request_at<int64_t>(far_prefix, batch, position);
  }
};

// packed of whole.h, for a batch that shared memory holds: every request's next one, then 1, 2, 4, ... parts at once. Where this thread's
// part begins; every thread calls this, with its barriers.
template <class Cost>
__device__ __forceinline__ int32_t packed_begin(const Costs<Cost>& costs, Cost limit, int32_t part, ScheduleShared& s) {
  const int32_t thread = threadIdx.x, batch = costs.batch;
  for (int32_t r = thread; r <= batch; r += kScheduleThreads)
    s.next[0][r] = static_cast<int16_t>(costs.request_at(costs.before(r) + limit));
  int32_t begin = 0;
#pragma unroll 1
  for (int32_t bit = 1, now = 0; bit < costs.config.parts; bit *= 2, now ^= 1) {
    __syncthreads();
    const int16_t* next = s.next[now];
    if ((part & bit) != 0) begin = next[begin];
    for (int32_t r = thread; r <= batch; r += kScheduleThreads) s.next[now ^ 1][r] = next[next[r]];
  }
  return begin;
}

// even_split.h, for no more requests than threads. Sets at to where this thread's part begins, or returns false; every thread calls this.
template <class Cost>
__device__ __forceinline__ bool split_evenly(const Costs<Cost>& costs, uint32_t share, ScheduleShared& s,
                                             schedule::Boundary& at) {
  const int32_t thread = threadIdx.x, batch = costs.batch;
  const uint32_t parts = static_cast<uint32_t>(costs.config.parts);
  const auto blocks_of = [&](int32_t r) { return static_cast<uint32_t>(costs.config.blocks(costs.len[r])); };
  uint32_t of_request = 0;  // parts; more than there are: parts + 1
  if (thread < batch) {
    const int64_t items = costs.items >= 0 ? costs.items : costs.config.items(costs.view.q_tokens(thread));
    const uint32_t pieces = schedule::split_pieces(blocks_of(thread), share);
    of_request = items > parts || pieces > parts ? parts + 1 : min(static_cast<uint32_t>(items) * pieces, parts + 1);
  }
  const Scanned<uint32_t> ends = block_scan(of_request, Add{}, reinterpret_cast<uint32_t*>(s.warp_slots[0]));
  if (ends.total > parts) return false;
  int32_t* const s_end = s.begin;  // s_end[r + 1]: of request r, in parts
  if (thread == 0) s_end[0] = 0;
  if (thread < batch) s_end[thread + 1] = static_cast<int32_t>(ends.inclusive);
  __syncthreads();
  const int32_t request = request_at<int32_t>(s_end, batch, thread);
  at = {batch, 0, 0, 0};
  if (request < batch) {
    const uint32_t n = blocks_of(request);
    at = schedule::split_boundary(request, thread - s_end[request], static_cast<int32_t>(n),
                                  static_cast<int32_t>(schedule::split_pieces(n, share)));
  }
  return true;
}

template <class Cost>
__device__ __forceinline__ void set_boundaries(const Costs<Cost>& costs, bool may_be_whole, Cost limit,
                                               ScheduleShared& s) {
  const schedule::Config& config = costs.config;
  const int32_t part = threadIdx.x, batch = costs.batch;
  const bool is_part = part < config.parts;
  bool is_whole = may_be_whole && batch <= config.parts;
  int32_t begin = min(part, batch), request = batch;  // begin: where the part begins if no request is cut
  Cost position = 0, before = 0;
  if (!is_whole) {
    position = static_cast<Cost>(part) * costs.total / static_cast<Cost>(config.parts);
    request = is_part ? costs.request_at(position) : batch;
    before = costs.before(request);
    if (may_be_whole) {
      begin = request < batch ? schedule::nearest_edge(request, before, costs.before(request + 1), position) : batch;
      s.begin[part] = begin;
      if (part == kScheduleThreads - 1) s.begin[kScheduleThreads] = batch;
      __syncthreads();
      is_whole = __syncthreads_and(costs.before(s.begin[part + 1]) - costs.before(begin) <= limit) != 0;
      if (!is_whole && batch <= schedule::kMostPacked) {
        begin = packed_begin(costs, limit, part, s);
        is_whole = __syncthreads_and(part != config.parts - 1 || costs.total - costs.before(begin) <= limit) != 0;
      }
    }
  }
  schedule::Boundary at;
  if (!is_whole && config.splits_evenly && config.chunk_blocks == 0 && batch <= config.parts) {
    const Cost share = schedule::even_share(config, costs.total);
    if (share <= INT32_MAX && split_evenly(costs, static_cast<uint32_t>(share), s, at)) {
      if (is_part) costs.view.boundary()[part] = at;
      return;
    }
  }
  if (!is_part) return;
  costs.view.boundary()[part] =
      is_whole ? schedule::Boundary{begin, 0, 0, 0}
      : request == batch
          ? schedule::Boundary{batch, 0, 0, 0}
          : schedule::boundary_in_request(config, request, position - before,
                                          costs.prefix != nullptr ? costs.len[request] : costs.view.len()[request],
                                          costs.items >= 0 ? costs.items : config.items(costs.view.q_tokens(request)));
}

template <int kBlockTokens, class Cost>
__device__ __forceinline__ void make_schedule(const ScheduleParams& p, const schedule::View& view, ScheduleShared& s) {
  const int32_t thread = threadIdx.x;
  const bool is_ragged = p.cu_seqlens_q.data != nullptr;
  Cost* const s_prefix = reinterpret_cast<Cost*>(s.prefix);
  schedule::Config config = p.config;
  config.block_tokens = kBlockTokens;  // as the compiler should know
  int64_t uniform_items = config.items(p.q_len);
  asm volatile("" : "+l"(uniform_items));  // computed here, not behind the wait
  ptx::griddepcontrol_wait();
  // Decode may start now, and shall not guess by an old schedule. The thread is the one that writes the header.
  if (thread == kScheduleThreads - 1) view.header()->magic = 0;
  ptx::griddepcontrol_launch_dependents();

  Cost cost = 0, longest = 0;
  int64_t slots = 0;  // like cost, of all requests before this round's
  int32_t q_end_before = 0;
  for (int32_t base = 0, round = 0; base < p.batch; base += kScheduleThreads, round ^= 1) {
    const int32_t r = base + thread;
    const bool is_request = r < p.batch;
    const int64_t given_len = is_request ? p.cache_seqlens.data[r * p.cache_seqlens.stride] : 0;
    const int32_t len =
        given_len < 0 || given_len > p.max_len ? schedule::kInvalidLen : static_cast<int32_t>(given_len);
    int32_t q_end = (r + 1) * p.q_len;
    int64_t items = uniform_items;
    if (is_ragged) {
      const int64_t given_end = is_request ? p.cu_seqlens_q.data[(r + 1) * p.cu_seqlens_q.stride] : 0;
      const int32_t end = static_cast<int32_t>(given_end < 0                ? 0
                                               : given_end > p.max_q_tokens ? p.max_q_tokens
                                                                            : given_end);
      const Scanned<int32_t> ends = block_scan(end, Max{}, s.warp_q_end[round]);
      q_end = max(ends.inclusive, q_end_before);
      items = config.items(q_end - max(ends.exclusive, q_end_before));
      q_end_before = max(q_end_before, ends.total);
    }
    const Cost my_cost =
        is_request ? static_cast<Cost>(items) * static_cast<Cost>(config.blocks(len) + config.overhead_blocks) : 0;
    const Scanned<Cost> costs = block_scan(my_cost, Add{}, reinterpret_cast<Cost*>(s.warp_cost[round]));
    const Cost cost_end = cost + costs.inclusive;
    cost += costs.total;
    longest = max(longest, my_cost);
    int64_t slots_end = 0;
    if (config.chunk_blocks > 0) {
      const Scanned<int64_t> scanned =
          block_scan(is_request ? items * config.chunks(len) : 0, Add{}, s.warp_slots[round]);
      slots_end = slots + scanned.inclusive;
      slots += scanned.total;
    }
    if (is_request) {
      view.len()[r] = len;
      view.q_begin()[r + 1] = q_end;
      view.cost_prefix()[r + 1] = cost_end;
      view.slot_prefix()[r + 1] = slots_end;
      if (r < kPrefixInShared) {
        s_prefix[r + 1] = cost_end;
        s.len[r] = len;
      }
      if (r == p.batch - 1) view.header()->q_tokens = q_end;
    }
  }
  if (thread == kScheduleThreads - 1) {  // of a warp that has little else to do
    s_prefix[0] = 0;
    view.q_begin()[0] = 0;
    view.cost_prefix()[0] = 0;
    view.slot_prefix()[0] = 0;
    schedule::Header* header = view.header();
    header->magic = schedule::kMagic;
    header->batch = p.batch;
    header->parts = config.parts;
    header->plan_key = config.plan_key;
    header->total_cost = cost;
    if (p.batch == 0) header->q_tokens = 0;
    view.boundary()[config.parts] = {p.batch, 0, 0, 0};
  }
  // A request above the limit, and no way is whole: one barrier tells all threads, and that shared memory is ready.
  const Cost limit = schedule::whole_limit(config, cost);
  const bool may_be_whole = __syncthreads_or(longest > limit) == 0 && config.chunk_blocks == 0;
  set_boundaries<Cost>({config, view, p.batch <= kPrefixInShared ? s_prefix : nullptr, view.cost_prefix(), s.len,
                        p.batch, cost, is_ragged ? -1 : uniform_items},
                       may_be_whole, limit, s);
}

template <int kBlockTokens>
__global__ void __launch_bounds__(kScheduleThreads, 4) schedule_kernel(const __grid_constant__ ScheduleParams p) {
  __shared__ ScheduleShared s;
  const schedule::View view(p.schedule, p.layout);
  // part * total and prefix + limit must fit into 32 bits, whatever cu_seqlens_q holds.
  const int64_t most_items =
      (p.config.row_groups(max(p.max_q_tokens, p.batch * int64_t{p.q_len})) + p.batch) * p.config.kv_heads;
  if (most_items * p.config.item_cost(p.max_len) < INT32_MAX / (2 * kCombineThreads))
    make_schedule<kBlockTokens, uint32_t>(p, view, s);
  else
    make_schedule<kBlockTokens, int64_t>(p, view, s);
}

}  // namespace mla::cuda::sm90
