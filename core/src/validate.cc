// The only place that rejects input. A message reads "argument: what is allowed, got what came".
#include "validate.h"

#include <sched.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "dtype_table.h"
#include "registry.h"
#include "schedule/view.h"
#include "tensor_check.h"

namespace mla {
namespace {

using ll = long long;  // what %lld takes

// Limits that keep every product of the schedule inside int64 and every index of it inside int32:
// cost <= kMaxRows * (kMaxLen / block + overhead), times parts <= 2^10, is below 2^63 from blocks of 64 on.
constexpr int64_t kMaxLen = int64_t{1} << 28;
constexpr int64_t kMaxRows = int64_t{1} << 30;
constexpr int32_t kMaxDim = 1 << 16;
constexpr int32_t kMaxThreads = 1024;
// A struct_size beyond this is garbage, not a newer header.
constexpr size_t kMaxUnknownBytes = 4096;

constexpr uint32_t kProblemFlags = MLA_PROBLEM_CAUSAL | MLA_PROBLEM_RAGGED_Q | MLA_PROBLEM_LSE_BASE2 |
                                   MLA_PROBLEM_TREE_MASK | MLA_PROBLEM_EXTRA_SEGMENT | MLA_PROBLEM_DEBUG;

Status check_flags(const char* name, uint32_t flags, uint32_t known) {
  if ((flags & ~known) == 0) return Status::ok();
  return invalid("%s: flags must be within 0x%x, got 0x%x", name, known, flags);
}

Status check_range(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value >= least && value <= most) return Status::ok();
  return invalid("%s: must be from %lld to %lld, got %lld", name, ll{least}, ll{most}, ll{value});
}

bool is_float(int32_t dtype) { return dtype == MLA_DTYPE_BF16 || dtype == MLA_DTYPE_FP16 || dtype == MLA_DTYPE_FP32; }

// What the types hold and no backend takes yet.
Status check_has_backend(const mla_problem& in) {
  if (in.kv_format != MLA_KV_PLAIN || in.kv_dtype == MLA_DTYPE_E4M3) {
    return unsupported(
        "problem.kv_format: no backend takes FP8 caches, use MLA_KV_PLAIN with bf16, fp16 or fp32, got kv_format %d, "
        "kv_dtype %d",
        in.kv_format, in.kv_dtype);
  }
  if (in.topk > 0) return unsupported("problem.topk: no backend takes index lists, use 0, got %d", in.topk);
  if ((in.flags & MLA_PROBLEM_TREE_MASK) != 0)
    return unsupported("problem.flags: no backend takes MLA_PROBLEM_TREE_MASK, leave it out");
  if ((in.flags & MLA_PROBLEM_EXTRA_SEGMENT) != 0)
    return unsupported("problem.flags: no backend takes MLA_PROBLEM_EXTRA_SEGMENT, leave it out");
  return Status::ok();
}

Status check_problem_shape(const mla_problem& in) {
  MLA_RETURN_IF_ERROR(check_range("problem.q_heads", in.q_heads, 1, kMaxDim));
  MLA_RETURN_IF_ERROR(check_range("problem.kv_heads", in.kv_heads, 1, kMaxDim));
  if (in.q_heads % in.kv_heads != 0) {
    return invalid("problem.q_heads: must be a multiple of kv_heads = %d, got %d", in.kv_heads, in.q_heads);
  }
  MLA_RETURN_IF_ERROR(check_range("problem.head_dim", in.head_dim, 1, kMaxDim));
  MLA_RETURN_IF_ERROR(check_range("problem.value_dim", in.value_dim, 1, in.head_dim));
  MLA_RETURN_IF_ERROR(check_range("problem.page_size", in.page_size, 1, kMaxLen));
  MLA_RETURN_IF_ERROR(check_range("problem.max_batch", in.max_batch, 1, kMaxRows));
  MLA_RETURN_IF_ERROR(check_range("problem.max_len", in.max_len, 1, kMaxLen));
  MLA_RETURN_IF_ERROR(check_range("problem.q_len", in.q_len, 1, kMaxRows / in.q_heads));
  return Status::ok();
}

// The totals of a call, 0 filled in.
Status check_problem_totals(const mla_problem& in, Problem& out) {
  const int64_t most_q_tokens = in.max_batch * in.q_len;
  const bool is_ragged = (in.flags & MLA_PROBLEM_RAGGED_Q) != 0;
  out.max_q_tokens = in.max_q_tokens != 0 ? in.max_q_tokens : most_q_tokens;
  MLA_RETURN_IF_ERROR(check_range("problem.max_q_tokens (0: max_batch * q_len)", out.max_q_tokens,
                                  is_ragged ? 1 : most_q_tokens, most_q_tokens));
  if (out.max_q_tokens > kMaxRows / in.q_heads) {
    return invalid("problem.max_q_tokens: times q_heads = %d must be at most %lld, got %lld query tokens", in.q_heads,
                   ll{kMaxRows}, ll{out.max_q_tokens});
  }
  out.max_tokens = in.max_tokens != 0 ? in.max_tokens : in.max_batch * in.max_len;
  return check_range("problem.max_tokens (0: max_batch * max_len)", out.max_tokens, 1, in.max_batch * in.max_len);
}

Status check_problem_policy(const mla_problem& in) {
  if (in.split_policy == MLA_SPLIT_BALANCED && in.chunk_tokens != 0) {
    return invalid("problem.chunk_tokens: must be 0 unless split_policy is MLA_SPLIT_FIXED_CHUNK, got %d",
                   in.chunk_tokens);
  }
  if (in.chunk_tokens < 0 || in.chunk_tokens % 64 != 0 || in.chunk_tokens > kMaxLen) {
    return invalid("problem.chunk_tokens: must be 0 (then %d) or a multiple of 64 up to %lld, got %d",
                   kDefaultChunkTokens, ll{kMaxLen}, in.chunk_tokens);
  }
  if (in.topk < 0) return invalid("problem.topk: must be at least 0, got %d", in.topk);
  const int32_t cp_world = std::max(in.cp_world, 1);
  if (in.cp_world < 0) return invalid("problem.cp_world: must be at least 1 (or 0 for 1), got %d", in.cp_world);
  MLA_RETURN_IF_ERROR(check_range("problem.cp_rank", in.cp_rank, 0, cp_world - 1));
  MLA_RETURN_IF_ERROR(check_range("problem.cp_turn (0: 1)", in.cp_turn, 0, kMaxLen));
  if (!std::isfinite(in.softmax_scale) || in.softmax_scale < 0) {
    return invalid("problem.softmax_scale: must be 0 (then head_dim ** -0.5) or positive and finite, got %g",
                   static_cast<double>(in.softmax_scale));
  }
  return Status::ok();
}

}  // namespace

