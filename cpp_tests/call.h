// A small valid call through the C ABI, all of whose arguments a test may then break. The outputs are poisoned, so that a test sees
// whether a refused call wrote anything.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "mlakit/mla.h"

namespace mla::test {

// A tensor that owns nothing and can be changed field by field.
struct Desc {
  mla_tensor_storage storage;
  const mla_tensor* set(void* data, int32_t dtype, std::initializer_list<int64_t> shape,
                        std::initializer_list<int64_t> strides = {}) {
    return mla_tensor_init(&storage, data, dtype, MLA_DEVICE_CPU, 0, static_cast<int32_t>(shape.size()), shape.begin(),
                           strides.size() == 0 ? nullptr : strides.begin());
  }
  mla_tensor& tensor() { return storage.tensor; }
  int64_t& shape(int i) { return storage.shape[i]; }
  // Gives the tensor explicit compact strides, to be changed.
  int64_t* strides() {
    int64_t step = 1;
    for (int i = storage.tensor.ndim - 1; i >= 0; --i) {
      storage.strides[i] = step;
      step *= storage.shape[i];
    }
    storage.tensor.strides = storage.strides;
    return storage.strides;
  }
};

struct FreeBuffer {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<void, FreeBuffer>;

inline Buffer aligned_buffer(uint64_t bytes, int poison = 0xA5) {
  const uint64_t size = (bytes + 255) / 256 * 256 + 256;
  Buffer buffer(std::aligned_alloc(256, size));
  std::memset(buffer.get(), poison, size);
  return buffer;
}

// Three requests of 5, 0 and 11 cached tokens in pages of 4, fp32. With "ragged" in the problem their query tokens are 2, 0 and 1.
class Call {
 public:
  static constexpr int64_t kBatch = 3, kHeads = 4, kKvHeads = 2, kHeadDim = 8, kValueDim = 6, kPageSize = 4, kPages = 7,
                           kWidth = 5, kRaggedTokens = 3;
  static constexpr const char* kProblem = "dense:fp32:b4:q2:h4:k2:d8:v6:p4:l20";

