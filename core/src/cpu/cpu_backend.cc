// The steps of every CPU backend around the kernel of its instruction set: plan, schedule, decode (attend, then join), merge.
//
// decode runs `lanes` tasks, each with its own scratch, which take parts of the schedule from a shared counter. The parts, and so the
// bits of the result, do not depend on how many lanes there are or which of them takes what.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>

#include "cpu/cpu_backends.h"
#include "cpu/kernel.h"
#include "cpu/thread_pool.h"
#include "math/online_softmax.h"
#include "schedule/host_schedule.h"
#include "schedule/slots.h"
#include "schedule/walk.h"
#include "workspace.h"

namespace mla {
namespace {

using cpu::AttendArgs;
using cpu::Elem;
using cpu::Kernel;
using cpu::LaneScratch;
using schedule::Piece;

// Parts are long enough for their fixed costs to be small (packing q, writing and joining a partial result), and many enough for the
// cores of a large machine.
constexpr int64_t kBlocksOfPart = 8;
constexpr int32_t kMaxParts = 64;

struct CpuPlan {
  const Kernel* kernel;
  cpu::Math math;
  int32_t lanes;  // tasks that run at the same time
};

// ---------------------------------------------------------------- scratch -------------------------------------------------------------

// scratch = partial results, then a working area for each lane.
struct Slots {
  float* out;    // [slots][item_rows][out_stride]: out * scale is the sum of the weighted values
  float* max;    // [slots][item_rows], of the scores in base 2
  float* sum;    // [slots][item_rows], of the weights relative to max; 0: saw nothing, and out may be anything
  float* scale;  // [slots][item_rows]
};

int32_t round_up(int32_t n, int32_t to) { return (n + to - 1) / to * to; }

// Whole vectors, and an odd number of cache lines, so that rows spread over the sets of the caches.
int32_t spread_stride(int32_t floats) { return (round_up(floats, 16) / 16 | 1) * 16; }

// Of a row of sums: the tiles write whole strips of two vectors.
int32_t out_stride(const Problem& p, const CpuPlan& cpu_plan) {
  return spread_stride(round_up(p.value_dim, 2 * cpu_plan.kernel->lanes));
}

Slots take_slots(Workspace& workspace, const Plan& plan, const CpuPlan& cpu_plan) {
  const size_t rows = static_cast<size_t>(plan.config.slots) * plan.config.item_rows;
  Slots s{};
  s.out = workspace.take<float>(rows * out_stride(plan.problem, cpu_plan));
  s.max = workspace.take<float>(rows);
  s.sum = workspace.take<float>(rows);
  s.scale = workspace.take<float>(rows);
  return s;
}

LaneScratch take_lane(Workspace& workspace, const Plan& plan, const CpuPlan& cpu_plan) {
  constexpr size_t kLane = 256;  // no cache line, nor its prefetched neighbour, is shared by two lanes
  const Problem& p = plan.problem;
  const int32_t lanes = cpu_plan.kernel->lanes;
  const size_t rows = round_up(plan.config.item_rows, lanes);
  const size_t strip_lanes = 2 * lanes;
  const bool has_pairs = cpu_plan.math == cpu::Math::kBf16Pairs;
  LaneScratch w{};
  w.row_stride = spread_stride(p.head_dim +
                               15);  // the rope columns of two views are written in whole vectors, wherever they begin
  w.out_stride = out_stride(p, cpu_plan);
  w.q = workspace.take<uint32_t>(rows * (has_pairs ? p.head_dim / 2 : p.head_dim), kLane);
  w.scores = workspace.take<float>((cpu::kMaxStep + cpu::kMaxTile) * strip_lanes, kLane);
  w.weights = workspace.take<uint32_t>(cpu::kBlockTokens * (rows + cpu::kMaxTile));
  w.values = workspace.take<uint32_t>(has_pairs ? cpu::kMaxStep * strip_lanes
                                                : static_cast<size_t>(cpu::kBlockTokens) * w.row_stride);
  w.rows = workspace.take<uint32_t>(4 * static_cast<size_t>(w.row_stride));
  w.out = workspace.take<float>(rows * w.out_stride);
  w.row_max = workspace.take<float>(rows);
  w.row_sum = workspace.take<float>(rows);
  w.row_scale = workspace.take<float>(rows);
  w.row_per_unit = workspace.take<float>(rows);
  w.rescale = workspace.take<float>(rows);
  w.limit = workspace.take<int32_t>(rows);
  workspace.take<std::byte>(0, kLane);
  return w;
}

// ---------------------------------------------------------------- plan ----------------------------------------------------------------

std::string why_unsupported(const Problem& p) {
  if (p.kv_format != KvFormat::kPlain || p.kv_dtype == DType::kE4m3) return "fp8 cache rows are not taken on the CPU";
  if (p.topk > 0) return "index lists (topk) are not taken on the CPU";
  if (p.has_extra_segment) return "a second cache segment is not taken on the CPU";
  if (p.has_tree_mask) return "tree masks are not taken on the CPU";
  return "";
}

const char* math_name(cpu::Math math, DType kv) {
  if (math == cpu::Math::kBf16Pairs) return "bf16 dot products";
  return kv == DType::kBf16 ? "fp32 fma from bf16" : kv == DType::kFp16 ? "fp32 fma from fp16" : "fp32 fma";
}

template <const Kernel* kKernel>
Status make_plan(Plan& plan) {
  const Problem& p = plan.problem;
  auto cpu_plan = std::make_shared<CpuPlan>();
  cpu_plan->kernel = kKernel;
  cpu_plan->lanes = std::max(plan.context->num_threads, 1);
  // A word of two bf16 must not straddle the two views, nor end outside the row.
  const bool has_even_columns = p.head_dim % 2 == 0 && p.value_dim % 2 == 0;
  const bool is_bf16 = p.q_dtype == DType::kBf16 && p.kv_dtype == DType::kBf16;
  cpu_plan->math = kKernel->has_bf16_pairs && is_bf16 && has_even_columns ? cpu::Math::kBf16Pairs : cpu::Math::kFp32;

  // Rows that walk the keys together share the packed block; their sums and packed q have to fit into the second-level cache.
  const int64_t most_rows = cpu_plan->math == cpu::Math::kBf16Pairs ? 128 : 64;
  const int64_t rows = p.rows(p.q_len);
  const int64_t groups = ceil_div(rows, most_rows);
  const int32_t item_rows =
      groups == 1 ? static_cast<int32_t>(rows) : round_up(static_cast<int32_t>(ceil_div(rows, groups)), 16);

  schedule::Config& c = plan.config;
  c = {};
  c.block_tokens = cpu::kBlockTokens;
  c.item_rows = item_rows;
  c.heads_per_kv_head = p.heads_per_kv_head();
  c.kv_heads = p.kv_heads;
  c.overhead_blocks = 1;
  c.parts = 1;
  const int64_t items = c.items(p.q_len);
  const int64_t blocks =
      ceil_div(p.max_tokens, c.block_tokens) + p.max_batch;  // the last block of a request may be short
  while (c.parts < kMaxParts && c.parts * 2 * kBlocksOfPart <= items * blocks) c.parts *= 2;
  if (p.split_policy == SplitPolicy::kFixedChunk) c.chunk_blocks = p.chunk_tokens / c.block_tokens;
  c.slots = schedule::slots_needed(c, p);

  plan.variant = std::string(math_name(cpu_plan->math, p.kv_dtype)) + ", " + std::to_string(item_rows) + " rows";
  Workspace workspace;
  take_slots(workspace, plan, *cpu_plan);
  for (int32_t lane = 0; lane < cpu_plan->lanes; ++lane) take_lane(workspace, plan, *cpu_plan);
  plan.scratch_bytes = workspace.bytes();
  plan.state = std::move(cpu_plan);
  return Status::ok();
}

// ---------------------------------------------------------------- decode --------------------------------------------------------------

template <class Byte>
Byte* at(Byte* base, DType t, int64_t elems) {
  return base + elems * dtype_bytes(t);
}

const std::byte* bytes(const void* p) { return static_cast<const std::byte*>(p); }

class Decode {
 public:
  Decode(const Plan& plan, const DecodeCall& call)
      : plan_(plan),
        cpu_plan_(*static_cast<const CpuPlan*>(plan.state.get())),
        call_(call),
        view_(call.schedule, plan.layout()) {
    Workspace workspace(call.scratch);
    slots_ = take_slots(workspace, plan, cpu_plan_);
    lanes_begin_ = workspace.bytes();
  }