float default_softmax_scale(int32_t head_dim) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim)));
}

Status check_not_null(const char* name, const void* pointer) {
  if (pointer != nullptr) return Status::ok();
  return invalid("%s: must not be NULL, got NULL", name);
}

Status check_struct_size(const char* name, const void* in, size_t known_bytes) {
  MLA_RETURN_IF_ERROR(check_not_null(name, in));
  uint32_t size = 0;
  std::memcpy(&size, in, sizeof size);
  if (size < 2 * sizeof(uint32_t) || size > known_bytes + kMaxUnknownBytes) {
    return invalid("%s: struct_size must be sizeof of the struct (%zu in this library), got %u", name, known_bytes,
                   size);
  }
  return Status::ok();
}

Status check_unknown_bytes(const char* name, const void* in, size_t known_bytes) {
  uint32_t size = 0;
  std::memcpy(&size, in, sizeof size);
  const auto* bytes = static_cast<const unsigned char*>(in);
  for (size_t i = known_bytes; i < size; ++i) {
    if (bytes[i] != 0) {
      return invalid(
          "%s: bytes past the %zu that this library knows must be zero, got %u at offset %zu; use a newer library",
          name, known_bytes, bytes[i], i);
    }
  }
  return Status::ok();
}

Status check_buffer(const char* name, const char* buffer, size_t size, size_t needed) {
  MLA_RETURN_IF_ERROR(check_not_null(name, buffer));
  if (size >= needed) return Status::ok();
  return invalid("%s: must have at least %zu bytes, got %zu", name, needed, size);
}

Status check_problem_enums(const mla_problem& in) {
  MLA_RETURN_IF_ERROR(check_flags("problem", in.flags, kProblemFlags));
  if (in.device_type != MLA_DEVICE_CPU && in.device_type != MLA_DEVICE_CUDA) {
    return invalid("problem.device_type: must be MLA_DEVICE_CPU (1) or MLA_DEVICE_CUDA (2), got %d", in.device_type);
  }
  if (in.device_id < 0 || (in.device_type == MLA_DEVICE_CPU && in.device_id != 0)) {
    return invalid("problem.device_id: must be 0 for the CPU or a CUDA ordinal from 0, got %d", in.device_id);
  }
  if (!is_float(in.q_dtype))
    return invalid("problem.q_dtype: must be MLA_DTYPE_BF16 (1), _FP16 (2) or _FP32 (3), got %d", in.q_dtype);
  if (in.kv_dtype != MLA_DTYPE_DEFAULT && in.kv_dtype != MLA_DTYPE_E4M3 && !is_float(in.kv_dtype)) {
    return invalid(
        "problem.kv_dtype: must be MLA_DTYPE_DEFAULT (0), _BF16 (1), _FP16 (2), _FP32 (3) or _E4M3 (4), got %d",
        in.kv_dtype);
  }
  if (in.out_dtype != MLA_DTYPE_DEFAULT && in.out_dtype != MLA_DTYPE_FP32 && in.out_dtype != in.q_dtype) {
    return invalid("problem.out_dtype: must be MLA_DTYPE_DEFAULT (0), q_dtype = %d or MLA_DTYPE_FP32 (3), got %d",
                   in.q_dtype, in.out_dtype);
  }
  if (in.kv_format < MLA_KV_PLAIN || in.kv_format > MLA_KV_FP8_584) {
    return invalid("problem.kv_format: must be an MLA_KV_... value from 0 to 3, got %d", in.kv_format);
  }
  if (in.split_policy != MLA_SPLIT_BALANCED && in.split_policy != MLA_SPLIT_FIXED_CHUNK) {
    return invalid("problem.split_policy: must be MLA_SPLIT_BALANCED (0) or MLA_SPLIT_FIXED_CHUNK (1), got %d",
                   in.split_policy);
  }
  return Status::ok();
}

