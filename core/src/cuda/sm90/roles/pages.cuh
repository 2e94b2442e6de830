// The block table, as the loader looks pages up: one a lane, through the second-level cache.
#pragma once

#include "cuda/sm90/roles/role.cuh"

namespace mla::cuda::sm90 {

// The page of a request's token >= 0; -1 (reads as zeros) past the table.
__device__ __forceinline__ int32_t page_at(const DecodeParams& p, int32_t request, int32_t token) {
  const int32_t index = p.page_size.quotient(token);
  return index < p.block_table.width ? __ldcg(p.block_table.data + request * p.block_table.row_stride + index) : -1;
}

// -1 past the request's end too.
__device__ __forceinline__ int32_t page_of(const DecodeParams& p, const Work& work, int32_t token) {
  return token < work.len_tokens ? page_at(p, work.request, token) : -1;
}

// A window is 32 runs of tokens, one a lane: where this lane's begins in the first window from a block on, and its page.
__device__ __forceinline__ int32_t first_token(const DecodeParams& p, int32_t block, int lane) {
  return block * kBlockTokens + lane * p.kv_run;
}
__device__ __forceinline__ int32_t first_page_of(const DecodeParams& p, const Work& work, int lane) {
  return page_of(p, work, first_token(p, work.begin_block, lane));
}

}  // namespace mla::cuda::sm90
