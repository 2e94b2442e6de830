// Validated views of a call's tensors: plain pointers with strides in elements, int64 throughout. Made by validate.cc only.
#pragma once

#include <cstdint>

#include "problem.h"

namespace mla {

// q, q_rope, out (C = element type as in the problem) and lse. Element (request b, token t of it, head h, column) is at
//   data + base * token_stride + (b or 0) * batch_stride + t * token_stride + h * head_stride + column * column_stride
// uniform: base = 0, batch_stride as given. ragged: base = q_begin[b], batch_stride = 0.
struct RowView {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t token_stride = 0;
  int64_t head_stride = 0;

  MLA_HD constexpr int64_t offset(bool is_ragged, int64_t b, int64_t q_begin, int64_t t, int64_t h) const {
    return (is_ragged ? q_begin * token_stride : b * batch_stride) + t * token_stride + h * head_stride;
  }
};

// kv_cache or kv_rope: element (page, token of the page, kv head, column) at page * page_stride + token * token_stride + head * head_stride + column.
struct CacheView {
  const void* data = nullptr;
  int64_t pages = 0;
  int64_t page_stride = 0;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
};

struct TableView {
  const int32_t* data = nullptr;
  int64_t row_stride = 0;
  int64_t width = 0;
};

struct Int32View {
  const int32_t* data = nullptr;
  int64_t stride = 1;
};

struct ScheduleCall {
  int32_t batch;
  Int32View cache_seqlens;
  Int32View cu_seqlens_q;  // data = nullptr: uniform
  std::byte* schedule;
};

struct DecodeCall {
  int32_t batch;
  int64_t q_tokens;   // of all requests together, by q's shape
  RowView q, q_rope;  // q_rope.data = nullptr: q holds all head_dim columns
  CacheView kv, kv_rope;
  TableView block_table;
  Int32View cache_seqlens;   // data = nullptr: not given
  Int32View global_seqlens;  // data = nullptr unless Problem::needs_global_len()
  const float* sink;         // nullptr: none; contiguous [q_heads]
  RowView out;
  RowView lse;  // data = nullptr: not wanted; float
  const std::byte* schedule;
  std::byte* scratch;
};

struct MergeCall {
  int64_t parts, tokens, heads, dim;
  DType in_dtype, out_dtype;
  bool is_lse_base2;
  const void* out_parts;  // strides in elements, last dimension 1
  int64_t out_parts_stride[3];
  const float* lse_parts;
  int64_t lse_parts_stride[3];
  void* out;
  int64_t out_stride[2];
  float* lse;  // nullptr: not wanted
  int64_t lse_stride[2];
  int32_t device_id;
};

}  // namespace mla