Status make_problem(const mla_problem& in, Problem& out) {
  MLA_RETURN_IF_ERROR(check_problem_enums(in));
  MLA_RETURN_IF_ERROR(check_problem_shape(in));
  MLA_RETURN_IF_ERROR(check_problem_totals(in, out));
  MLA_RETURN_IF_ERROR(check_problem_policy(in));
  MLA_RETURN_IF_ERROR(check_has_backend(in));
  const auto dtype_or_q = [&](int32_t dtype) {
    return static_cast<DType>(dtype != MLA_DTYPE_DEFAULT ? dtype : in.q_dtype);
  };
  out.device_type = static_cast<DeviceType>(in.device_type);
  out.device_id = in.device_id;
  out.q_dtype = static_cast<DType>(in.q_dtype);
  out.kv_dtype = dtype_or_q(in.kv_dtype);
  out.out_dtype = dtype_or_q(in.out_dtype);
  out.kv_format = static_cast<KvFormat>(in.kv_format);
  out.max_batch = in.max_batch;
  out.q_len = in.q_len;
  out.max_len = in.max_len;
  out.q_heads = in.q_heads;
  out.kv_heads = in.kv_heads;
  out.head_dim = in.head_dim;
  out.value_dim = in.value_dim;
  out.page_size = in.page_size;
  out.split_policy = static_cast<SplitPolicy>(in.split_policy);
  out.chunk_tokens = out.split_policy == SplitPolicy::kBalanced ? 0
                     : in.chunk_tokens != 0                     ? in.chunk_tokens
                                                                : kDefaultChunkTokens;
  out.topk = in.topk;
  out.cp_world = std::max(in.cp_world, 1);
  out.cp_rank = in.cp_rank;
  out.cp_turn = std::max(in.cp_turn, 1);
  out.softmax_scale = in.softmax_scale != 0 ? in.softmax_scale : default_softmax_scale(in.head_dim);
  out.is_causal = (in.flags & MLA_PROBLEM_CAUSAL) != 0;
  out.is_ragged = (in.flags & MLA_PROBLEM_RAGGED_Q) != 0;
  out.is_lse_base2 = (in.flags & MLA_PROBLEM_LSE_BASE2) != 0;
  out.has_tree_mask = (in.flags & MLA_PROBLEM_TREE_MASK) != 0;
  out.has_extra_segment = (in.flags & MLA_PROBLEM_EXTRA_SEGMENT) != 0;
  out.is_debug = (in.flags & MLA_PROBLEM_DEBUG) != 0;
  return Status::ok();
}

Status backend_at(int32_t index, const Backend** backend) {
  int32_t count = 0;
  while (kBackends[count] != nullptr) ++count;
  MLA_RETURN_IF_ERROR(check_range("index", index, 0, count - 1));
  *backend = kBackends[index];
  return Status::ok();
}

// ---------------------------------------------------------------- context --------------------------------------------------------------

namespace {

int32_t cpus_of_this_process() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
  return std::clamp(CPU_COUNT(&set), 1, kMaxThreads);
}

Status threads_from_environment(int32_t& threads) {
  const char* text = std::getenv("MLAKIT_NUM_THREADS");
  if (text == nullptr || *text == '\0') {
    threads = cpus_of_this_process();
    return Status::ok();
  }
  const char* const text_end = text + std::strlen(text);
  const auto [end, error] = std::from_chars(text, text_end, threads);
  if (error == std::errc() && end == text_end && threads >= 1 && threads <= kMaxThreads) return Status::ok();
  return invalid("MLAKIT_NUM_THREADS: must be a number from 1 to %d, got \"%.40s\"", kMaxThreads, text);
}

}  // namespace

Status make_context(const mla_context_options& in, Context& out) {
  MLA_RETURN_IF_ERROR(check_flags("options", in.flags, 0));
  if (in.reserved != 0) return invalid("options.reserved: must be 0, got %d", in.reserved);

  const bool is_from_options = in.backend != nullptr;
  const char* backend = is_from_options ? in.backend : std::getenv("MLAKIT_BACKEND");
  if (backend != nullptr && (is_from_options || *backend != '\0')) {
    if (find_backend(backend) == nullptr) {
      return invalid("%s: must be one of %s, got \"%.80s\"", is_from_options ? "options.backend" : "MLAKIT_BACKEND",
                     backend_names().c_str(), backend);
    }
    out.forced_backend = backend;
  }

  MLA_RETURN_IF_ERROR(check_range("options.num_threads", in.num_threads, 0, kMaxThreads));
  out.num_threads = in.num_threads;
  if (in.num_threads == 0) MLA_RETURN_IF_ERROR(threads_from_environment(out.num_threads));
  out.parallel_for = in.parallel_for;
  out.parallel_for_user = in.parallel_for_user;
  return Status::ok();
}

// ---------------------------------------------------------------- tensors --------------------------------------------------------------

