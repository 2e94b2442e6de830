// What the host hands to the kernels, by value.
#pragma once

#include <cuda.h>

#include <cstddef>

#include "layout/divider.h"
#include "layout/partial.h"
#include "schedule/view.h"
#include "tensors.h"

namespace mla::cuda::sm90 {

// Where results go and how they are finished; shared by decode and combine.
struct ResultParams {
  RowView out;        // element type by is_out_fp32, else that of q
  RowView lse;        // data = nullptr: not wanted
  const float* sink;  // nullptr: none
  float lse_unit;     // what an lse in base 2 is multiplied with: 1, or ln 2
  bool is_ragged;
  bool is_out_fp32;
  layout::Divider heads;  // per kv head: rows of a query token
  float* partial_out;     // PartialLayout, as accumulated
  layout::PartialState* partial_state;
  layout::PartialLayout partial;
};

struct DecodeParams {
  CUtensorMap q_latent, q_rope, kv_latent,
      kv_rope;  // (column, head | token, column group, token | kv head, request | page)
  schedule::Config config;
  schedule::Layout layout;
  const std::byte* schedule;
  TableView block_table;
  ResultParams result;
  int32_t batch;
  layout::Divider page_size, kv_heads;
  int32_t most_in_flight;  // narrow: slots of a CTA that are loaded at the same time, but one more for Q; < ring_slots
  int32_t prefetched_slots;  // narrow: of a whole first piece, while the kernel before decode ends
  bool prefetches_late;      // wide: see roles/prefetcher.cuh
  int32_t kv_run;            // layout::run_rows of a page
  int32_t q_run;             // layout::run_rows of the heads of a query token
  float scale_log2e;
  bool is_causal;
  Int32View global_seqlens;  // causal shards only, else data = nullptr
  int32_t cp_world, cp_rank, cp_turn;
};

struct CombineParams {
  schedule::Config config;
  schedule::Layout layout;
  const std::byte* schedule;
  ResultParams result;
  int32_t batch;
  int32_t q_len;               // of every request, unless q is ragged
  int32_t log2_warps_of_tile;  // of the warps that share the pieces of one tile; 0 where a warp takes several tiles
  bool is_by_item;             // blockIdx.x counts items; else parts, each standing for the item cut at its begin
  layout::Divider items_per_request, kv_heads;
};

struct ScheduleParams {
  schedule::Config config;
  schedule::Layout layout;
  std::byte* schedule;
  Int32View cache_seqlens;
  Int32View cu_seqlens_q;  // data = nullptr: q_len for every request
  int32_t batch;
  int32_t q_len;
  int64_t max_len;
  int64_t max_q_tokens;
};

}  // namespace mla::cuda::sm90