  explicit Call(const char* problem_text = kProblem, const char* backend = nullptr) {
    mla_context_options options = {};
    options.struct_size = sizeof options;
    options.backend = backend;
    options.num_threads = 2;
    ok(mla_context_create(&context, &options));
    ok(mla_problem_parse(&problem, problem_text));
    ok(mla_plan_create(&plan, context, &problem));
    info.struct_size = sizeof info;
    ok(mla_plan_get_info(plan, &info));
    schedule = aligned_buffer(info.schedule_bytes);
    scratch = aligned_buffer(info.scratch_bytes);
    fill(q, 1);
    fill(kv, 2);
    fill(sink, 3);
    fill(q_rope, 4);
    fill(kv_rope, 5);

    schedule_args.struct_size = sizeof schedule_args;
    schedule_args.cache_seqlens = lengths_t.set(lengths.data(), MLA_DTYPE_INT32, {kBatch});
    schedule_args.schedule = schedule.get();
    schedule_args.schedule_bytes = info.schedule_bytes;
    cu_t.set(cu.data(), MLA_DTYPE_INT32, {kBatch + 1});

    decode_args.struct_size = sizeof decode_args;
    decode_args.kv_cache = kv_t.set(kv.data(), MLA_DTYPE_FP32, {kPages, kPageSize, kKvHeads, kHeadDim});
    decode_args.block_table = table_t.set(table.data(), MLA_DTYPE_INT32, {kBatch, kWidth});
    sink_t.set(sink.data(), MLA_DTYPE_FP32, {kHeads});
    if ((problem.flags & MLA_PROBLEM_RAGGED_Q) != 0) {
      schedule_args.cu_seqlens_q = cu_t.set(cu.data(), MLA_DTYPE_INT32, {kBatch + 1});
      decode_args.q = q_t.set(q.data(), MLA_DTYPE_FP32, {kRaggedTokens, kHeads, kHeadDim});
      q_rope_t.set(q_rope.data(), MLA_DTYPE_FP32, {kRaggedTokens, kHeads, kHeadDim - kValueDim});
      decode_args.out = out_t.set(out.data(), MLA_DTYPE_FP32, {kRaggedTokens, kHeads, kValueDim});
      decode_args.lse = lse_t.set(lse.data(), MLA_DTYPE_FP32, {kRaggedTokens, kHeads});
    } else {
      decode_args.q = q_t.set(q.data(), MLA_DTYPE_FP32, {kBatch, problem.q_len, kHeads, kHeadDim});
      q_rope_t.set(q_rope.data(), MLA_DTYPE_FP32, {kBatch, problem.q_len, kHeads, kHeadDim - kValueDim});
      decode_args.out = out_t.set(out.data(), MLA_DTYPE_FP32, {kBatch, problem.q_len, kHeads, kValueDim});
      decode_args.lse = lse_t.set(lse.data(), MLA_DTYPE_FP32, {kBatch, problem.q_len, kHeads});
    }
    kv_rope_t.set(kv_rope.data(), MLA_DTYPE_FP32, {kPages, kPageSize, kKvHeads, kHeadDim - kValueDim});
    decode_args.schedule = schedule.get();
    decode_args.schedule_bytes = info.schedule_bytes;
    decode_args.scratch = scratch.get();
    decode_args.scratch_bytes = info.scratch_bytes;
  }
  ~Call() {
    mla_plan_destroy(plan);
    mla_context_destroy(context);
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  mla_status run_schedule() { return mla_schedule(plan, &schedule_args, nullptr); }
  mla_status run_decode() { return mla_decode(plan, &decode_args, nullptr); }

  // Everything that a call may write, for comparison.
  std::string outputs() const {
    std::string bytes(reinterpret_cast<const char*>(out.data()), out.size() * sizeof(float));
    bytes.append(reinterpret_cast<const char*>(lse.data()), lse.size() * sizeof(float));
    return bytes.append(static_cast<const char*>(schedule.get()), info.schedule_bytes);
  }

  mla_context* context = nullptr;
  mla_problem problem;
  mla_plan* plan = nullptr;
  mla_plan_info info = {};
  // Table entries past the last used page are garbage on purpose.
  std::vector<int32_t> lengths = {5, 0, 11}, cu = {0, 2, 2, 3},
                       table = {3, 6, -9, 99, 7, -1, 1 << 30, 8, -5, 77, 0, 5, 2, -2, 1000};
  std::vector<float> q = poison(kBatch * 2 * kHeads * kHeadDim), q_rope = poison(kBatch * 2 * kHeads * 2);
  std::vector<float> kv = poison(kPages * kPageSize * kKvHeads * kHeadDim),
                     kv_rope = poison(kPages * kPageSize * kKvHeads * 2);
  std::vector<float> sink = poison(kHeads), out = poison(kBatch * 2 * kHeads * kValueDim),
                     lse = poison(kBatch * 2 * kHeads);
  Buffer schedule, scratch;
  Desc lengths_t, cu_t, q_t, q_rope_t, kv_t, kv_rope_t, table_t, sink_t, out_t, lse_t;
  mla_schedule_args schedule_args = {};
  mla_decode_args decode_args = {};

 private:
  static void ok(mla_status status) {
    if (status != MLA_OK) throw std::runtime_error(mla_last_error());
  }
  static std::vector<float> poison(int64_t n) { return std::vector<float>(static_cast<size_t>(n), -12345.0f); }
  static void fill(std::vector<float>& v, uint32_t seed) {
    uint32_t x = seed * 2654435761u + 1;
    for (float& f : v) {
      x = x * 1664525u + 1013904223u;
      f = static_cast<float>(x >> 8) / 8388608.0f - 1.0f;
    }
  }
};

}  // namespace mla::test