Status make_tensor(const TensorFacts& in, mla_tensor_storage* out) {
  MLA_RETURN_IF_ERROR(check_not_null("storage", out));
  const DTypeInfo* dtype = find_dtype(in.dtype);
  if (dtype == nullptr) return invalid("dtype: must be an MLA_DTYPE_... value from 1 to 5, got %d", in.dtype);
  MLA_RETURN_IF_ERROR(check_range("ndim", in.ndim, 1, 4));
  MLA_RETURN_IF_ERROR(check_not_null("shape", in.shape));
  *out = {};
  std::copy_n(in.shape, in.ndim, out->shape);
  if (in.strides != nullptr) std::copy_n(in.strides, in.ndim, out->strides);
  out->tensor = {.data = in.data,
                 .device = {in.device_type, in.device_id},
                 .ndim = in.ndim,
                 .dtype = {dtype->dlpack_code, dtype->bits, 1},
                 .shape = out->shape,
                 .strides = in.strides != nullptr ? out->strides : nullptr,
                 .byte_offset = 0};
  return Status::ok();
}

namespace {

Place place_of(const Problem& p) { return {p.device_type, p.device_id}; }

Status check_workspace(const char* name, const void* data, uint64_t bytes, uint64_t needed, size_t alignment) {
  if (needed == 0) return Status::ok();
  if (data == nullptr)
    return invalid("%s: must point at %llu bytes, got NULL", name, static_cast<unsigned long long>(needed));
  if (bytes < needed) {
    return make_status(MLA_WORKSPACE_TOO_SMALL, "%s: must have at least %llu bytes (mla_plan_get_info), got %llu", name,
                       static_cast<unsigned long long>(needed), static_cast<unsigned long long>(bytes));
  }
  if (bytes > static_cast<uint64_t>(INT64_MAX / 2)) {
    return invalid("%s: its bytes must stay inside the address space, got %llu", name,
                   static_cast<unsigned long long>(bytes));
  }
  if (reinterpret_cast<uintptr_t>(data) % alignment != 0) {
    return make_status(MLA_WORKSPACE_TOO_SMALL, "%s: its address must be a multiple of %zu (mla_plan_get_info), got %p",
                       name, alignment, data);
  }
  return Status::ok();
}

Int32View int32_view(const TensorInfo& info) { return {reinterpret_cast<const int32_t*>(info.data), info.stride[0]}; }

// ---------------------------------------------------------------- schedule -------------------------------------------------------------

// Lengths in host memory.
Status check_lengths(const Problem& p, const Int32View& lengths, int32_t batch) {
  int64_t total = 0;
  for (int32_t r = 0; r < batch; ++r) {
    const int32_t len = lengths.data[r * lengths.stride];
    if (len < 0 || len > p.max_len) {
      return invalid("cache_seqlens: must be from 0 to %lld (max_len of the problem), got cache_seqlens[%d] = %d",
                     ll{p.max_len}, r, len);
    }
    total += len;
  }
  if (total > p.max_tokens) {
    return invalid("cache_seqlens: must sum to at most %lld (max_tokens of the problem), got %lld", ll{p.max_tokens},
                   ll{total});
  }
  return Status::ok();
}

Status check_cu_seqlens(const Problem& p, const Int32View& cu, int32_t batch) {
  if (cu.data[0] != 0) return invalid("cu_seqlens_q: must begin with 0, got cu_seqlens_q[0] = %d", cu.data[0]);
  for (int32_t r = 0; r < batch; ++r) {
    const int64_t begin = cu.data[r * cu.stride];
    const int64_t end = cu.data[(r + 1) * cu.stride];
    if (end < begin) {
      return invalid("cu_seqlens_q: must not decrease, got cu_seqlens_q[%d] = %lld after %lld", r + 1, ll{end},
                     ll{begin});
    }
    if (end - begin > p.q_len) {
      return invalid(
          "cu_seqlens_q: a request must have at most %lld query tokens (q_len of the problem), got %lld for request %d",
          ll{p.q_len}, ll{end - begin}, r);
    }
  }
  if (const int32_t all = cu.data[batch * cu.stride]; all > p.max_q_tokens) {
    return invalid("cu_seqlens_q: must end with at most %lld (max_q_tokens of the problem), got %d", ll{p.max_q_tokens},
                   all);
  }
  return Status::ok();
}

// What tensors hold, where the host may look at it: host memory as it is, device memory as copies. Only debug plans make copies.
class HostCopies {
 public:
  HostCopies(const Plan& plan, void* stream) : plan_(plan), stream_(stream) {}

  Status take(Int32View& view, int64_t elements) {
    return elements > 0 ? take(view.data, (elements - 1) * view.stride + 1) : Status::ok();
  }

  // Turns data into a pointer to a copy of its elements, if it is on a device.
  template <class T>
  Status take(const T*& data, uint64_t elements) {
    if (data == nullptr || elements == 0 || plan_.backend->read == nullptr) return Status::ok();
    copies_.emplace_back(elements * sizeof(T));
    std::byte* copy = copies_.back().data();
    MLA_RETURN_IF_ERROR(plan_.backend->read(plan_, copy, data, elements * sizeof(T), stream_));
    data = reinterpret_cast<const T*>(copy);
    return Status::ok();
  }