  void run() {
    next_part_.store(0, std::memory_order_relaxed);
    for_each_lane([](void* self, int64_t lane) { static_cast<Decode*>(self)->attend_lane(lane); });
    if (!has_cuts()) return;
    next_part_.store(0, std::memory_order_relaxed);
    for_each_lane([](void* self, int64_t lane) { static_cast<Decode*>(self)->join_lane(lane); });
  }

 private:
  // The rows of one item: query rows [first_row, first_row + rows) of a request for one kv head.
  struct Item {
    int32_t request, kv_head;
    int64_t first_row;
    int32_t rows;
    int64_t q_tokens, len;
  };

  void for_each_lane(mla_task_fn fn) {
    const Context& context = *plan_.context;
    const int32_t lanes = std::min(cpu_plan_.lanes, plan_.config.parts);
    if (context.parallel_for != nullptr)
      context.parallel_for(context.parallel_for_user, lanes, fn, this);
    else
      context.threads->run(lanes, fn, this);
  }

  template <class Fn>
  void for_each_piece_taken(Fn&& fn) {
    for (int32_t part; (part = next_part_.fetch_add(1, std::memory_order_relaxed)) < plan_.config.parts;) {
      schedule::for_each_piece(plan_.config, view_, part, [&](const Piece& piece, int32_t) { fn(piece); });
    }
  }

