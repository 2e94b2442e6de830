// The seam between code built for every machine and code built for one instruction set: plain structs and one table of functions.
//
// A file built for an ISA includes only this and its own headers. Nothing here has a function body: an inline function compiled with
// AVX-512 flags could be the copy that the linker keeps for a machine without them.
#pragma once

#include <cstdint>

namespace mla::cpu {

// Element types, with the numbers of mla::DType.
enum class Elem : int32_t { kBf16 = 1, kFp16 = 2, kFp32 = 3 };

// What the matrix products work on. A word is 32 bits: one fp32 value, or two bf16 values that are neighbours in the summed dimension.
enum class Math : int32_t { kFp32 = 0, kBf16Pairs = 1 };

inline constexpr int32_t kBlockTokens = 64;  // unit of the schedule
inline constexpr int32_t kMaxStep = 128;     // keys of one step of the online softmax, at most
inline constexpr int32_t kMaxTile = 8;       // keys or rows of a tile of the products, at most

// Rows of one request and one kv head: row r is query token r / heads, head r % heads of the group. Strides in elements.
struct Rows {
  const void* data;  // of token 0, head 0
  int64_t token_stride;
  int64_t head_stride;
};

// Cache rows of one kv head: token j is at page table[j / page_size], row j % page_size. Strides in elements.
struct Cache {
  const void* data;
  int64_t page_stride;
  int64_t token_stride;
};

// Attention of `rows` query rows to the keys [begin_token, end_token) of one request. The result stays in LaneScratch: out * row_scale is
// the sum of weighted values, row_sum that of the weights, relative to 2^row_max. A row that saw nothing has row_sum 0, and then anything
// in out.
struct AttendArgs {
  Math math;
  Elem q_elem, kv_elem;
  int32_t head_dim, value_dim;
  int32_t heads;      // query heads of the group
  int64_t first_row;  // row 0 of this call among the request's rows
  int32_t rows;
  int32_t q_columns;   // columns of q; the other head_dim - q_columns are in q_rope
  int32_t kv_columns;  // columns of kv; the other head_dim - kv_columns are in kv_rope
  Rows q, q_rope;
  Cache kv, kv_rope;
  const int32_t* table;  // the request's page ids
  int32_t page_size;
  int64_t begin_token, end_token;
  bool is_causal;
  int64_t
      visible0;  // causal: keys that query token 0 sees on all ranks together; token t sees t more. May be negative.
  int32_t cp_world, cp_rank, cp_turn;  // see shard.h
  float scale_log2e;
  bool is_q_packed;  // LaneScratch::q and ::rows are as an earlier call with the same rows left them
};

// What one running task works in. Sizes are set by lane_scratch() in cpu_backend.cc.
struct LaneScratch {
  uint32_t* q;        // words [strip of rows][head_dim words][lanes of the strip]
  float* scores;      // [kMaxStep][lanes of a strip]
  uint32_t* weights;  // [kMaxStep words][padded rows]
  uint32_t*
      values;  // fp32: the step's rows [kBlockTokens][row_stride]; bf16: two strips of columns [kMaxStep / 2][lanes of a strip]
  uint32_t* rows;  // [4][row_stride]: rows of q on their way; then the first is zeros
  float* out;      // [padded rows][out_stride]
  float* row_max;  // [padded rows] each
  float* row_sum;
  float* row_scale;     // with bf16 pairs the sum of out's weights until the last step is done
  float* row_per_unit;  // bf16 pairs: 1 / the unit of out's weights
  float* rescale;
  int32_t* limit;
  int32_t row_stride;  // words: head_dim, and room for 15 more
  int32_t out_stride;  // floats
};

// One instruction set.
struct Kernel {
  int32_t lanes;        // fp32 lanes of a vector
  bool has_bf16_pairs;  // takes Math::kBf16Pairs
  void (*attend)(const AttendArgs&, const LaneScratch&);
  // sum[0:n] += weight * part.
  void (*add_part)(float* sum, float weight, const void* part, Elem part_elem, int64_t n);
  // out[0:n] = scale * row.
  void (*store_row)(void* out, Elem out_elem, const float* row, float scale, int64_t n);
};

extern const Kernel kScalarKernel;
extern const Kernel kAvx2Kernel;
extern const Kernel kAvx512Kernel;
extern const Kernel kAvx512Bf16Kernel;

}  // namespace mla::cpu