 private:
  const Plan& plan_;
  void* stream_;
  std::vector<std::vector<std::byte>> copies_;
};

// Runs check(HostCopies&) where values are looked at: on the CPU always, on a device for debug plans.
template <class Check>
Status check_values(const Plan& plan, void* stream, const Check& check) {
  if (plan.problem.device_type != DeviceType::kCpu && !plan.problem.is_debug) return Status::ok();
  HostCopies copies(plan, stream);
  return check(copies);
}

}  // namespace

Status make_schedule_call(const Plan& plan, const mla_schedule_args& in, void* stream, ScheduleCall& out) {
  const Problem& p = plan.problem;
  MLA_RETURN_IF_ERROR(check_flags("args", in.flags, 0));
  TensorInfo lengths;
  MLA_RETURN_IF_ERROR(check_tensor(
      in.cache_seqlens,
      {"cache_seqlens", dtype_bit(DType::kInt32), place_of(p), LastDim::kFree, 1, {{"batch", kAnySize, ""}}}, lengths));
  MLA_RETURN_IF_ERROR(check_range("cache_seqlens: batch", lengths.shape[0], 0, p.max_batch));
  out.batch = static_cast<int32_t>(lengths.shape[0]);
  out.cache_seqlens = int32_view(lengths);

  TensorInfo cu;
  cu.name = "cu_seqlens_q";
  if (p.is_ragged) {
    const Dim dim = {"batch + 1", lengths.shape[0] + 1, "cache_seqlens"};
    MLA_RETURN_IF_ERROR(check_tensor(
        in.cu_seqlens_q, {"cu_seqlens_q", dtype_bit(DType::kInt32), place_of(p), LastDim::kFree, 1, {dim}}, cu));
  } else if (in.cu_seqlens_q != nullptr) {
    return invalid("cu_seqlens_q: must be NULL unless the problem has MLA_PROBLEM_RAGGED_Q, got a tensor");
  }
  out.cu_seqlens_q = int32_view(cu);

  const uint64_t needed = plan.layout().bytes();
  MLA_RETURN_IF_ERROR(check_workspace("schedule", in.schedule, in.schedule_bytes, needed, schedule::kAlignment));
  out.schedule = static_cast<std::byte*>(in.schedule);
  const TensorInfo buffer = raw_bytes("schedule", in.schedule, needed);
  const TensorInfo* const written[] = {&buffer};
  const TensorInfo* const read[] = {&lengths, &cu};
  MLA_RETURN_IF_ERROR(check_no_overlap(written, read));

  return check_values(plan, stream, [&](HostCopies& copies) -> Status {
    ScheduleCall seen = out;
    MLA_RETURN_IF_ERROR(copies.take(seen.cache_seqlens, out.batch));
    MLA_RETURN_IF_ERROR(copies.take(seen.cu_seqlens_q, out.batch + 1));
    MLA_RETURN_IF_ERROR(check_lengths(p, seen.cache_seqlens, seen.batch));
    return p.is_ragged ? check_cu_seqlens(p, seen.cu_seqlens_q, seen.batch) : Status::ok();
  });
}

// ---------------------------------------------------------------- decode ---------------------------------------------------------------

