// The only place that rejects input: C structs in, Problem, Context and calls out, valid by construction. All messages to users are here
// and in tensor_check.cc.
//
// Structs arrive with their caller's struct_size settled (abi.cc), so every field can be read.
#pragma once

#include "backend.h"
#include "problem.h"
#include "status.h"
#include "tensors.h"

namespace mla {

inline constexpr int32_t kDefaultChunkTokens = 2048;
float default_softmax_scale(int32_t head_dim);

Status check_not_null(const char* name, const void* pointer);
// A buffer for a string of `needed` bytes.
Status check_buffer(const char* name, const char* buffer, size_t size, size_t needed);
// The struct_size that begins a caller's struct, against the size of ours.
Status check_struct_size(const char* name, const void* in, size_t known_bytes);
// Bytes of a newer caller's struct past the end of ours have to be zero.
Status check_unknown_bytes(const char* name, const void* in, size_t known_bytes);

// Enum values and flag bits only: what problem_string.cc needs to write a problem down.
Status check_problem_enums(const mla_problem& in);
Status make_problem(const mla_problem& in, Problem& out);

// The backend of rank index.
Status backend_at(int32_t index, const Backend** backend);

// Reads MLAKIT_BACKEND and MLAKIT_NUM_THREADS: the only readers of the environment.
Status make_context(const mla_context_options& in, Context& out);

Status make_schedule_call(const Plan& plan, const mla_schedule_args& in, void* stream, ScheduleCall& out);
Status make_decode_call(const Plan& plan, const mla_decode_args& in, void* stream, DecodeCall& out);
Status make_merge_call(const mla_merge_args& in, MergeCall& out, DeviceType& device_type);

// For mla_tensor_init.
struct TensorFacts {
  void* data;
  int32_t dtype;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  const int64_t* shape;
  const int64_t* strides;
};
Status make_tensor(const TensorFacts& in, mla_tensor_storage* out);

}  // namespace mla
