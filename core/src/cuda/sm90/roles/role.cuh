// What the roles of the dense decode kernel have in common.
#pragma once

#include "cuda/sm90/params.h"
#include "cuda/sm90/pipeline.cuh"
#include "cuda/sm90/shared.h"

namespace mla::cuda::sm90 {

// Rows of this tile that exist.
__device__ __forceinline__ int32_t tile_rows(const schedule::Config& config, const Work& work) {
  return min(work.q_tokens * config.heads_per_kv_head - work.first_row, kTileRows);
}

// Of the tile, among the rows of its item's request.
__device__ __forceinline__ int32_t first_row_of(const DecodeParams& p, int32_t row_group, int tile) {
  return row_group * p.config.item_rows + tile * kTileRows;
}

// A piece as the CTAs of a row tile see it: whose rows, and which keys. The fields are written one by one: those who do this have few registers.
__device__ __forceinline__ void write_rows(const DecodeParams& p, int32_t request, int32_t item, int tile,
                                           int32_t q_begin, int32_t q_tokens, Work& work) {
  const int32_t row_group = p.kv_heads.quotient(item);
  work.request = request;
  work.q_tokens = q_tokens;
  work.q_begin = q_begin;
  work.first_row = first_row_of(p, row_group, tile);
  work.kv_head = p.kv_heads.remainder(item, row_group);
}
__device__ __forceinline__ void write_keys(const DecodeParams& p, const schedule::Piece& piece, int32_t len,
                                           Work& work) {
  work.begin_block = piece.begin_block;
  work.end_block = piece.end_block;
  work.len_tokens = len;
  work.slot = piece.slot < 0 ? kWholeItem : piece.slot < p.config.slots ? static_cast<int32_t>(piece.slot) : kDropped;
}

using WorkCursor = Cursor<kWorkStages>;

// A stage of P: a tile of 64 keys, or half of one.
template <DecodeConfig kCfg>
using PCursor = Cursor<kCfg.p_stages()>;
template <DecodeConfig kCfg>
__device__ __forceinline__ uint32_t p_tile(const RoleContext& ctx, const PCursor<kCfg>& at) {
  return ctx.shared + smem_plan<kCfg>().p(at.stage() * kCfg.block_tokens / kWideBlock);
}
template <DecodeConfig kCfg>
__device__ __forceinline__ int first_key_in_tile(const PCursor<kCfg>& at) {
  return at.stage() * kCfg.block_tokens % kWideBlock;
}

// Of what is one buffer, passed once for each work: the row scales, and Q of wide blocks.
__device__ __forceinline__ Cursor<1> once_a_work(WorkCursor at) { return {at.value}; }

}  // namespace mla::cuda::sm90