namespace {

struct DecodeTensors {
  TensorInfo q, q_rope, kv, kv_rope, block_table, cache_seqlens, global_seqlens, sink, out, lse;
};

RowView row_view(const TensorInfo& t, bool is_ragged) {
  if (is_ragged) return {t.data, 0, t.stride[0], t.stride[1]};
  return {t.data, t.stride[0], t.stride[1], t.stride[2]};
}

CacheView cache_view(const TensorInfo& t) { return {t.data, t.shape[0], t.stride[0], t.stride[1], t.stride[2]}; }

// q, q_rope, out (columns > 0) or lse (no columns), with the leading sizes of q once they are known.
struct RowTensor {
  const char* name;
  DType dtype;
  int32_t columns;
  const char* columns_name;
  const TensorInfo* like;  // q, or nullptr for q itself
};

Status check_rows(const Problem& p, const mla_tensor* tensor, const RowTensor& rows, TensorInfo& info) {
  TensorSpec spec = {rows.name, dtype_bit(rows.dtype), place_of(p), LastDim::kContiguous, 0, {}};
  const auto lead = [&](int32_t i) { return rows.like != nullptr ? rows.like->shape[i] : kAnySize; };
  if (p.is_ragged) {
    spec.dims[spec.ndim++] = {"tokens", lead(0), "q"};
  } else {
    spec.dims[spec.ndim++] = {"batch", lead(0), "q"};
    spec.dims[spec.ndim++] = {"q_len", p.q_len, "problem"};
  }
  spec.dims[spec.ndim++] = {"q_heads", p.q_heads, "problem"};
  if (rows.columns > 0) {
    spec.dims[spec.ndim++] = {rows.columns_name, rows.columns, "problem"};
  } else {
    spec.last_dim = LastDim::kFree;
  }
  return check_tensor(tensor, spec, info);
}

Status check_cache(const Problem& p, const char* name, const mla_tensor* tensor, const Dim& pages, const Dim& columns,
                   TensorInfo& info) {
  const Dim page_size = {"page_size", p.page_size, "problem"};
  const Dim kv_heads = {"kv_heads", p.kv_heads, "problem"};
  return check_tensor(
      tensor,
      {name, dtype_bit(p.kv_dtype), place_of(p), LastDim::kContiguous, 4, {pages, page_size, kv_heads, columns}}, info);
}

Status check_no_rope_view(const Problem& p, const char* name) {
  if (p.rope_dim() > 0) return Status::ok();
  return invalid("%s: must be NULL where head_dim equals value_dim = %d, got a tensor", name, p.value_dim);
}

Status check_decode_tensors(const Problem& p, const mla_decode_args& in, DecodeTensors& t) {
  const bool is_q_split = in.q_rope != nullptr;
  const bool is_kv_split = in.kv_rope != nullptr;
  if (is_q_split) MLA_RETURN_IF_ERROR(check_no_rope_view(p, "q_rope"));
  if (is_kv_split) MLA_RETURN_IF_ERROR(check_no_rope_view(p, "kv_rope"));
  const char* const q_columns = is_q_split ? "value_dim (beside q_rope)" : "head_dim";
  MLA_RETURN_IF_ERROR(
      check_rows(p, in.q, {"q", p.q_dtype, is_q_split ? p.value_dim : p.head_dim, q_columns, nullptr}, t.q));
  if (is_q_split) {
    MLA_RETURN_IF_ERROR(
        check_rows(p, in.q_rope, {"q_rope", p.q_dtype, p.rope_dim(), "head_dim - value_dim", &t.q}, t.q_rope));
  }
  const Dim kv_columns = {is_kv_split ? "value_dim (beside kv_rope)" : "head_dim",
                          is_kv_split ? p.value_dim : p.head_dim, "problem"};
  MLA_RETURN_IF_ERROR(check_cache(p, "kv_cache", in.kv_cache, {"pages", kAnySize, ""}, kv_columns, t.kv));
  MLA_RETURN_IF_ERROR(check_range("kv_cache: pages", t.kv.shape[0], 0, INT32_MAX));
  if (is_kv_split) {
    const Dim rope_columns = {"head_dim - value_dim", p.rope_dim(), "problem"};
    MLA_RETURN_IF_ERROR(
        check_cache(p, "kv_rope", in.kv_rope, {"pages", t.kv.shape[0], "kv_cache"}, rope_columns, t.kv_rope));
  }
  const Dim batch = {"batch", p.is_ragged ? kAnySize : t.q.shape[0], "q"};
  const uint32_t int32 = dtype_bit(DType::kInt32);
  MLA_RETURN_IF_ERROR(check_tensor(
      in.block_table, {"block_table", int32, place_of(p), LastDim::kContiguous, 2, {batch, {"width", kAnySize, ""}}},
      t.block_table));
  MLA_RETURN_IF_ERROR(
      check_range(p.is_ragged ? "block_table: batch" : "q: batch", t.block_table.shape[0], 0, p.max_batch));
  if (in.cache_seqlens != nullptr) {
    const Dim lengths = {"batch", t.block_table.shape[0], "block_table"};
    MLA_RETURN_IF_ERROR(check_tensor(
        in.cache_seqlens, {"cache_seqlens", int32, place_of(p), LastDim::kFree, 1, {lengths}}, t.cache_seqlens));
  }
  if (p.needs_global_len()) {
    const Dim lengths = {"batch", t.block_table.shape[0], "block_table"};
    MLA_RETURN_IF_ERROR(check_tensor(
        in.global_seqlens, {"global_seqlens", int32, place_of(p), LastDim::kFree, 1, {lengths}}, t.global_seqlens));
  } else if (in.global_seqlens != nullptr) {
    return invalid("global_seqlens: must be NULL unless the problem is causal with cp_world > 1, got a tensor");
  }
  if (in.sink != nullptr) {
    const Dim heads = {"q_heads", p.q_heads, "problem"};
    MLA_RETURN_IF_ERROR(check_tensor(
        in.sink, {"sink", dtype_bit(DType::kFp32), place_of(p), LastDim::kContiguous, 1, {heads}}, t.sink));
  }
  MLA_RETURN_IF_ERROR(check_rows(p, in.out, {"out", p.out_dtype, p.value_dim, "value_dim", &t.q}, t.out));
  MLA_RETURN_IF_ERROR(check_no_self_overlap(t.out));
  if (in.lse != nullptr) {
    MLA_RETURN_IF_ERROR(check_rows(p, in.lse, {"lse", DType::kFp32, 0, "", &t.q}, t.lse));
    MLA_RETURN_IF_ERROR(check_no_self_overlap(t.lse));
  }
  return Status::ok();
}

Status check_unused_tensors(const mla_decode_args& in) {
  const struct {
    const char* name;
    const mla_tensor* tensor;
  } unused[] = {{"kv_scale", in.kv_scale},
                {"indices", in.indices},
                {"topk_length", in.topk_length},
                {"extra_kv_cache", in.extra_kv_cache},
                {"extra_block_table", in.extra_block_table},
                {"extra_seqlens", in.extra_seqlens},
                {"tree_mask", in.tree_mask}};
  for (const auto& [name, tensor] : unused) {
    if (tensor != nullptr) return unsupported("%s: no backend takes it, pass NULL, got a tensor", name);
  }
  return Status::ok();
}

// The schedule in host memory is this plan's, for this batch, and not older than the lengths.
Status check_schedule(const Plan& plan, const DecodeCall& call) {
  const schedule::ConstView view(call.schedule, plan.layout());
  const schedule::Header& header = *view.header();
  if (header.magic != schedule::kMagic) return invalid("schedule: must be made by mla_schedule, got other bytes");
  if (header.plan_key != plan.config.plan_key)
    return invalid("schedule: must be made with this plan, got one of another plan");
  if (header.batch != call.batch) {
    return invalid("schedule: must be made for this batch of %d requests, got one for %d; call mla_schedule again",
                   call.batch, header.batch);
  }
  if (header.q_tokens > call.q_tokens) {
    return invalid("q: must have the %lld query tokens of the schedule, got %lld", ll{header.q_tokens},
                   ll{call.q_tokens});
  }
  if (call.cache_seqlens.data == nullptr) return Status::ok();
  for (int32_t r = 0; r < call.batch; ++r) {
    const int32_t len = call.cache_seqlens.data[r * call.cache_seqlens.stride];
    if (len != view.len()[r]) {
      return invalid(
          "cache_seqlens: must be those of the schedule, got cache_seqlens[%d] = %d where it has %d; call mla_schedule "
          "again",
          r, len, view.len()[r]);
    }
  }
  return Status::ok();
}

// Every request's length is this rank's share of its length on all ranks.
Status check_global_lengths(const Plan& plan, const DecodeCall& call) {
  const Problem& p = plan.problem;
  const schedule::ConstView view(call.schedule, plan.layout());
  for (int32_t r = 0; r < call.batch; ++r) {
    const int32_t global_len = call.global_seqlens.data[r * call.global_seqlens.stride];
    if (p.local_tokens(global_len) != view.len()[r]) {
      return invalid(
          "global_seqlens: rank %d of %d must have %lld of the %d tokens of request %d, got cache_seqlens[%d] = %d",
          p.cp_rank, p.cp_world, ll{p.local_tokens(global_len)}, global_len, r, r, view.len()[r]);
    }
  }
  return Status::ok();
}

// The used part of a table in host memory.
Status check_page_ids(const Plan& plan, const DecodeCall& call) {
  const schedule::ConstView view(call.schedule, plan.layout());
  for (int32_t r = 0; r < call.batch; ++r) {
    const int64_t used = ceil_div(view.len()[r], plan.problem.page_size);
    if (used > call.block_table.width) {
      return invalid(
          "block_table: width must be at least %lld for the %d cached tokens of request %d, got shape[1] = %lld",
          ll{used}, view.len()[r], r, ll{call.block_table.width});
    }
    const int32_t* row = call.block_table.data + r * call.block_table.row_stride;
    for (int64_t i = 0; i < used; ++i) {
      if (row[i] < 0 || row[i] >= call.kv.pages) {
        return invalid(
            "block_table: a used page id must be from 0 to %lld (pages of kv_cache, less 1), got block_table[%d][%lld] "
            "= %d",
            ll{call.kv.pages - 1}, r, ll{i}, row[i]);
      }
    }
  }
  return Status::ok();
}

}  // namespace

