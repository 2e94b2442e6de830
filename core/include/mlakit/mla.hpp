// mlakit for C++20: RAII over mla.h, header only, no other dependency. What the calls promise is written in mla.h.
//
//     mla_problem problem = mla::make_problem(MLA_DTYPE_BF16, /*q_heads=*/128, /*max_batch=*/64, /*max_len=*/8192);
//     mla::Context context;
//     mla::Plan plan(context, problem);
//     mla::Workspace work(plan);
//     plan.schedule(work, lengths);
//     plan.decode(work, {.q = q, .kv_cache = cache, .block_table = table, .out = out, .lse = lse});
//
// Failures throw mla::Error. An Error thrown by one thread carries that thread's message.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "mlakit/mla.h"

namespace mla {
// A namespace of its own for the linker, so that these names never meet the library's in a static link.
inline namespace hpp {

class Error : public std::runtime_error {
 public:
  Error(mla_status status, const char* message) : std::runtime_error(message), status_(status) {}
  mla_status status() const noexcept { return status_; }

 private:
  mla_status status_;
};

inline void check(mla_status status) {
  if (status != MLA_OK) throw Error(status, mla_last_error());
}

// ---------------------------------------------------------------- problems ----------------------------------------------

// The defaults of mla_problem_init with the four fields that every engine sets; change the others in the result.
inline mla_problem make_problem(int32_t q_dtype, int32_t q_heads, int64_t max_batch, int64_t max_len) {
  mla_problem problem;
  check(mla_problem_init(&problem));
  problem.q_dtype = q_dtype;
  problem.q_heads = q_heads;
  problem.max_batch = max_batch;
  problem.max_len = max_len;
  return problem;
}

inline mla_problem parse_problem(const char* text) {
  mla_problem problem;
  check(mla_problem_parse(&problem, text));
  return problem;
}

inline std::string to_string(const mla_problem& problem) {
  size_t needed = 0;
  check(mla_problem_format(&problem, nullptr, 0, &needed));
  std::string text(needed, '\0');
  check(mla_problem_format(&problem, text.data(), text.size(), nullptr));
  text.pop_back();  // the final NUL
  return text;
}

// ---------------------------------------------------------------- tensors -----------------------------------------------

// A view of memory that stays the caller's, with 1 to 4 dimensions. May be copied.
class Tensor {
 public:
  // strides in elements; {}: compact, row major. The memory is written only if the tensor is given as a result.
  Tensor(const void* data, int32_t dtype, std::initializer_list<int64_t> shape,
         std::initializer_list<int64_t> strides = {}, mla_device device = {MLA_DEVICE_CPU, 0}) {
    if (strides.size() != 0 && strides.size() != shape.size())
      throw Error(MLA_INVALID_ARGUMENT, "strides: must be as many as the sizes of shape");
    const mla_tensor* made = mla_tensor_init(&storage_, const_cast<void*>(data), dtype, device.device_type,
                                             device.device_id, static_cast<int32_t>(shape.size()), shape.begin(),
                                             strides.size() != 0 ? strides.begin() : nullptr);
    if (made == nullptr) throw Error(MLA_INVALID_ARGUMENT, mla_last_error());
  }

  Tensor(const Tensor& other) : storage_(other.storage_) { point_at_own_arrays(); }
  Tensor& operator=(const Tensor& other) {
    storage_ = other.storage_;
    point_at_own_arrays();
    return *this;
  }

  const mla_tensor* get() const noexcept { return &storage_.tensor; }

 private:
  void point_at_own_arrays() noexcept {
    storage_.tensor.shape = storage_.shape;
    if (storage_.tensor.strides != nullptr) storage_.tensor.strides = storage_.strides;
  }
  mla_tensor_storage storage_;
};

// An argument: a Tensor, a tensor of C or DLPack, or nothing.
struct TensorRef {
  TensorRef() = default;
  TensorRef(const Tensor& view) : tensor(view.get()) {}
  TensorRef(const mla_tensor* view) : tensor(view) {}
  const mla_tensor* tensor = nullptr;
};

// ---------------------------------------------------------------- contexts ----------------------------------------------

struct MergeArgs {
  TensorRef out_parts;
  TensorRef lse_parts;
  TensorRef out;
  TensorRef lse = {};
  uint32_t flags = 0;
};

class Context {
 public:
  explicit Context(const mla_context_options* options = nullptr) {
    mla_context* context = nullptr;
    check(mla_context_create(&context, options));
    handle_.reset(context);
  }
  // Forces a backend by name.
  explicit Context(const char* backend, int32_t num_threads = 0) : Context(options_for(backend, num_threads)) {}

  const mla_context* get() const noexcept { return handle_.get(); }

  void merge(const MergeArgs& args, void* stream = nullptr) const {
    mla_merge_args in = {};
    in.struct_size = sizeof in;
    in.flags = args.flags;
    in.out_parts = args.out_parts.tensor;
    in.lse_parts = args.lse_parts.tensor;
    in.out = args.out.tensor;
    in.lse = args.lse.tensor;
    check(mla_merge(get(), &in, stream));
  }

 private:
  explicit Context(const mla_context_options& options) : Context(&options) {}
  static mla_context_options options_for(const char* backend, int32_t num_threads) {
    mla_context_options options = {};
    options.struct_size = sizeof options;
    options.backend = backend;
    options.num_threads = num_threads;
    return options;
  }
  struct Destroy {
    void operator()(mla_context* context) const noexcept { mla_context_destroy(context); }
  };
  std::unique_ptr<mla_context, Destroy> handle_;
};

struct BackendInfo {
  std::string name;
  int32_t device_type;
  bool is_available;
  std::string reason;  // "" if available
};

// Every backend of the library, the one tried first in front.
inline std::vector<BackendInfo> backends() {
  std::vector<BackendInfo> list;
  mla_backend_info info = {};
  info.struct_size = sizeof info;
  for (int32_t index = 0; mla_get_backend_info(index, &info) == MLA_OK; ++index) {
    list.push_back({info.name, info.device_type, info.is_available != 0, info.reason});
  }
  return list;
}

// ---------------------------------------------------------------- plans -------------------------------------------------

// The schedule and scratch of a call, wherever they lie.
struct Buffers {
  void* schedule;
  uint64_t schedule_bytes;
  void* scratch;
  uint64_t scratch_bytes;
};

// Those with {} may be left out.
struct DecodeArgs {
  TensorRef q;
  TensorRef q_rope = {};
  TensorRef kv_cache;
  TensorRef kv_rope = {};
  TensorRef block_table;
  TensorRef cache_seqlens = {};
  TensorRef sink = {};
  TensorRef out;
  TensorRef lse = {};
  TensorRef global_seqlens = {};
};

class Plan {
 public:
  Plan(const Context& context, const mla_problem& problem) : device_type_(problem.device_type) {
    mla_plan* plan = nullptr;
    check(mla_plan_create(&plan, context.get(), &problem));
    handle_.reset(plan);
  }

  const mla_plan* get() const noexcept { return handle_.get(); }
  int32_t device_type() const noexcept { return device_type_; }

  // The strings live as long as the plan.
  mla_plan_info info() const {
    mla_plan_info info = {};
    info.struct_size = sizeof info;
    check(mla_plan_get_info(get(), &info));
    return info;
  }

  // cu_seqlens_q: ragged q only.
  void schedule(const Buffers& work, const TensorRef& cache_seqlens, const TensorRef& cu_seqlens_q = {},
                void* stream = nullptr) const {
    mla_schedule_args in = {};
    in.struct_size = sizeof in;
    in.cache_seqlens = cache_seqlens.tensor;
    in.cu_seqlens_q = cu_seqlens_q.tensor;
    in.schedule = work.schedule;
    in.schedule_bytes = work.schedule_bytes;
    check(mla_schedule(get(), &in, stream));
  }

  void decode(const Buffers& work, const DecodeArgs& args, void* stream = nullptr) const {
    mla_decode_args in = {};
    in.struct_size = sizeof in;
    in.q = args.q.tensor;
    in.q_rope = args.q_rope.tensor;
    in.kv_cache = args.kv_cache.tensor;
    in.kv_rope = args.kv_rope.tensor;
    in.block_table = args.block_table.tensor;
    in.cache_seqlens = args.cache_seqlens.tensor;
    in.sink = args.sink.tensor;
    in.out = args.out.tensor;
    in.lse = args.lse.tensor;
    in.global_seqlens = args.global_seqlens.tensor;
    in.schedule = work.schedule;
    in.schedule_bytes = work.schedule_bytes;
    in.scratch = work.scratch;
    in.scratch_bytes = work.scratch_bytes;
    check(mla_decode(get(), &in, stream));
  }

 private:
  struct Destroy {
    void operator()(mla_plan* plan) const noexcept { mla_plan_destroy(plan); }
  };
  std::unique_ptr<mla_plan, Destroy> handle_;
  int32_t device_type_;
};

// Aligned host memory.
class HostBlock {
 public:
  HostBlock(uint64_t bytes, uint64_t alignment)
      : bytes_(bytes), data_(::operator new(bytes, std::align_val_t(alignment)), Free{std::align_val_t(alignment)}) {}
  void* data() const noexcept { return data_.get(); }
  uint64_t bytes() const noexcept { return bytes_; }

 private:
  struct Free {
    std::align_val_t alignment;
    void operator()(void* data) const noexcept { ::operator delete(data, alignment); }
  };
  uint64_t bytes_;
  std::unique_ptr<void, Free> data_;
};

// What the calls of a CPU plan need. For a CUDA plan allocate info().schedule_bytes and info().scratch_bytes on its device and pass them
// as Buffers.
class Workspace {
 public:
  explicit Workspace(const Plan& plan) : Workspace(plan.device_type(), plan.info()) {}
  operator Buffers() const noexcept { return {schedule_.data(), schedule_.bytes(), scratch_.data(), scratch_.bytes()}; }

 private:
  Workspace(int32_t device_type, const mla_plan_info& info)
      : schedule_(info.schedule_bytes, info.schedule_alignment), scratch_(info.scratch_bytes, info.scratch_alignment) {
    if (device_type != MLA_DEVICE_CPU)
      throw Error(MLA_INVALID_ARGUMENT, "plan: must be a CPU plan, got a CUDA plan; pass Buffers on its device");
  }
  HostBlock schedule_, scratch_;
};

}  // namespace hpp
}  // namespace mla
