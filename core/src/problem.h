// Problem: what one plan is for, valid by construction. Made by validate.cc only; nobody checks it again.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "shard.h"

namespace mla {

enum class DType : int32_t { kBf16 = 1, kFp16 = 2, kFp32 = 3, kE4m3 = 4, kInt32 = 5 };  // MLA_DTYPE_...

MLA_HD constexpr int32_t dtype_bytes(DType t) {
  return t == DType::kE4m3 ? 1 : t == DType::kBf16 || t == DType::kFp16 ? 2 : 4;
}

enum class DeviceType : int32_t { kCpu = 1, kCuda = 2 };                                       // MLA_DEVICE_...
enum class SplitPolicy : int32_t { kBalanced = 0, kFixedChunk = 1 };                           // MLA_SPLIT_...
enum class KvFormat : int32_t { kPlain = 0, kFp8Tensor = 1, kFp8Row656 = 2, kFp8Row584 = 3 };  // MLA_KV_...

MLA_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Problem {
  DeviceType device_type;
  int32_t device_id;
  DType q_dtype, kv_dtype, out_dtype;
  KvFormat kv_format;
  int64_t max_batch;
  int64_t q_len;         // uniform: exact; ragged: the most of one request
  int64_t max_q_tokens;  // query tokens of a whole call
  int64_t max_len;       // cached tokens of one request
  int64_t max_tokens;    // cached tokens of a whole call
  int32_t q_heads, kv_heads;
  int32_t head_dim, value_dim;
  int32_t page_size;
  SplitPolicy split_policy;
  int32_t chunk_tokens;  // fixed_chunk only, else 0
  int32_t topk;
  int32_t cp_world, cp_rank, cp_turn;
  float softmax_scale;
  bool is_causal, is_ragged, is_lse_base2, has_tree_mask, has_extra_segment, is_debug;

  // A row is one (query token, query head) pair that reads one kv head: row = token * heads_per_kv_head() + head within the group.
  MLA_HD constexpr int32_t heads_per_kv_head() const { return q_heads / kv_heads; }
  MLA_HD constexpr int64_t rows(int64_t q_tokens) const { return q_tokens * heads_per_kv_head(); }
  MLA_HD constexpr int32_t rope_dim() const { return head_dim - value_dim; }
  MLA_HD constexpr int64_t max_pages() const { return ceil_div(max_len, page_size); }
  // This rank's keys among the first n of a request.
  MLA_HD constexpr int64_t local_tokens(int64_t n) const { return shard_tokens(n, cp_world, cp_rank, cp_turn); }
  // Only a causal shard has to know how long its requests are on all ranks together.
  MLA_HD constexpr bool needs_global_len() const { return is_causal && cp_world > 1; }
  // Keys of this rank that query token t of q_tokens may see, of a request with len_tokens keys here and global_tokens on all ranks
  // together. A row sees the first of them.
  MLA_HD constexpr int64_t visible_tokens(int64_t len_tokens, int64_t global_tokens, int64_t q_tokens,
                                          int64_t t) const {
    return is_causal ? local_tokens(global_tokens - q_tokens + 1 + t) : len_tokens;
  }
};

}  // namespace mla