Status make_decode_call(const Plan& plan, const mla_decode_args& in, void* stream, DecodeCall& out) {
  const Problem& p = plan.problem;
  MLA_RETURN_IF_ERROR(check_flags("args", in.flags, 0));
  MLA_RETURN_IF_ERROR(check_unused_tensors(in));
  DecodeTensors t;
  MLA_RETURN_IF_ERROR(check_decode_tensors(p, in, t));
  const uint64_t schedule_bytes = plan.layout().bytes();
  MLA_RETURN_IF_ERROR(
      check_workspace("schedule", in.schedule, in.schedule_bytes, schedule_bytes, schedule::kAlignment));
  MLA_RETURN_IF_ERROR(check_workspace("scratch", in.scratch, in.scratch_bytes, plan.scratch_bytes, kScratchAlignment));

  const TensorInfo schedule = raw_bytes("schedule", in.schedule, schedule_bytes);
  const TensorInfo scratch = raw_bytes("scratch", in.scratch, plan.scratch_bytes);
  const TensorInfo* const written[] = {&t.out, &t.lse, &scratch};
  const TensorInfo* const read[] = {
      &t.q, &t.q_rope, &t.kv, &t.kv_rope, &t.block_table, &t.cache_seqlens, &t.global_seqlens, &t.sink, &schedule};
  MLA_RETURN_IF_ERROR(check_no_overlap(written, read));

  out.batch = static_cast<int32_t>(t.block_table.shape[0]);
  out.q_tokens = p.is_ragged ? t.q.shape[0] : t.q.shape[0] * p.q_len;
  out.q = row_view(t.q, p.is_ragged);
  out.q_rope = row_view(t.q_rope, p.is_ragged);
  out.kv = cache_view(t.kv);
  out.kv_rope = cache_view(t.kv_rope);
  out.block_table = {reinterpret_cast<const int32_t*>(t.block_table.data), t.block_table.stride[0],
                     t.block_table.shape[1]};
  out.cache_seqlens = int32_view(t.cache_seqlens);
  out.global_seqlens = int32_view(t.global_seqlens);
  out.sink = reinterpret_cast<const float*>(t.sink.data);
  out.out = row_view(t.out, p.is_ragged);
  out.lse = row_view(t.lse, p.is_ragged);
  out.schedule = static_cast<const std::byte*>(in.schedule);
  out.scratch = static_cast<std::byte*>(in.scratch);

  return check_values(plan, stream, [&](HostCopies& copies) -> Status {
    DecodeCall seen = out;
    MLA_RETURN_IF_ERROR(copies.take(seen.schedule, schedule_bytes));
    MLA_RETURN_IF_ERROR(copies.take(seen.cache_seqlens, out.batch));
    MLA_RETURN_IF_ERROR(copies.take(seen.global_seqlens, out.batch));
    if (out.batch > 0) {
      MLA_RETURN_IF_ERROR(
          copies.take(seen.block_table.data, (out.batch - 1) * seen.block_table.row_stride + seen.block_table.width));
    }
    MLA_RETURN_IF_ERROR(check_schedule(plan, seen));
    if (p.needs_global_len()) MLA_RETURN_IF_ERROR(check_global_lengths(plan, seen));
    return check_page_ids(plan, seen);
  });
}

