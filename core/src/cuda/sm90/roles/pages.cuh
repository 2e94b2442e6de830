// The block table, as the loader looks pages up: one a lane, through the second-level cache.
#pragma once

#include "cuda/sm90/roles/role.cuh"

namespace mla::cuda::sm90 {

// Where the page of a request's token >= 0 is; nullptr past the table.
__device__ __forceinline__ const int32_t* place_of_page(const DecodeParams& p, int32_t request, int32_t token) {
  const int32_t index = p.page_size.quotient(token);
  return index < p.block_table.width ? p.block_table.data + request * p.block_table.row_stride + index : nullptr;
}

// -1 (reads as zeros) past the table and past the request's end.
__device__ __forceinline__ int32_t page_of(const DecodeParams& p, const Work& work, int32_t token) {
  const int32_t* place = token < work.len_tokens ? place_of_page(p, work.request, token) : nullptr;
  return place != nullptr ? __ldcg(place) : -1;
}

// Of wide blocks: so many are looked up together, one a lane.
inline constexpr int kPageWindow = 32;

// -1 past the piece's end.
template <DecodeConfig kCfg>
__device__ __forceinline__ int32_t page_of_block(const DecodeParams& p, const Work& work, int32_t block) {
  return block < work.end_block ? page_of(p, work, block * kCfg.block_tokens) : -1;
}

// Of narrow ones a window is 32 runs of tokens, one a lane: where this lane's begins in the first window from a block on, and its page.
__device__ __forceinline__ int32_t first_token(const DecodeParams& p, int32_t block, int lane) {
  return block * kNarrowBlock + lane * p.kv_run;
}
__device__ __forceinline__ int32_t first_page_of(const DecodeParams& p, const Work& work, int lane) {
  return page_of(p, work, first_token(p, work.begin_block, lane));
}

}  // namespace mla::cuda::sm90