  LaneScratch lane_scratch(int64_t lane) const {
    Workspace one;
    take_lane(one, plan_, cpu_plan_);
    Workspace mine(call_.scratch);
    mine.take<std::byte>(lanes_begin_, 1);
    mine.take<std::byte>(static_cast<size_t>(lane) * one.bytes(), 256);
    return take_lane(mine, plan_, cpu_plan_);
  }

  bool has_cuts() const {
    if (plan_.config.chunk_blocks > 0) return view_.slot_prefix()[call_.batch] > 0;
    for (int32_t part = 1; part < plan_.config.parts; ++part) {
      if (view_.boundary()[part].block > 0) return true;
    }
    return false;
  }

  Item item_of(const Piece& piece) const {
    const Problem& p = plan_.problem;
    Item item{};
    item.request = piece.request;
    item.kv_head = piece.item % p.kv_heads;
    item.first_row = static_cast<int64_t>(piece.item / p.kv_heads) * plan_.config.item_rows;
    item.q_tokens = view_.q_tokens(piece.request);
    item.len = view_.len()[piece.request];
    item.rows = static_cast<int32_t>(std::min<int64_t>(plan_.config.item_rows, p.rows(item.q_tokens) - item.first_row));
    return item;
  }

  // Of token 0 and head 0 of the item's group.
  int64_t row_offset(const RowView& view, const Item& item) const {
    return view.offset(plan_.problem.is_ragged, item.request, view_.q_begin()[item.request], 0,
                       static_cast<int64_t>(item.kv_head) * plan_.problem.heads_per_kv_head());
  }

  cpu::Rows rows_of(const RowView& view, const Item& item) const {
    if (view.data == nullptr) return {};
    return {at(bytes(view.data), plan_.problem.q_dtype, row_offset(view, item)), view.token_stride, view.head_stride};
  }

  cpu::Cache cache_of(const CacheView& view, const Item& item) const {
    if (view.data == nullptr) return {};
    return {at(bytes(view.data), plan_.problem.kv_dtype, item.kv_head * view.head_stride), view.page_stride,
            view.token_stride};
  }

  // Consecutive pieces of a lane are often of one item: its q is packed once.
  void attend_lane(int64_t lane) {
    const LaneScratch w = lane_scratch(lane);
    int32_t request = -1, item = -1;
    for_each_piece_taken([&](const Piece& piece) {
      attend_piece(piece, w, piece.request == request && piece.item == item);
      request = piece.request;
      item = piece.item;
    });
  }