// ---------------------------------------------------------------- merge ----------------------------------------------------------------

Status make_merge_call(const mla_merge_args& in, MergeCall& out, DeviceType& device_type) {
  MLA_RETURN_IF_ERROR(check_flags("args", in.flags, MLA_PROBLEM_LSE_BASE2));
  MLA_RETURN_IF_ERROR(check_not_null("out_parts", in.out_parts));
  const mla_device device = in.out_parts->device;
  if (device.device_type != MLA_DEVICE_CPU && device.device_type != MLA_DEVICE_CUDA) {
    return invalid("out_parts: must be on the CPU (1) or a CUDA device (2), got DLPack device type %d",
                   device.device_type);
  }
  device_type = static_cast<DeviceType>(device.device_type);
  const Place place = {device_type, device.device_id};
  const uint32_t floats = dtype_bit(DType::kBf16) | dtype_bit(DType::kFp16) | dtype_bit(DType::kFp32);
  const uint32_t fp32 = dtype_bit(DType::kFp32);

  TensorInfo parts, lse_parts, result, lse;
  MLA_RETURN_IF_ERROR(check_tensor(
      in.out_parts,
      {"out_parts",
       floats,
       place,
       LastDim::kContiguous,
       4,
       {{"parts", kAnySize, ""}, {"tokens", kAnySize, ""}, {"heads", kAnySize, ""}, {"dim", kAnySize, ""}}},
      parts));
  MLA_RETURN_IF_ERROR(check_range("out_parts: parts", parts.shape[0], 1, INT32_MAX));
  const auto like_parts = [&](const char* name, int32_t i) { return Dim{name, parts.shape[i], "out_parts"}; };
  const Dim tokens = like_parts("tokens", 1), heads = like_parts("heads", 2);
  MLA_RETURN_IF_ERROR(check_tensor(
      in.lse_parts, {"lse_parts", fp32, place, LastDim::kFree, 3, {like_parts("parts", 0), tokens, heads}}, lse_parts));
  MLA_RETURN_IF_ERROR(check_tensor(
      in.out, {"out", floats, place, LastDim::kContiguous, 3, {tokens, heads, like_parts("dim", 3)}}, result));
  MLA_RETURN_IF_ERROR(check_no_self_overlap(result));
  if (in.lse != nullptr) {
    MLA_RETURN_IF_ERROR(check_tensor(in.lse, {"lse", fp32, place, LastDim::kFree, 2, {tokens, heads}}, lse));
    MLA_RETURN_IF_ERROR(check_no_self_overlap(lse));
  }
  const TensorInfo* const written[] = {&result, &lse};
  const TensorInfo* const read[] = {&parts, &lse_parts};
  MLA_RETURN_IF_ERROR(check_no_overlap(written, read));

  out.parts = parts.shape[0];
  out.tokens = parts.shape[1];
  out.heads = parts.shape[2];
  out.dim = parts.shape[3];
  out.in_dtype = parts.dtype;
  out.out_dtype = result.dtype;
  out.is_lse_base2 = (in.flags & MLA_PROBLEM_LSE_BASE2) != 0;
  out.out_parts = parts.data;
  std::copy_n(parts.stride, 3, out.out_parts_stride);
  out.lse_parts = reinterpret_cast<const float*>(lse_parts.data);
  std::copy_n(lse_parts.stride, 3, out.lse_parts_stride);
  out.out = result.data;
  std::copy_n(result.stride, 2, out.out_stride);
  out.lse = reinterpret_cast<float*>(lse.data);
  std::copy_n(lse.stride, 2, out.lse_stride);
  out.device_id = device.device_id;
  return Status::ok();
}

}  // namespace mla
