// A decode call on random data, for tests inside the library: it builds Plan and DecodeCall itself, runs a backend, and compares with
// attention computed in double from the same elements.
//
// Everything that must not matter is hostile: cache slots outside the requests are NaN, table entries past the last used page point far
// out, schedule, scratch and outputs start as NaN, and so do the gaps between strided rows (which must stay as they are).
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "backend.h"

namespace mla::test {

// What a case is. Lengths (cached tokens) and q_lens are a value a request.
struct Spec {
  DType q_dtype = DType::kBf16, kv_dtype = DType::kBf16, out_dtype = DType::kBf16;
  int32_t q_heads = 16, kv_heads = 1, head_dim = 576, value_dim = 512, page_size = 64;
  std::vector<int32_t> lengths = {100};
  std::vector<int32_t> q_lens = {1};  // all equal unless is_ragged
  bool is_causal = false, is_ragged = false, is_lse_base2 = false;
  bool has_sink = false, has_lse = true;
  bool has_q_views = false, has_kv_views = false;  // latent and rope apart
  bool is_strided = false;                         // gaps between rows, pages and heads; lse heads first
  SplitPolicy split_policy = SplitPolicy::kBalanced;
  int32_t chunk_tokens = 64;
  int64_t max_len = 0;  // 0: the longest length
  int64_t max_batch = 0;
  float softmax_scale = 0.0f;  // 0: head_dim ** -0.5
  float q_magnitude = 1.0f;
  uint32_t seed = 1;
  uint32_t page_seed = 1;  // places of the pages only

  std::string describe() const;
};

struct Output {
  std::vector<double> out;          // [token][head][value_dim]
  std::vector<double> lse;          // [token][head]
  std::vector<double> spread;       // [token][head][value_dim]: sum of weight * |value|; of expect() only
  std::vector<unsigned char> bits;  // of out and lse together
  int64_t allocations = 0;
};

struct Runner {
  int32_t num_threads = 1;
  mla_parallel_for_fn parallel_for = nullptr;
  void* parallel_for_user = nullptr;
  int decodes = 1;
  const std::atomic<int64_t>* allocations = nullptr;  // a counter to look at around the last decode
};

class Case {
 public:
  explicit Case(const Spec& spec);

  // Plans, schedules and decodes. Also checks that nothing outside the outputs was written.
  Output run(const Backend& backend, const Runner& runner = {}) const;
  Output expect() const;
  // A cached row that the case's requests see, to be changed by a test. Columns [0, head_dim).
  void set_key(int32_t request, int64_t token, int32_t kv_head, int32_t column, double value);
  const Spec& spec() const { return spec_; }
  Problem problem() const;

 private:
  struct Tensor {
    DType dtype;
    std::vector<unsigned char> data;
    void resize(int64_t elems);
    void set(int64_t index, double value);
    double get(int64_t index) const;
  };
  int64_t q_index(int64_t token, int32_t head, int32_t column, bool* is_rope) const;
  int64_t kv_index(int64_t page, int64_t row, int32_t kv_head, int32_t column, bool* is_rope) const;
  int64_t kv_index_of(int32_t request, int64_t token, int32_t kv_head, int32_t column, bool* is_rope) const;
  int64_t out_index(int64_t token, int32_t head, int32_t column) const;
  int64_t lse_index(int64_t token, int32_t head) const;

  Spec spec_;
  int32_t batch_;
  std::vector<int32_t> q_begin_;
  int64_t q_tokens_, pages_, table_width_;
  RowView q_view_, q_rope_view_, out_view_, lse_view_;
  CacheView kv_view_, kv_rope_view_;
  Tensor q_, q_rope_, kv_, kv_rope_;
  std::vector<int32_t> table_;
  std::vector<float> sink_;
  int64_t out_elems_, lse_elems_;
};

// The CPU backends that this machine can run.
std::vector<const Backend*> usable_backends();

// "" if every row of `got` is as near to `want` as its arithmetic allows, else the first row that is not.
std::string compare(const Spec& spec, const Output& got, const Output& want);

}  // namespace mla::test