  void attend_piece(const Piece& piece, LaneScratch w, bool is_q_packed) {
    const Problem& p = plan_.problem;
    const Item item = item_of(piece);
    AttendArgs a{};
    a.math = cpu_plan_.math;
    a.q_elem = static_cast<Elem>(p.q_dtype);
    a.kv_elem = static_cast<Elem>(p.kv_dtype);
    a.head_dim = p.head_dim;
    a.value_dim = p.value_dim;
    a.heads = p.heads_per_kv_head();
    a.first_row = item.first_row;
    a.rows = item.rows;
    a.q_columns = call_.q_rope.data == nullptr ? p.head_dim : p.value_dim;
    a.kv_columns = call_.kv_rope.data == nullptr ? p.head_dim : p.value_dim;
    a.q = rows_of(call_.q, item);
    a.q_rope = rows_of(call_.q_rope, item);
    a.kv = cache_of(call_.kv, item);
    a.kv_rope = cache_of(call_.kv_rope, item);
    a.table = call_.block_table.data + item.request * call_.block_table.row_stride;
    a.page_size = p.page_size;
    a.begin_token = static_cast<int64_t>(piece.begin_block) * cpu::kBlockTokens;
    a.end_token = std::min<int64_t>(static_cast<int64_t>(piece.end_block) * cpu::kBlockTokens, item.len);
    a.is_causal = p.is_causal;
    const Int32View& global = call_.global_seqlens;
    a.visible0 = (p.needs_global_len() ? global.data[item.request * global.stride] : item.len) - item.q_tokens + 1;
    a.cp_world = p.cp_world;
    a.cp_rank = p.cp_rank;
    a.cp_turn = p.cp_turn;
    a.scale_log2e = p.softmax_scale * math::kLog2e;
    a.is_q_packed = is_q_packed;
    if (piece.slot >= 0) w.out = slot_row(piece.slot, 0);
    cpu_plan_.kernel->attend(a, w);

    if (piece.slot >= 0) {
      std::memcpy(&slot_max(piece.slot, 0), w.row_max, sizeof(float) * item.rows);
      std::memcpy(&slot_sum(piece.slot, 0), w.row_sum, sizeof(float) * item.rows);
      std::memcpy(&slot_scale(piece.slot, 0), w.row_scale, sizeof(float) * item.rows);
    } else {
      store_results(item, 0, item.rows, w);
    }
  }

  float* slot_row(int64_t slot, int64_t r) const {
    return slots_.out + (slot * plan_.config.item_rows + r) * out_stride(plan_.problem, cpu_plan_);
  }
  float& slot_max(int64_t slot, int64_t r) const { return slots_.max[slot * plan_.config.item_rows + r]; }
  float& slot_sum(int64_t slot, int64_t r) const { return slots_.sum[slot * plan_.config.item_rows + r]; }
  float& slot_scale(int64_t slot, int64_t r) const { return slots_.scale[slot * plan_.config.item_rows + r]; }
  // The row's running maximum, in the terms of math::merge_weight.
  float slot_max_or_empty(int64_t slot, int64_t r) const {
    return slot_sum(slot, r) == 0.0f ? -INFINITY : slot_max(slot, r);
  }

  // Rows [begin, end) of the item from lane scratch into the caller's tensors.
  void store_results(const Item& item, int32_t begin, int32_t end, const LaneScratch& w) const {
    for (int32_t r = begin; r < end; ++r) {
      float* row = w.out + static_cast<int64_t>(r) * w.out_stride;
      const float sum = w.row_sum[r];
      if (sum == 0.0f) std::memset(row, 0, sizeof(float) * plan_.problem.value_dim);
      store_result(item, r, row, w.row_scale[r] * math::safe_reciprocal(sum), math::merged_lse(w.row_max[r], sum));
    }
  }

  // Row r of the item into the caller's tensors: out = row * scale with the sink, lse in the caller's base.
  void store_result(const Item& item, int64_t r, const float* row, float scale, float lse2) const {
    const Problem& p = plan_.problem;
    const int32_t heads = p.heads_per_kv_head();
    const int64_t token = (item.first_row + r) / heads, head = (item.first_row + r) % heads;
    if (call_.sink != nullptr) {
      scale *= math::sink_factor(lse2, call_.sink[static_cast<int64_t>(item.kv_head) * heads + head] * math::kLog2e);
    }
    const RowView& out = call_.out;
    const int64_t offset = row_offset(out, item) + token * out.token_stride + head * out.head_stride;
    cpu_plan_.kernel->store_row(at(static_cast<std::byte*>(out.data), p.out_dtype, offset),
                                static_cast<Elem>(p.out_dtype), row, scale, p.value_dim);
    const RowView& lse = call_.lse;
    if (lse.data == nullptr) return;
    static_cast<float*>(lse.data)[row_offset(lse, item) + token * lse.token_stride + head * lse.head_stride] =
        p.is_lse_base2 ? lse2 : lse2 * math::kLn2;
  }

  // Every part that left a partial result of an item joins its share of the item's rows.
  void join_lane(int64_t lane) {
    const LaneScratch w = lane_scratch(lane);
    for_each_piece_taken([&](const Piece& piece) {
      if (piece.slot >= 0) join_share(piece, w);
    });
  }

  void join_share(const Piece& piece, const LaneScratch& w) {
    const schedule::Config& c = plan_.config;
    const Item item = item_of(piece);
    const int32_t n = c.blocks(item.len);
    const int64_t total = view_.header()->total_cost;
    const int64_t item_begin = view_.cost_prefix()[piece.request] + piece.item * c.item_cost(item.len);
    const schedule::Cuts cuts = schedule::cuts_of_item(c, item_begin, total, n);
    const auto for_each_cut = [&](auto&& fn) {
      for (int64_t k = cuts.first; k <= cuts.last; ++k) {
        const Piece cut = schedule::piece_of_cut(c, k, piece.request, piece.item, item_begin, total, n,
                                                 view_.slot_prefix()[piece.request]);
        if (cut.begin_block < cut.end_block) fn(cut);
      }
    };
    int64_t count = 0, mine = 0;
    if (c.chunk_blocks > 0) {  // there may be thousands, none of them empty
      count = cuts.last + 1;
      mine = piece.begin_block / c.chunk_blocks;
    } else {
      for_each_cut([&](const Piece& cut) {
        if (cut.begin_block < piece.begin_block) ++mine;
        ++count;
      });
    }
    const int32_t begin = static_cast<int32_t>(mine * item.rows / count);
    const int32_t end = static_cast<int32_t>((mine + 1) * item.rows / count);
    if (begin == end) return;

    const int32_t dim = plan_.problem.value_dim;
    for (int32_t r = begin; r < end; ++r) {
      w.row_max[r] = -INFINITY;
      w.row_sum[r] = 0.0f;
      w.row_scale[r] = 1.0f;
      std::memset(w.out + static_cast<int64_t>(r) * w.out_stride, 0, sizeof(float) * dim);
    }
    for_each_cut([&](const Piece& cut) {
      for (int32_t r = begin; r < end; ++r)
        w.row_max[r] = math::max_keep_nan(w.row_max[r], slot_max_or_empty(cut.slot, r));
    });
    for_each_cut([&](const Piece& cut) {
      for (int32_t r = begin; r < end; ++r) {
        if (slot_sum(cut.slot, r) == 0.0f) continue;
        const float weight = math::merge_weight(slot_max(cut.slot, r), w.row_max[r]);
        w.row_sum[r] += weight * slot_sum(cut.slot, r);
        cpu_plan_.kernel->add_part(w.out + static_cast<int64_t>(r) * w.out_stride, weight * slot_scale(cut.slot, r),
                                   slot_row(cut.slot, r), Elem::kFp32, dim);
      }
    });
    store_results(item, begin, end, w);
  }

  const Plan& plan_;
  const CpuPlan& cpu_plan_;
  const DecodeCall& call_;
  const schedule::ConstView view_;
  Slots slots_{};
  size_t lanes_begin_ = 0;
  alignas(64) std::atomic<int32_t> next_part_{0};
};

Status decode(const Plan& plan, const DecodeCall& call, void*) {
  Decode(plan, call).run();
  return Status::ok();
}

// ---------------------------------------------------------------- merge ---------------------------------------------------------------

// A few rows are done at a time in a buffer on the stack; wide rows in pieces of it.
template <const Kernel* kKernel>
Status merge(const Context&, const MergeCall& call, void*) {
  constexpr int64_t kColumns = 512;
  alignas(64) float sum[kColumns];
  const float unit = call.is_lse_base2 ? 1.0f : math::kLog2e;
  for (int64_t token = 0; token < call.tokens; ++token) {
    for (int64_t head = 0; head < call.heads; ++head) {
      const auto lse2 = [&](int64_t part) {
        return unit * call.lse_parts[part * call.lse_parts_stride[0] + token * call.lse_parts_stride[1] +
                                     head * call.lse_parts_stride[2]];
      };
      float max_lse2 = -INFINITY, weights = 0.0f;
      for (int64_t part = 0; part < call.parts; ++part) max_lse2 = math::max_keep_nan(max_lse2, lse2(part));
      for (int64_t part = 0; part < call.parts; ++part) weights += math::merge_weight(lse2(part), max_lse2);
      const float scale = math::safe_reciprocal(weights);
      for (int64_t column = 0; column < call.dim; column += kColumns) {
        const int64_t columns = std::min(kColumns, call.dim - column);
        std::memset(sum, 0, sizeof sum);
        for (int64_t part = 0; part < call.parts; ++part) {
          if (lse2(part) == -INFINITY) continue;  // saw nothing: its out is of no interest
          const float weight = math::merge_weight(lse2(part), max_lse2);
          const int64_t offset = part * call.out_parts_stride[0] + token * call.out_parts_stride[1] +
                                 head * call.out_parts_stride[2] + column;
          kKernel->add_part(sum, weight, at(bytes(call.out_parts), call.in_dtype, offset),
                            static_cast<Elem>(call.in_dtype), columns);
        }
        const int64_t offset = token * call.out_stride[0] + head * call.out_stride[1] + column;
        kKernel->store_row(at(static_cast<std::byte*>(call.out), call.out_dtype, offset),
                           static_cast<Elem>(call.out_dtype), sum, scale, columns);
      }
      if (call.lse != nullptr) {
        call.lse[token * call.lse_stride[0] + head * call.lse_stride[1]] = math::merged_lse(max_lse2, weights) / unit;
      }
    }
  }
  return Status::ok();
}

// ---------------------------------------------------------------- backends ------------------------------------------------------------

#if defined(MLAKIT_X86)
// The compiler's test also asks whether the operating system saves the registers.
std::string why_no_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")
             ? ""
             : "this CPU has no AVX2 with FMA and F16C";
}

std::string why_no_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
             ? why_no_avx2()
             : "this CPU has no AVX-512 F, BW, DQ and VL";
}

std::string why_no_avx512bf16() {
  return __builtin_cpu_supports("avx512bf16") ? why_no_avx512() : "this CPU has no AVX512_BF16";
}
#endif

std::string always_available() { return ""; }

template <const Kernel* kKernel>
constexpr Backend make_backend(const char* name, std::string (*why_unavailable)()) {
  return {name,   DeviceType::kCpu, why_unavailable, why_unsupported, make_plan<kKernel>, schedule::schedule_on_host,
          decode, merge<kKernel>};
}

}  // namespace

#if defined(MLAKIT_X86)
constinit const Backend kCpuAvx512Bf16Backend =
    make_backend<&cpu::kAvx512Bf16Kernel>("cpu-avx512bf16", why_no_avx512bf16);
constinit const Backend kCpuAvx512Backend = make_backend<&cpu::kAvx512Kernel>("cpu-avx512", why_no_avx512);
constinit const Backend kCpuAvx2Backend = make_backend<&cpu::kAvx2Kernel>("cpu-avx2", why_no_avx2);
#endif
constinit const Backend kCpuScalarBackend = make_backend<&cpu::kScalarKernel>("cpu-scalar", always_available);

}  // namespace mla
